"""The paper's tasks, run by lm-evaluation-harness with its own prompts.

Every document's outcome is kept: two models' accuracies on the same documents are compared in pairs, which separates
them much better than their standard errors do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import GenerationConfig

from qat.evaluate.perplexity import standard_error
from qat.evaluate.tasks import FEW_SHOT, METRICS
from qat.runtime import ranks
from qat.runtime.errors import UserError
from qat.runtime.progress import bar
from qat.store import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

_SHOTS = 5
_BATCH = {"cpu": 8, "cuda": 32}
_LONGEST_ANSWER = 64
"""Most tokens generated for a TriviaQA answer that does not end; the harness's 256 take minutes on a CPU with a broken
model that never ends one. 7 of 77,591 right answers are longer in SmolLM2's tokens."""


@dataclass(frozen=True)
class TaskScore:
    """A model's score on a task.

    Args:
        metric: the harness's name of the metric that is reported
        accuracy: its mean
        stderr: its standard error
        documents: how many questions
        others: the means of the harness's other metrics
        correct: "1" or "0" for each document, in order
        answers: the answer to each document: the number of the choice, as one digit, or what was written
    """

    metric: str
    accuracy: float
    stderr: float
    documents: int
    others: dict[str, float]
    correct: str
    answers: str | list[str]


def run_task(
    model: PreTrainedModel, tokenizer: Tokenizer, name: str, limit: int, parts: dict[str, dict[str, Any]]
) -> TaskScore | None:
    """Score ``model`` on a task; the ranks share the documents, and all but the first get None.

    Args:
        limit: documents, spread evenly over the parts; 0 for all
        parts: the harness's tasks that it consists of (MMLU: one for each subject), each with changes to its
            definition, which determine where its data come from

    Raises UserError if ``limit`` leaves a rank without a document of some part.
    """
    most = math.ceil(limit / len(parts))
    if 0 < most < ranks.count():  # the harness needs a document of every part on every rank
        raise UserError(
            f"limit={limit} gives {name} {most} documents for each of its {len(parts)} parts, too few for "
            f"{ranks.count()} ranks: give 0, {len(parts) * ranks.count()} or more, or fewer ranks."
        )
    shots = {"num_fewshot": _SHOTS if name in FEW_SHOT else 0}
    bars = partial(bar, disable=dist.is_initialized() and dist.get_rank() > 0)
    for module in (huggingface, lm_eval.api.model, lm_eval.api.task):
        module.tqdm = bars  # the harness's own would fill a log file
    results = simple_evaluate(
        model=_RankedLM(model, tokenizer),
        # In a group, a task inherits from the registered task of its name.
        tasks=[{"group": name, "task": [{"task": part, **shots, **_metrics(name), **parts[part]} for part in parts]}],
        task_manager=tasks(),
        limit=most or None,
        bootstrap_iters=0,
    )
    if results is None:
        return None
    samples = [sample for part in parts for sample in sorted(results["samples"][part], key=lambda s: s["doc_id"])]
    return _score(METRICS[name], samples)


def hub_parts(name: str) -> dict[str, dict[str, Any]]:
    """Return the parts of a task with the data sets that the harness fetches from the hub."""
    subjects = Path(lm_eval.__file__).parent.glob("tasks/mmlu/default/mmlu_*.yaml")
    return {part: {} for part in (sorted(file.stem for file in subjects) if name == "mmlu" else [name])}


@cache
def tasks() -> TaskManager:
    """Return the harness's tasks; reading their index takes seconds."""
    return TaskManager()


class _RankedLM(HFLM):
    """A model in memory, on every rank that the launcher started."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer):
        # All decode alike: not by what the folder of a full-precision model says of sampling and penalties.
        model.generation_config = GenerationConfig.from_model_config(model.config)
        # Log-probabilities and their sums in bf16 would be off by up to half a nat.
        how: dict[str, Any] = {"batch_size": _BATCH[model.device.type], "softmax_dtype": torch.float32}
        super().__init__(pretrained=model, tokenizer=tokenizer, **how)
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), ranks.count()
        self._longest = 0

    @property
    def max_gen_toks(self) -> int:
        return _LONGEST_ANSWER

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self._longest = max((len(continuation) for _, _, continuation in requests), default=0)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        """Compute logits of the last positions only, [batch, positions, vocabulary], from which the harness takes the
        answers': those of a batch's complete 5-shot prompts take gigabytes, as a KV cache would."""
        ranks.progress()
        models.check_ids(self.model.config, int(inps.max()), "A task")
        positions = torch.arange(1, inps.shape[1] + 1, device=inps.device)
        shortest = int((positions * (inps != 0)).amax(dim=1).min())  # the harness pads with zeros, on the right
        needed = self._longest + inps.shape[1] - shortest
        with torch.no_grad():
            return self.model(inps, logits_to_keep=needed, use_cache=False).logits

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        ranks.progress()
        models.check_ids(self.model.config, int(context.max()), "A task")
        return super()._model_generate(context, *args, **kwargs)

    def all_gather(self, tensor: Tensor) -> Tensor:
        ranks.meet("all ranks have their requests")
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, tensor.cpu())
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.world_size > 1:
            ranks.meet("all ranks have their scores")
        return super().gather_object(obj, dst)

    def barrier(self) -> None:
        ranks.meet("all ranks have answered their requests")


def _metrics(name: str) -> dict[str, Any]:
    if METRICS[name] != "acc_mutual_info":
        return {}
    metrics = ("acc", "acc_norm", "acc_mutual_info")
    return {"metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]}


def _score(metric: str, samples: list[dict[str, Any]]) -> TaskScore:
    correct = [float(sample[metric]) for sample in samples]
    others = {name for name in samples[0]["metrics"] if name != metric}
    return TaskScore(
        metric=metric,
        accuracy=sum(correct) / len(correct),
        stderr=standard_error(correct),
        documents=len(correct),
        others={name: sum(float(sample[name]) for sample in samples) / len(samples) for name in sorted(others)},
        correct="".join(str(int(value)) for value in correct),
        answers=_answers(metric, samples),
    )


def _answers(metric: str, samples: list[dict[str, Any]]) -> str | list[str]:
    """Return the answers to all documents: by the likelihood that the metric compares, or as they were written."""
    if metric == "exact_match":
        return [str(sample["filtered_resps"][0]).strip() for sample in samples]
    return "".join(str(_choice(metric, sample)) for sample in samples)


def _choice(metric: str, sample: dict[str, Any]) -> int:
    """Return the number of the most likely choice, as the harness's own ``metric`` finds it."""
    scores = [response[0] for response in sample["filtered_resps"]]
    if metric == "acc_mutual_info":  # the second half are the likelihoods without the question
        half = len(scores) // 2
        scores = [given - alone for given, alone in zip(scores[:half], scores[half:], strict=True)]
    if metric == "acc_norm":  # by the characters of the choice, without the space in front of it
        scores = [score / (len(pair[1]) - 1) for score, pair in zip(scores, sample["arguments"], strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)
