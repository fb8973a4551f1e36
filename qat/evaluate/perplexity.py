"""Perplexity by the GPTQ protocol, and the distance to the teacher on the same tokens.

One concatenated text is cut into windows that do not overlap; each starts without context. Of dialogues, each is a
window of its own, and only the tokens of the answers count.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from qat.quant.architecture import output_layer
from qat.quant.forward import predicting
from qat.runtime import ranks
from qat.runtime.errors import UserError
from qat.runtime.progress import bar
from qat.store.dialogues import Message, with_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

_CHUNK_TOKENS = 512
"""Number of tokens whose logits exist at one time."""


class Windows(NamedTuple):
    """The measured part of a text: windows of token ids [tokens], and a mask of the predicted tokens that count, bool
    [tokens - 1]; None if all count."""

    ids: Sequence[Tensor] | Tensor
    counted: Sequence[Tensor] | None = None


class WindowScore(NamedTuple):
    """Means over the predicted tokens of one window: negative log-likelihood and KL(teacher || model), in nats, and the
    share of them for which model and teacher have the same most likely token. With the KL of each token [tokens]."""

    nll: float
    kl: float | None
    tokens: int
    top1: float | None = None
    token_kl: Tensor | None = None


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
        window_nll: nll of each window: paired differences of two models vary much less than either model's values
        window_kl: kl of each window
        kl_p99: the KL that one token in a hundred exceeds, of all tokens
        top1: share of the tokens for which model and teacher have the same most likely token
        top1_stderr: its standard error
        window_top1: top1 of each window

    Means are over the windows. Where these have the same number of tokens, that is the mean over the tokens; of
    dialogues, each counts the same.
    """

    perplexity: float
    nll: float
    nll_stderr: float
    kl: float | None
    kl_stderr: float | None
    tokens: int
    window_nll: list[float]
    window_kl: list[float]
    kl_p99: float | None
    top1: float | None
    top1_stderr: float | None
    window_top1: list[float]

    @classmethod
    def of(cls, scores: list[WindowScore]) -> TextScore:
        """Return the score of a text from those of its windows."""
        nll = [score.nll for score in scores]
        kl = [score.kl for score in scores if score.kl is not None]
        top1 = [score.top1 for score in scores if score.top1 is not None]
        token_kl = [score.token_kl for score in scores if score.token_kl is not None]
        return cls(
            perplexity=math.exp(statistics.fmean(nll)),
            nll=statistics.fmean(nll),
            nll_stderr=standard_error(nll),
            kl=statistics.fmean(kl) if kl else None,
            kl_stderr=standard_error(kl) if kl else None,
            tokens=sum(score.tokens for score in scores),
            window_nll=[round(value, 6) for value in nll],
            window_kl=[round(value, 6) for value in kl],
            kl_p99=float(np.percentile(torch.cat(token_kl).numpy(), 99)) if token_kl else None,
            top1=statistics.fmean(top1) if top1 else None,
            top1_stderr=standard_error(top1) if top1 else None,
            window_top1=[round(value, 6) for value in top1],
        )


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of ``values``; NaN for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def perplexity(model: PreTrainedModel, windows: Tensor) -> TextScore:
    """Compute the score of ``model`` on token ids [windows, window]."""
    return TextScore.of(score_windows(model, windows))


def text_windows(paragraphs: Iterable[str], tokenizer: Callable[..., Any], window: int, most: int) -> Tensor:
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


def dialogue_windows(dialogues: list[list[Message]], tokenizer: Tokenizer, window: int, most: int) -> Windows:
    """Return dialogues, by the tokenizer's chat template, each as a window, of which the tokens of the answers count,
    and the token that ends each.

    Only the first ``window`` tokens of a dialogue are kept, and at most ``most`` dialogues if that is not 0. Raises
    UserError if no answer is left.
    """
    kept, counted = [], []
    for messages in dialogues:
        ids, written = (torch.tensor(values)[:window] for values in with_answers(tokenizer, messages))
        if written[1:].any():
            kept.append(ids)
            counted.append(written[1:])
        if len(kept) == most > 0:
            break
    if not kept:
        raise UserError(
            f"No dialogue has an answer within its first {window} tokens: give dialogues with messages of the role "
            "assistant, or a larger window."
        )
    return Windows(kept, counted)


@torch.inference_mode()
def score_windows(
    model: PreTrainedModel,
    windows: Sequence[Tensor] | Tensor,
    teacher: PreTrainedModel | None = None,
    progress: bool = True,
    counted: Sequence[Tensor] | None = None,
) -> list[WindowScore]:
    """Score ``model`` on windows, against its teacher if there is one. See ``Windows`` for ``windows`` and
    ``counted``."""
    scores = []
    for number, window in enumerate(bar(windows, desc="windows", unit="window", disable=not progress)):
        ids = window[None].to(model.device)
        rows = slice(None) if counted is None else counted[number].to(model.device)
        targets = ids[0, 1:][rows].split(_CHUNK_TOKENS)
        hidden = predicting(model, ids)[rows].split(_CHUNK_TOKENS)
        teacher_hidden = hidden if teacher is None else predicting(teacher, ids)[rows].split(_CHUNK_TOKENS)
        nll = kl = 0.0
        agreed = 0
        token_kl = []
        for states, teacher_states, labels in zip(hidden, teacher_hidden, targets, strict=True):
            log_p = output_layer(model)(states).float().log_softmax(-1)
            nll += cross_entropy(log_p, labels, reduction="sum").item()
            if teacher is not None:
                log_teacher = output_layer(teacher)(teacher_states).float().log_softmax(-1)
                parts = kl_div(log_p, log_teacher, reduction="none", log_target=True)
                kl += parts.sum().item()
                token_kl.append(parts.sum(-1).cpu())
                agreed += int((log_p.argmax(-1) == log_teacher.argmax(-1)).sum())
        tokens = sum(map(len, targets))
        if teacher is None:
            scores.append(WindowScore(nll / tokens, None, tokens))
        else:
            scores.append(WindowScore(nll / tokens, kl / tokens, tokens, agreed / tokens, torch.cat(token_kl)))
        ranks.progress()
    return scores
