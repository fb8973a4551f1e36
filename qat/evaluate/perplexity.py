"""Perplexity by the GPTQ protocol, and the distance to the teacher on the same tokens.

One concatenated text is cut into windows that do not overlap; each starts without context.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from qat.quant.architecture import output_layer
from qat.quant.forward import predicting
from qat.runtime import ranks
from qat.runtime.errors import UserError
from qat.runtime.progress import bar

_CHUNK_TOKENS = 512
"""Number of tokens whose logits exist at one time."""


class WindowScore(NamedTuple):
    """Means over the predicted tokens of one window, in nats: negative log-likelihood, and KL(teacher || model)."""

    nll: float
    kl: float | None


@dataclass(frozen=True)
class TextScore:
    """A model's score on a text.

    Args:
        perplexity: exp(nll)
        nll: mean negative log-likelihood of a token, in nats
        nll_stderr: its standard error, from the spread over the windows
        kl: mean KL(teacher || model) of a token, in nats; None where no teacher was given
        kl_stderr: its standard error
        tokens: predicted tokens
        window_nll: nll of each window: two models' differ by pairs much less than by themselves
        window_kl: kl of each window
    """

    perplexity: float
    nll: float
    nll_stderr: float
    kl: float | None
    kl_stderr: float | None
    tokens: int
    window_nll: list[float]
    window_kl: list[float]

    @classmethod
    def of(cls, scores: list[WindowScore], window: int) -> "TextScore":
        """Return the score of a text from those of its windows of ``window`` tokens each."""
        nll = [score.nll for score in scores]
        kl = [score.kl for score in scores if score.kl is not None]
        return cls(
            perplexity=math.exp(statistics.fmean(nll)),
            nll=statistics.fmean(nll),
            nll_stderr=standard_error(nll),
            kl=statistics.fmean(kl) if kl else None,
            kl_stderr=standard_error(kl) if kl else None,
            tokens=len(scores) * (window - 1),
            window_nll=[round(value, 6) for value in nll],
            window_kl=[round(value, 6) for value in kl],
        )


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of ``values``; NaN for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def perplexity(model: PreTrainedModel, windows: Tensor) -> TextScore:
    """Compute the score of ``model`` on token ids [windows, window]."""
    return TextScore.of(score_windows(model, windows), windows.shape[1])


def text_windows(paragraphs: Iterable[str], tokenizer: Tokenizer, window: int, most: int) -> Tensor:
    """Return token ids [windows, window] of a text; at most ``most`` windows if that is not 0.

    Raises UserError if the text is shorter than one window.
    """
    ids: list[int] = []
    for paragraph in paragraphs:
        ids += tokenizer(paragraph + "\n\n", add_special_tokens=False, verbose=False).input_ids
        if most and len(ids) >= most * window:
            break
    windows = min(len(ids) // window, most or len(ids))
    if windows == 0:
        raise UserError(f"The text has {len(ids)} tokens, less than one window of {window}: give more text.")
    return torch.tensor(ids[: windows * window]).view(windows, window)


@torch.inference_mode()
def score_windows(
    model: PreTrainedModel, windows: Tensor, teacher: PreTrainedModel | None = None, progress: bool = True
) -> list[WindowScore]:
    """Score ``model`` on token ids [windows, window], against its teacher if there is one."""
    scores = []
    for window in bar(windows, desc="windows", unit="window", disable=not progress):
        ids = window[None].to(model.device)
        targets = ids[0, 1:].split(_CHUNK_TOKENS)
        hidden = predicting(model, ids).split(_CHUNK_TOKENS)
        teacher_hidden = hidden if teacher is None else predicting(teacher, ids).split(_CHUNK_TOKENS)
        nll = kl = 0.0
        for states, teacher_states, labels in zip(hidden, teacher_hidden, targets, strict=True):
            log_p = output_layer(model)(states).float().log_softmax(-1)
            nll += cross_entropy(log_p, labels, reduction="sum").item()
            if teacher is not None:
                log_teacher = output_layer(teacher)(teacher_states).float().log_softmax(-1)
                kl += kl_div(log_p, log_teacher, reduction="sum", log_target=True).item()
        tokens = len(window) - 1
        scores.append(WindowScore(nll / tokens, None if teacher is None else kl / tokens))
        ranks.progress()
    return scores
