"""llama.cpp itself, on GGUF files that our exporter writes: its KV cache is ours, byte by byte."""

import json

import pytest
import torch
from commands import ROOT
from students import write_student
from tiny import tiny_model, tiny_tokenizer
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from launch import evaluate
from qat.evaluate import llama_cpp
from qat.evaluate.llama_cpp import Engine
from qat.export import export
from qat.export.formats import GGUF
from qat.infer.integer_cache import IntegerCache
from qat.quant.config import QuantConfig
from qat.quant.kv_cache import KVQuantizer
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.store import gguf_files

PROMPT, LENGTH, HEADS, KV_HEADS, LAYERS = 16, 20, 4, 2, 2
TOKENS = torch.randint(2, 300, (LENGTH,), generator=torch.Generator().manual_seed(0))
SERVED = [
    (LlamaConfig, 64, "ggml_q8_0/ggml_q4_0"),
    (LlamaConfig, 128, "ggml_q4_0"),
    (LlamaConfig, 96, "ggml_q5_0"),  # which llama.cpp does not rotate
    (Qwen2Config, 64, "ggml_q5_0/ggml_q5_1"),
    (Qwen2Config, 64, "ggml_q5_1/ggml_q8_0"),
    (Qwen3Config, 128, "ggml_iq4_nl/ggml_q4_1"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a GGUF file, by family and head size."""
    made = {}

    def export_once(family, head_dim):
        if (family, head_dim) not in made:
            folder = tmp_path_factory.mktemp("gguf")
            student = write_student(
                folder / "final", QuantConfig(8, 8, 16), config_class=family, head_dim=head_dim, hidden_size=256
            )
            export.export(student, folder / "export", GGUF)
            made[family, head_dim] = folder / "export"
        return made[family, head_dim]

    return export_once


def settings(name: str) -> QuantConfig:
    keys = name.split("/")[0].removeprefix("ggml_")
    return QuantConfig(16, 16, 8 if keys == "q8_0" else 5 if keys[:2] == "q5" else 4, kv_format=name)


def as_row(packed: torch.Tensor) -> torch.Tensor:
    """The engine's order: all heads of a token, [tokens, bytes], of [1, kv_heads, tokens, bytes]."""
    return packed[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("family", "head_dim", "name"), SERVED)
def test_cache_and_attention_are_llama_cpps(family, head_dim, name, exported):
    """A prompt, then token by token: from the engine's own queries, keys and values our bytes are its cache, and our
    attention is its attention. From token ids our own model's codes are its codes but for 8-bit activations."""
    (keys, values), folder = settings(name).kv_formats, exported(family, head_dim)
    parts = {part: [[] for _ in range(LAYERS)] for part in ("Qcur", "Kcur", "Vcur", "kqv_out")}
    with Engine(folder / gguf_files.FILE, LENGTH, keys.type, values.type, watched=True) as engine:
        for batch in (TOKENS[:PROMPT], *TOKENS[PROMPT:].split(1)):
            seen = engine.tensors(batch, [f"{part}-{layer}" for part in parts for layer in range(LAYERS)])
            for part, layers in parts.items():
                for layer, found in enumerate(layers):
                    found.append(seen[f"{part}-{layer}"].reshape(len(batch), -1, head_dim))
        stored = engine.cache()
    kv = KVQuantizer(keys, values)  # the engine's own channels are in its order already
    for layer in range(LAYERS):
        query, key, value, out = (torch.cat(found[layer]).transpose(0, 1)[None] for found in parts.values())
        assert query.shape[1] == HEADS
        assert key.shape[1] == KV_HEADS
        assert torch.equal(as_row(kv.encode_key(key)), stored[layer].keys)
        assert torch.equal(as_row(kv.encode_value(value)), stored[layer].values)
        ours = scaled_dot_product_attention(
            kv.query(query).float(), kv.key(key), kv.value(value).float(), is_causal=True, enable_gqa=True
        )
        # q4_1 and q5_1 keys: the part of the minimum goes through an fp16 sum of the query.
        tolerance = 1e-3 if keys.type.endswith("_1") else 1e-5
        assert (ours - out).abs().max() < tolerance * out.abs().max()
    model = prepare(gguf_files.load(folder), settings(name))
    cache = IntegerCache(model)
    model(TOKENS[None], past_key_values=cache)
    for own, theirs in ((cache.layers[0].keys, stored[0].keys), (cache.layers[0].values, stored[0].values)):
        form = keys if own is cache.layers[0].keys else values
        read = [form.decode(part[None, None], 1, torch.float32) for part in (as_row(own), theirs)]
        assert (read[0] - read[1]).square().mean() < 0.01 * read[1].square().mean()


def test_a_query_in_full_precision_is_not_llama_cpps(exported):
    """What rounds queries to 8 bits is seen."""
    keys, values = settings("ggml_q4_0").kv_formats
    with Engine(exported(LlamaConfig, 64) / gguf_files.FILE, LENGTH, "q4_0", "q4_0", watched=True) as engine:
        seen = engine.tensors(TOKENS, ["Qcur-0", "Kcur-0", "Vcur-0", "kqv_out-0"])
    query, key, value, out = (part.reshape(LENGTH, -1, 64).transpose(0, 1)[None] for part in seen.values())
    kv = KVQuantizer(keys, values)
    found = scaled_dot_product_attention(
        keys.keys(query), kv.key(key), kv.value(value), is_causal=True, enable_gqa=True
    )
    assert (found - out).abs().max() > 1e-4 * out.abs().max()


def test_logits_are_of_every_token_and_do_not_depend_on_batches(exported):
    with Engine(exported(LlamaConfig, 64) / gguf_files.FILE, LENGTH, "q8_0", "q4_0") as engine:
        whole = engine.logits(TOKENS)
        engine.forget()
        pieces = torch.cat([engine.logits(batch) for batch in TOKENS.split(7)])
    assert torch.equal(whole, pieces)
    with Engine(exported(LlamaConfig, 64) / gguf_files.FILE, LENGTH, "q8_0", "q4_0", watched=True) as engine:
        engine.tensors(TOKENS, ["kqv_out-0"])
        engine.forget()
        assert torch.equal(engine.logits(TOKENS), whole), "being watched changes nothing"
    expected = gguf_files.load(exported(LlamaConfig, 64))(TOKENS[None]).logits[0]
    assert (whole - expected).square().mean() < 0.1 * expected.var(), "but for 8-bit activations and the cache"


def test_refusals(exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"llama\.cpp does not load"):
        Engine(tmp_path / "none.gguf", 8)
    monkeypatch.setattr(llama_cpp.importlib.metadata, "version", lambda name: "2025.1.1")
    llama_cpp.library.cache_clear()
    with pytest.raises(UserError, match=r"xllamacpp 2025\.1\.1 is installed, but version 2026"):
        llama_cpp.library()
    llama_cpp.library.cache_clear()


def test_evaluate_measures_what_llama_cpp_serves_beside_the_simulation(tmp_path, monkeypatch, capsys):
    quant = QuantConfig(8, 8, 8, kv_format="ggml_q8_0/ggml_q4_0")
    write_student(tmp_path / "final", quant, head_dim=64)
    tiny_model(head_dim=64).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    flags = [f"--model={tmp_path / 'final'}", f"--teacher={tmp_path / 'teacher'}", f"--text={ROOT / 'LICENSE'}"]
    flags += ["--window=64", "--windows=4", f"--output={tmp_path / 'found.json'}", "--engine=llama.cpp"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    evaluate.main()
    assert "with a cache of q8_0 keys and q4_0 values" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["served"]["file_MB"] > 0.1
    assert found["served"]["tokens_per_second"]["q8_0/q4_0"] > 0
    served, simulated = found["texts"].values()
    assert served["tokens"] == simulated["tokens"] == 4 * 63
    assert served["nll"] != simulated["nll"]
    assert served["nll"] == pytest.approx(simulated["nll"], abs=0.1)
    assert served["kl"] == pytest.approx(simulated["kl"], abs=0.1)


@pytest.mark.parametrize(
    ("quant", "types"),
    [
        (QuantConfig(), ("f16", "f16")),
        (QuantConfig(kv_format="vllm_int4"), ("f16", "f16")),
        (QuantConfig(kv_format="ggml_q4_0"), ("q4_0", "q4_0")),
        (QuantConfig(kv_format="ggml_q4_0", kv_bits=16), ("f16", "f16")),
        (QuantConfig(kv_format="ggml_q4_0", overrides={"*.0.*": {"kv_bits": 16}}), ("f16", "f16")),
    ],
)
def test_types_are_those_of_the_student(quant, types):
    assert llama_cpp.types_of(quant) == types
