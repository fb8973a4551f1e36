"""The offline tasks are those of the harness: whole, with the right answers."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from tiny import tiny_model, tiny_tokenizer
from transformers.cache_utils import DynamicLayer

from qat.evaluate import harness, taskdata, tasks
from qat.runtime.errors import UserError

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


FIRST = {
    "boolq": ("does ethanol take more energy make that produces", "no"),
    "piqa": (
        "How do I ready a guinea pig cage",
        "Provide the guinea pig with a cage full of a few inches of bedding made of",
    ),
    "social_iqa": ("What does Tracy need to do before this?", "Find somewhere to go"),
    "hellaswag": ("Roof shingle removal: A man is sitting on a roof.", "starts pulling up roofing on a roof."),
    "winogrande": ("", "Sarah was a much better surgeon than Maria so Maria"),
    "arc_easy": ("photosynthesis is the foundation of most food webs", "Sunlight is the source of energy"),
    "arc_challenge": ("planet rotates faster after a meteorite impact", "Planetary days will become shorter."),
    "openbookqa": ("A person wants to start saving money", "quit eating lunch out"),
    "mmlu": ("Find the degree for the given field extension", "B"),
    "triviaqa": ("Which Lloyd Webber musical premiered in the US on 10th December 1993", "Sunset Boulevard"),
}
"""The first question of each, and how its right answer begins."""


@pytest.mark.parametrize("name", FIRST)
def test_a_question_and_its_answer(name):
    question, answer = FIRST[name]
    part, definition = next(iter(taskdata.parts(name).items()))
    task = harness.tasks().load([{"group": "g", "task": [{"task": part, **definition}]}])["tasks"][part]
    doc = next(iter(task.eval_docs))
    if name == "triviaqa":
        assert question in task.doc_to_text(doc)
        assert answer in task.doc_to_target(doc)
        return
    # WinoGrande has no question: the choices are two beginnings of one sentence, and its "text" is the right one.
    right = task.doc_to_text(doc) if name == "winogrande" else task.doc_to_target(doc)
    assert name == "winogrande" or question in task.doc_to_text(doc)
    assert task.doc_to_choice(doc)[int(right)].startswith(answer)


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
    assert tasks.task_names("") == []
    assert tasks.task_names("mmlu,piqa") == ["mmlu", "piqa"]
    assert tasks.task_names("piqa,paper") == ["piqa", *(name for name in tasks.METRICS if name != "piqa")]
    with pytest.raises(UserError, match="tasks='glue' is invalid"):
        tasks.task_names("glue")


TOKENS = st.lists(st.integers(0, 299), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
    contexts=st.lists(TOKENS, min_size=1, max_size=6),
    answers=st.lists(TOKENS, min_size=1, max_size=4),
    choices=st.sets(st.integers(0, 299), max_size=4),
)
@example(contexts=[[5, 6, 7], [8]], answers=[[9, 10]], choices=set())  # the shortest row has the longest answer
def test_the_answers_likelihoods_are_those_of_the_whole_logits(model_and_tokenizer, contexts, answers, choices):
    requests = [
        (("", ""), context, answer) for context in contexts for answer in [*answers, *([choice] for choice in choices)]
    ]
    ours = harness._RankedLM(*model_and_tokenizer)._loglikelihood_tokens(requests)
    model, tokenizer = model_and_tokenizer
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-5)


@pytest.mark.parametrize("name", ["boolq", "piqa", "openbookqa", "winogrande"])
def test_an_answer_is_right_where_it_is_the_right_choice(name, model_and_tokenizer, monkeypatch, capsys):
    """For each of the harness's ways to compare likelihoods: as they are, by length, without the question. In a log
    file no bar of the harness redraws itself."""
    samples, score = [], harness._score
    monkeypatch.setattr(harness, "_score", lambda metric, own: samples.extend(own) or score(metric, own))
    found = harness.run_task(*model_and_tokenizer, name, 12, taskdata.parts(name))
    said = capsys.readouterr().err
    assert "loglikelihood" in said
    assert "\r" not in said
    gold = [int(sample["doc"]["answer"]) - 1 if name == "winogrande" else int(sample["target"]) for sample in samples]
    assert [int(answer) == right for answer, right in zip(found.answers, gold, strict=True)] == [
        value == "1" for value in found.correct
    ]


def test_flips_count_what_accuracies_hide():
    before = {"correct": "1100", "answers": "0011"}
    now = {"correct": "1010", "answers": "0112"}
    assert tasks.Flips.of(before, now) == tasks.Flips(documents=4, lost=1, gained=1, changed=2)
    assert str(tasks.Flips.of(before, {"correct": "1010"})) == "2 of 4 flip (1 become wrong, 1 right)"
    with pytest.raises(UserError, match="has 4 documents, the other 2"):
        tasks.Flips.of(before, {"correct": "10"})


@pytest.fixture(scope="module")
def model_and_tokenizer(tokenizer):
    return tiny_model(), tokenizer


def test_answers_likelihoods_are_not_rounded_to_the_models_bf16_nor_decoded_by_its_folder(monkeypatch):
    """Nor does a batch of long prompts fill a KV cache, which nothing reads."""
    model = tiny_model().bfloat16()
    model.generation_config.repetition_penalty = 1.3
    lm = harness._RankedLM(model, tiny_tokenizer())
    assert model.generation_config.repetition_penalty in (None, 1.0)
    context, answer = [5, 6, 7], list(range(8, 28))
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0, 2:-1]
    expected = logits.float().log_softmax(-1)[torch.arange(20), answer].sum().item()
    monkeypatch.setattr(DynamicLayer, "update", None)
    ((found, _),) = lm._loglikelihood_tokens([(("", ""), context, answer)], disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found != float(torch.tensor(found).bfloat16())
