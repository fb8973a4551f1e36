"""The offline tasks are those of the harness: whole, with the right answers."""

import pytest

from datagen import taskdata
from qat import harness
from qat.errors import UserError

SIZES = {
    "boolq": 3270,
    "piqa": 1838,
    "social_iqa": 1954,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "triviaqa": 7993,
}
"""Questions of the evaluation splits, as published."""


@pytest.mark.parametrize("name", ["boolq", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande"])
def test_a_question_and_its_answer(name):
    question, choices, answer = {
        "boolq": ("does ethanol take more energy make that produces", ["no", "yes"], "no"),
        "piqa": ("guinea pig cage", None, None),
        "arc_easy": ("photosynthesis is the foundation of most food webs", None, "Sunlight is the source of energy"),
        "arc_challenge": (
            "planet rotates faster after a meteorite impact",
            None,
            "Planetary days will become shorter.",
        ),
        "openbookqa": ("A person wants to start saving money", None, "quit eating lunch out"),
        "winogrande": ("", None, None),
    }[name]
    part = {"task": name, **taskdata.parts(name)[name]}
    task = harness.tasks().load([{"group": "g", "task": [part]}])["tasks"][name]
    doc = next(iter(task.eval_docs))
    assert question in str(task.doc_to_text(doc))
    offered = task.doc_to_choice(doc)
    if choices:
        assert offered == choices
    if answer:
        assert offered[task.doc_to_target(doc)].startswith(answer)


@pytest.mark.parametrize("name", SIZES)
def test_the_whole_evaluation_split(name):
    definition = taskdata.parts(name)[name]
    splits = definition["custom_dataset"]()
    assert len(splits[definition["test_split"] or definition["validation_split"]]) == SIZES[name]


def test_mmlu_is_whole():
    parts = taskdata.parts("mmlu")
    assert parts.keys() == set(harness.hub_parts("mmlu"))
    splits = [part["custom_dataset"]() for part in parts.values()]
    assert sum(len(split["test"]) for split in splits) == 14042
    assert all(len(split["dev"]) == 5 for split in splits)


def test_a_list_of_tasks():
    assert harness.task_names("") == []
    assert harness.task_names("mmlu,piqa") == ["mmlu", "piqa"]
    assert harness.task_names("piqa,paper") == ["piqa", *(name for name in harness.METRICS if name != "piqa")]
    with pytest.raises(UserError, match="tasks='glue' is not possible"):
        harness.task_names("glue")
