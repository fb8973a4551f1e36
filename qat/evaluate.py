"""Perplexity by the GPTQ protocol: one concatenated text, cut into windows that do not overlap."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from datagen import heldout
from qat.distill import predicting
from qat.errors import UserError

ENCYCLOPEDIA = "encyclopedia"
"""The name of the built-in held-out prose."""

_CHUNK_TOKENS = 512
"""Tokens whose logits exist at one time."""


@dataclass(frozen=True)
class Perplexity:
    """exp(nll), and nll: the mean negative log-likelihood in nats of ``tokens`` predicted tokens."""

    perplexity: float
    nll: float
    tokens: int


def text_windows(text: str, tokenizer: Tokenizer, window: int, most: int) -> Tensor:
    """Token ids [windows, window] of a built-in text or a text file; at most ``most`` windows if that is not 0.

    Raises UserError if the text is missing or shorter than one window.
    """
    if text == ENCYCLOPEDIA:
        paragraphs: Iterable[str] = heldout.articles()
    elif Path(text).is_file():
        paragraphs = [Path(text).read_text()]
    else:
        raise UserError(f"There is no text at {text!r}: give a text file, or {ENCYCLOPEDIA!r} for the built-in prose.")
    ids: list[int] = []
    for paragraph in paragraphs:
        ids += tokenizer(paragraph + "\n\n", add_special_tokens=False, verbose=False).input_ids
        if most and len(ids) >= most * window:
            break
    windows = min(len(ids) // window, most or len(ids))
    if windows == 0:
        raise UserError(f"{text} has {len(ids)} tokens, less than one window of {window}: give more text.")
    return torch.tensor(ids[: windows * window]).view(windows, window)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor) -> Perplexity:
    """The perplexity of ``model`` on token ids [windows, window]; each window starts without context."""
    nll, count = 0.0, 0
    for window in tqdm(windows, desc="evaluate", unit="window", dynamic_ncols=True):
        ids = window[None].to(model.device)
        hidden = predicting(model, ids)
        for states, targets in zip(hidden.split(_CHUNK_TOKENS), ids[0, 1:].split(_CHUNK_TOKENS), strict=True):
            nll += cross_entropy(model.lm_head(states).float(), targets, reduction="sum").item()
        count += len(hidden)
    return Perplexity(math.exp(nll / count), nll / count, count)
