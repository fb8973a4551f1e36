"""The vLLM engine against a real vLLM: ``pytest -m vllm``, in an environment that has it."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from datagen.generate import Beginnings, GenerateConfig, Vocabulary, write_sequences

pytestmark = pytest.mark.vllm

SETTINGS = {"sequences": 24, "max_length": 40, "batch_size": 8, "sequences_per_shard": 24}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """vLLM's CPU attention wants heads of 32 or more."""
    directory = tmp_path_factory.mktemp("vllm") / "model"
    tiny_model(num_attention_heads=4, num_key_value_heads=2, head_dim=32).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def vocabulary(directory):
    return Vocabulary(start=list(range(20, 300)), prefix=[0], stop=list(range(1, 8)))


@pytest.fixture(scope="module")
def engine(directory):
    pytest.importorskip("vllm", reason="run it with the environment's own python")
    from datagen.vllm_engine import VllmEngine

    return VllmEngine(str(directory), torch.float32, GenerateConfig(**SETTINGS, engine="vllm"))


def write(engine, vocabulary, **settings):
    config = GenerateConfig(**SETTINGS, **settings)
    steps = []
    rows = engine.write_sequences(vocabulary, config, range(24), lambda *counts: steps.append(counts))
    assert sum(map(sum, steps)) == 24 * (config.max_length - 1), "the progress adds up to the whole"
    return rows


def test_greedy_sequences_are_those_of_our_engine(engine, directory, vocabulary):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = write_sequences(model, vocabulary, GenerateConfig(**SETTINGS, strategy="top1"), range(24))
    assert write(engine, vocabulary, strategy="top1") == ours


def test_hybrid_is_greedy_first_then_sampled_to_the_first_stop_token(engine, directory, vocabulary):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = write(engine, vocabulary, strategy="hybrid")
    begin = Beginnings.of(vocabulary, GenerateConfig(**SETTINGS), range(24))
    agreement = []
    for row, given in zip(rows, begin.prefix, strict=True):
        tokens = torch.tensor(row.input_ids)
        assert row.input_ids[:2] == given
        with torch.inference_mode():
            logits = model(tokens[None, :-1]).logits[0]
        greedy = (logits.argmax(-1) == tokens[1:])[1:]
        assert greedy[: row.greedy_tokens].all()
        agreement += greedy[row.greedy_tokens :].tolist()
        assert not set(vocabulary.stop) & set(row.input_ids[2:-1])
        assert (row.finish == "eos") == (row.input_ids[-1] in vocabulary.stop)
        assert (row.finish == "eos") or len(row.input_ids) == 40
        if row.surprisal is not None:
            logp = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
            assert row.surprisal == pytest.approx(-logp[1 + row.greedy_tokens :].sum().item(), abs=1e-2)
    assert sum(agreement) < 0.9 * len(agreement)
    assert {row.finish for row in rows} == {"eos", "length"}


def test_surprisal_is_of_the_distribution_that_is_drawn_from(engine, directory, vocabulary):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for row in write(engine, vocabulary, strategy="sample", temperature=0.5, top_k=20):
        tokens = torch.tensor(row.input_ids)
        with torch.inference_mode():
            logits = model(tokens[None, :-1]).logits[0] / 0.5
        logits = logits.masked_fill(logits < logits.topk(20).values[:, -1:], -torch.inf)
        logp = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        assert row.surprisal == pytest.approx(-logp[1:].sum().item(), abs=2e-2)


def test_a_seed_is_a_result(engine, vocabulary):
    assert write(engine, vocabulary, strategy="sample") == write(engine, vocabulary, strategy="sample")
    assert write(engine, vocabulary, strategy="sample") != write(engine, vocabulary, strategy="sample", seed=1)
