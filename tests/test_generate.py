import shutil
import sys

import pyarrow.parquet as pq
import pytest
import torch
from commands import error_of, generate_flags, run_python
from compiler import needs_compiler
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from datagen import attention
from datagen.cuda_graphs import rounded_up
from datagen.decoder import Decoder
from datagen.generate import GenerateConfig, Vocabulary, write_sequences
from datagen.sampling import Truncation, choose
from qat.data.shards import ShardFolder
from qat.runtime.errors import UserError

CONFIG = GenerateConfig(sequences=11, max_length=20, batch_size=4, sequences_per_shard=11)
VOCABULARY = Vocabulary(start=list(range(20, 300)), prefix=[], stop=list(range(1, 20)))
"""Many tokens end a sequence, so that slots end at different times."""


def write(config=CONFIG, vocabulary=VOCABULARY, **model_changes):
    return write_sequences(tiny_model(**model_changes), vocabulary, config, range(config.sequences))


@pytest.mark.parametrize("kernel", ["ours", "torch's"])
@pytest.mark.parametrize(
    ("family", "heads"),
    [
        (LlamaConfig, (4, 2, 16)),
        (MistralConfig, (6, 2, 32)),
        (Qwen2Config, (9, 1, 64)),
        (Qwen3Config, (5, 1, 128)),
        (LlamaConfig, (4, 4, 24)),
    ],
)
def test_a_decoding_step_equals_the_models_own_forward(kernel, family, heads, monkeypatch):
    """Slots at different positions; 24 is no size for our kernel, which leaves such heads to torch."""
    if kernel == "torch's":
        monkeypatch.setattr(attention, "kernel", lambda *sizes: None)
    elif heads[-1] % 16 == 0:
        needs_compiler()
        assert attention.kernel(heads[2], heads[0] // heads[1]) is not None
    query, kv, size = heads
    sizes = {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": size, "hidden_size": query * size}
    model = tiny_model(family, **sizes)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias)
    tokens = torch.randint(0, 300, (5, 40))
    start = torch.tensor([0, 3, 17, 19, 20])
    with torch.inference_mode():
        expected = model(tokens).logits
    decoder = Decoder(model, 5, 40)
    rows = torch.arange(5)
    for step in range(-20, 20):
        position = (start + step).clamp(0)
        logits = decoder.step(tokens[rows, position], position).logits
        torch.testing.assert_close(logits, expected[rows, position], rtol=0, atol=2e-5 * expected.abs().max())


def test_attention_may_read_further_than_it_must(monkeypatch):
    """A CUDA graph reads so many columns for all positions up to them."""
    monkeypatch.setattr(attention, "kernel", lambda *sizes: None)
    decoder, tokens, position = Decoder(tiny_model(), 3, 300), torch.tensor([5, 6, 7]), torch.tensor([0, 2, 0])
    assert [rounded_up(columns, 300) for columns in (1, 128, 129, 299)] == [128, 128, 256, 300]
    with torch.inference_mode():
        expected = decoder.logits(tokens, position, 3)
        for columns in (128, 300):
            torch.testing.assert_close(decoder.logits(tokens, position, columns), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and QAT_TEST_GPU=1")
@pytest.mark.parametrize("head_dim", [16, 64])
def test_cuda_graphs_decode_what_eager_steps_decode(head_dim):
    """As far as bf16 tells: while a graph is captured, cuBLAS may take other algorithms. A replay gives the same bits,
    and the tokens are those of its logits. With our attention, for heads of 64, there is one graph."""
    model = tiny_model(max_position_embeddings=512, head_dim=head_dim).to("cuda", torch.bfloat16)
    decoder = Decoder(model, 4, 300, Truncation(0.8, 50, 0.9))
    assert decoder.graphs is not None
    assert all(bool(layer.attention.triton) == (head_dim == 64) for layer in decoder.layers)
    greedy, draw = torch.tensor([True, False, False, False]), torch.rand(4, dtype=torch.float64)
    tokens = torch.tensor([5, 6, 7, 8])
    for place in (0, 1, 5, 127, 128, 130, 299):
        position = torch.full_like(tokens, place)
        captured = decoder.step(tokens, position).logits.clone()
        chosen, surprisal, replayed = decoder.step(tokens, position, greedy, draw)
        assert torch.equal(captured, replayed)
        expected = choose(replayed, greedy.cuda(), draw.cuda(), decoder.truncation)
        assert torch.equal(chosen, expected[0].cpu())
        assert torch.equal(surprisal, expected[1].cpu())
        with torch.inference_mode():
            eager = decoder.logits(tokens.cuda(), position.cuda(), rounded_up(place + 1, 300))
        assert (captured - eager).norm() < 0.05 * eager.norm()
    assert len(decoder.graphs._captured) == (1 if head_dim == 64 else 3)


@pytest.mark.parametrize("prefix", [[], [0]])
def test_greedy_decoding_equals_the_full_forward(prefix):
    vocabulary = Vocabulary(VOCABULARY.start, prefix, VOCABULARY.stop)
    config = GenerateConfig(sequences=11, max_length=20, batch_size=4, strategy="top1")
    model = tiny_model()
    for sequence in write_sequences(model, vocabulary, config, range(11)):
        tokens = torch.tensor([sequence.input_ids])
        first = len(prefix) + 1
        assert sequence.input_ids[:first] == [*prefix, sequence.start_token]
        assert model(tokens).logits[0, first - 1 : -1].argmax(-1).tolist() == sequence.input_ids[first:]


def test_hybrid_is_greedy_first_and_then_not():
    model = tiny_model()
    agreement = []
    for sequence in write():
        tokens = torch.tensor([sequence.input_ids])
        greedy = model(tokens).logits[0, :-1].argmax(-1) == tokens[0, 1:]
        assert greedy[: sequence.greedy_tokens].all()
        agreement += greedy[sequence.greedy_tokens :].tolist()
    assert sum(agreement) < 0.9 * len(agreement)


def test_batching_and_refilling_do_not_change_a_sequence():
    together = write()
    assert {s.finish for s in together} == {"eos", "length"}
    alone = write(GenerateConfig(sequences=11, max_length=20, batch_size=1))
    assert together == alone


def test_a_sequence_ends_at_its_first_stop_token():
    stop = set(VOCABULARY.stop)
    for sequence in write():
        assert not stop & set(sequence.input_ids[:-1])
        assert (sequence.input_ids[-1] in stop) == (sequence.finish == "eos")


def test_where_no_token_ends_a_text_its_length_does(tmp_path):
    tiny_model(eos_token_id=None).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    vocabulary = Vocabulary.of(tokenizer, str(tmp_path))
    assert vocabulary.stop == []
    assert {(len(s.input_ids), s.finish) for s in write(vocabulary=vocabulary)} == {(CONFIG.max_length, "length")}


def test_sampling_from_one_token_is_greedy():
    one = GenerateConfig(sequences=11, max_length=20, batch_size=4, strategy="sample", top_k=1, temperature=3.0)
    top1 = GenerateConfig(sequences=11, max_length=20, batch_size=4, strategy="top1")
    assert [s.input_ids for s in write(one)] == [s.input_ids for s in write(top1)]


@pytest.mark.parametrize("strategy", ["hybrid", "top1"])
def test_a_model_that_predicts_nan_is_refused(strategy):
    model = tiny_model()
    model.model.norm.weight.data.fill_(torch.inf)
    config = GenerateConfig(sequences=4, max_length=20, strategy=strategy)
    with pytest.raises(UserError, match=r"predicts NaN: .* overflow in float32"):
        write_sequences(model, VOCABULARY, config, range(4))


def test_surprisal_is_that_of_the_sampled_tokens():
    model = tiny_model()
    for sequence in write():
        tokens = torch.tensor(sequence.input_ids)
        with torch.inference_mode():
            logp = model(tokens[None, :-1]).logits[0].log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        expected = -logp[sequence.greedy_tokens :].sum().item()
        assert sequence.surprisal is None or abs(sequence.surprisal - expected) < 1e-3
        assert (sequence.surprisal is None) == (len(tokens) == 1 + sequence.greedy_tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "top1", "temperature": 0.5}, "does not sample"),
        ({"strategy": "top1", "top_k": 5}, "does not sample"),
        ({"temperature": 0.0}, "strategy=top1"),
        ({"top_p": 0.0}, "above 0"),
        ({"top_p": 1.5}, "above 0"),
        ({"top_k": -1}, "0 or more"),
        ({"engine": "tgi"}, "torch or vllm"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GenerateConfig(**settings)


def test_missing_and_truncated_shards_are_made_again_with_the_same_bytes(tiny_directory, tiny_data, tmp_path):
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    files = ShardFolder(folder).shards()
    assert len(files) == 3
    original = {file.name: file.read_bytes() for file in files}
    files[1].unlink()
    files[2].write_bytes(original[files[2].name][:-20])
    run_python("generate", *generate_flags(tiny_directory, folder))
    assert {file.name: file.read_bytes() for file in ShardFolder(folder).shards()} == original


def test_a_folder_whose_model_was_not_loaded_is_claimed_by_none(tiny_directory, tmp_path, monkeypatch):
    """What the sentence asks for, another engine, finds it free."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    flags = generate_flags(tiny_directory, tmp_path / "data")
    assert "or use engine=torch" in error_of(monkeypatch, "generate", *flags, "--engine=vllm")
    assert not (tmp_path / "data").exists()


def test_shards_are_plain_parquet(tiny_data):
    rows = [row for file in ShardFolder(tiny_data).shards() for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 12
    assert all(row["input_ids"][:2] == [0, row["start_token"]] for row in rows)


def test_a_truncated_shard_is_named(tiny_data, tmp_path):
    folder = ShardFolder(shutil.copytree(tiny_data, tmp_path / "data"))
    broken = folder.path(2)
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(UserError, match=broken.name):
        folder.sequences()


def test_an_unfinished_folder_is_named(tiny_data, tmp_path):
    folder = ShardFolder(shutil.copytree(tiny_data, tmp_path / "data"))
    folder.path(1).unlink()
    with pytest.raises(UserError, match="8 of its 12 sequences"):
        folder.sequences()


def test_a_folder_of_other_settings_is_refused(tmp_path):
    ShardFolder(tmp_path).begin({"seed": 0, "strategy": "hybrid"})
    ShardFolder(tmp_path).begin({"seed": 0, "strategy": "hybrid"})
    with pytest.raises(UserError, match="seed was 0, now 1"):
        ShardFolder(tmp_path).begin({"seed": 1, "strategy": "hybrid"})
