"""Reading checkpoints as data: DeepSpeed's are pickles, and a pickle can name any function to be called on reading."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qat.runtime.errors import UserError

_FORCED, _FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def as_data(folder: Path) -> Iterator[None]:
    """Let ``torch.load``, in this context, make tensors, plain values and the two classes that DeepSpeed's checkpoints
    also hold, and call nothing else, even where DeepSpeed asks for ``weights_only=False``.

    Raises UserError, which names ``folder``, for a file that asks for more.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler  # slow to import, rarely needed
    from deepspeed.runtime.zero.config import ZeroStageEnum

    before = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler]):
            yield
    except pickle.UnpicklingError as error:
        code = would_run(error)
        fault = f"would run code ({code})" if code else "cannot be read as tensors and plain values"
        raise UserError(
            f"{folder} is refused: one of its files {fault}, unlike a checkpoint of this program. Delete the folder, "
            "or replace it with a copy that you trust."
        ) from error
    finally:
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def would_run(error: Exception) -> str:
    """Return the function that the file asked for and ``torch.load`` refused; empty if it failed for another reason."""
    named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return named[1] if named else ""
