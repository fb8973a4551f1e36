"""The one exception that users are meant to see."""


class UserError(ValueError):
    """A wrong input. The message says what was given, what is allowed and what to change.

    The entry points in ``launch/`` print the message alone, without a traceback.
    """
