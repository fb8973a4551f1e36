"""The fixed chat-template text around the turns that the model writes.

After the template's opening of a user's turn, an instruct model writes a user's question, as Magpie (Xu et al. 2024,
arXiv 2406.08464) has it do; after the template's opening of an answer, it answers. Or the questions come from a file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from datagen import sampling
from qat.runtime.errors import UserError
from qat.store.dialogues import Message, encoded, message, rendered
from qat.store.models import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_QUESTION, _ANSWER, _NEXT = "AQUESTION", "ANANSWER", "ANEXTQUESTION"
"""Placeholder messages, which separate the template's own text from the messages."""


@dataclass(frozen=True)
class Dialogues:
    """The given texts, as token ids.

    Args:
        openings: the text before the first turn that the model writes: one for all dialogues, or one per prompt
        between: the text after each turn that it writes, except the last
    """

    openings: list[list[int]]
    between: list[list[int]]

    @classmethod
    def of(cls, tokenizer: Tokenizer, turns: int, system: str, max_length: int) -> Dialogues:
        """Return the texts of dialogues of ``turns`` questions and answers, all by the model.

        Args:
            system: the system prompt; "" for the template's own, or none

        Raises UserError for a template that does not say where a turn ends, and if ``max_length`` tokens are too few.
        """
        opening, to_answer, to_question = _texts(tokenizer, turns, system)
        between = [to_answer, *[to_question, to_answer] * (turns - 1)]
        needed = len(opening) + sum(map(len, between)) + 2 * turns
        if needed > max_length:
            raise UserError(
                f"max_length={max_length} is too short: with turns={turns} the chat template alone takes "
                f"{needed - 2 * turns} tokens: give {needed} or more."
            )
        if not opening:
            raise UserError(
                "The tokenizer's chat template puts nothing before the user's turn, so the model cannot begin one: "
                "give --prompts FILE."
            )
        return cls([opening], between)

    @classmethod
    def of_prompts(
        cls, tokenizer: Tokenizer, prompts: list[list[Message]], turns: int, system: str, max_length: int
    ) -> Dialogues:
        """Return the texts of dialogues that begin with ``prompts``, which the model answers, before it writes
        ``turns`` - 1 more questions and answers.

        An answer at the end of a prompt is left out, and so are prompts that leave none of ``max_length`` tokens for an
        answer. ``system`` comes before prompts that have no system prompt. Raises UserError if no prompt is left.
        """
        given = [_asked(prompt, system) for prompt in prompts]
        openings = [encoded(tokenizer, rendered(tokenizer, prompt, answering=True)) for prompt in given if prompt]
        openings = [opening for opening in openings if len(opening) < max_length]
        if not openings:
            raise UserError(
                f"None of the {len(prompts)} prompts leaves room for an answer in max_length={max_length} tokens: give "
                "shorter ones, or more tokens."
            )
        if turns == 1:
            return cls(openings, [])
        _, to_answer, to_question = _texts(tokenizer, turns, system)
        return cls(openings, [to_question, to_answer] * (turns - 1))

    def fingerprint(self) -> str:
        """Return an identifier of the texts."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def begin(self, seed: int, first: int, count: int) -> list[list[int]]:
        """Return the openings of ``count`` dialogues from ``first``: every prompt is used once before any twice."""
        places = sampling.start_tokens(list(range(len(self.openings))), seed, first, count)
        return [self.openings[place] for place in places]


def _asked(prompt: list[Message], system: str) -> list[Message]:
    """Return a prompt up to its last message that is no answer, after the system prompt."""
    last = max((number for number, turn in enumerate(prompt) if turn["role"] != "assistant"), default=-1)
    with_system = [message("system", system)] if system and prompt[0]["role"] != "system" else []
    return [*with_system, *prompt[: last + 1]] if last >= 0 else []


def _texts(tokenizer: Tokenizer, turns: int, system: str) -> tuple[list[int], list[int], list[int]]:
    """Return what the chat template puts before the first question, between a question and its answer, and between an
    answer and the next question (empty where ``turns`` is 1)."""
    messages = [message("system", system)] if system else []
    messages.append(message("user", _QUESTION))
    opening, to_answer = _split(rendered(tokenizer, messages, answering=True), [_QUESTION])
    to_question = ""
    if turns > 1:
        messages += [message("assistant", _ANSWER), message("user", _NEXT)]
        parts = _split(rendered(tokenizer, messages, answering=True), [_QUESTION, _ANSWER, _NEXT])
        to_question = parts[2]
        if parts != [opening, to_answer, to_question, to_answer]:
            raise UserError(
                f"turns={turns}: the tokenizer's chat template changes earlier turns when later ones follow, so a "
                "dialogue cannot be written turn by turn: give --turns 1."
            )
    texts = [encoded(tokenizer, text) for text in (opening, to_answer, to_question)]
    special = special_ids(tokenizer)
    for text, ids in ((to_answer, texts[1]), *([(to_question, texts[2])] if turns > 1 else [])):
        if not ids or ids[0] not in special:
            raise UserError(
                f"The tokenizer's chat template ends a turn with ordinary text ({text!r}), so the end of a generated "
                "turn cannot be detected: give --prompts FILE with --turns 1."
            )
    return texts[0], texts[1], texts[2]


def _split(text: str, contents: list[str]) -> list[str]:
    """Return the parts of ``text`` around ``contents``."""
    parts = []
    for content in contents:
        part, found, text = text.partition(content)
        if not found:
            raise UserError(
                "The tokenizer's chat template does not render messages in order: give --prompts FILE with --turns 1."
            )
        parts.append(part)
    return [*parts, text]
