"""Architectures from outside: a description in a plug-in, and the whole way through on a tiny random model.

OLMo 2 norms what attention and MLP put out, not what they read, and all heads of Q and of K together; Phi-3 has one
layer for q, k and v, and one for gate and up.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from commands import ROOT, error_of, output_of
from students import WINDOWS
from tiny import ids, tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import Olmo2Config, Phi3Config

import qat
from qat.evaluate.perplexity import perplexity
from qat.infer import simulated
from qat.ptq.smoothquant import SmoothQuant, SmoothQuantConfig, fold
from qat.ptq.stream import Stream
from qat.quant.architecture import ARCHITECTURES, Architecture, decoder_layers, head_dim, output_layer
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.quant.linear import quant_linears
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.train.distill import Distiller, TeacherTargets

PLUGINS = {
    Olmo2Config: (ROOT / "tests" / "plugin_architecture.py").read_text(),
    Phi3Config: """
from qat.quant.architecture import ARCHITECTURES, Architecture, Smoothed

ARCHITECTURES.add("phi3", Architecture(
    shared_inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    smoothed=(
        Smoothed("input_layernorm", ("self_attn.qkv_proj",)),
        Smoothed("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
))
""",
}
SAID = {Olmo2Config: {}, Phi3Config: {"pad_token_id": None, "original_max_position_embeddings": 256}}
FAMILIES = list(PLUGINS)
LINEARS = {Olmo2Config: 7, Phi3Config: 4}
QUANT = QuantConfig(4, 8, 4, kv_rotation="hadamard")


@pytest.fixture(params=FAMILIES, ids=lambda family: family.model_type)
def family(request, tmp_path, monkeypatch):
    """The family, described by a plug-in in the working directory; a tiny model of it lies in ``model``."""
    name = f"my_{request.param.model_type}"
    (tmp_path / f"{name}.py").write_text(PLUGINS[request.param])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(ARCHITECTURES, "_things", dict(ARCHITECTURES))
    tiny(request.param).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    yield request.param
    sys.modules.pop(name, None)


def tiny(family):
    return tiny_model(family, **SAID[family])


def test_it_goes_the_whole_way(family, tmp_path, monkeypatch):
    flags = ["--model=model", "--output=rtn", "--kv_rotation=hadamard"]
    assert f"{family.model_type!r}, which is not supported" in error_of(monkeypatch, "quantize", *flags)
    plugin = f"--plugin=my_{family.model_type}"
    output_of("quantize", *flags, plugin)
    text = f"--text={ROOT / 'LICENSE'}"
    output_of(
        "evaluate", "--model=rtn", "--teacher=model", text, "--window=32", "--windows=1", "--output=result.json", plugin
    )
    (score,) = json.loads((tmp_path / "result.json").read_text())["texts"].values()
    assert score["kl"] > 0.01
    assert "Verified: read back" in output_of("export", "--checkpoint=rtn", "--output=exported", text, plugin)
    described = json.loads((tmp_path / "exported" / "config.json").read_text())["quantization_config"]
    assert described["ignore"] == ["lm_head"]
    exported, simulation = qat.load("exported"), simulated.load("rtn", torch.float32)
    assert torch.equal(exported(WINDOWS).logits, simulation(WINDOWS).logits)
    trained = prepare(tiny(family), QUANT)
    assert len(quant_linears(trained)) == LINEARS[family] * trained.config.num_hidden_layers
    assert torch.equal(trained(WINDOWS).logits, simulation(WINDOWS).logits)
    asked = {"attention_mask": torch.ones(1, 6, dtype=torch.long), "max_new_tokens": 4, "do_sample": False}
    expected = simulation.generate(WINDOWS[:1, :6], use_cache=False, pad_token_id=0, **asked)
    assert torch.equal(exported.generate(WINDOWS[:1, :6], pad_token_id=0, **asked), expected)
    flags = ["--model=model", "--output=data", "--max_length=24", plugin]
    assert "supports only LLaMA-style layers" in error_of(monkeypatch, "generate", *flags)
    flags = ["--checkpoint=rtn", "--output=other", "--format=gguf", plugin]
    assert "is not mapped to GGUF" in error_of(monkeypatch, "export", *flags)


def test_it_learns(family):
    import_module(f"my_{family.model_type}")
    teacher, distiller = tiny(family), Distiller(prepare(tiny(family), QUANT))
    tokens = ids(teacher)
    with torch.no_grad():
        targets = TeacherTargets(predicting(teacher, tokens), output_layer(teacher).weight)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss, kl = distiller(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(kl.item())
    assert losses[-1] < losses[0]
    logits = teacher(WINDOWS[:1]).logits[0, :-1]
    assert perplexity(teacher, WINDOWS[:1]).nll == pytest.approx(cross_entropy(logits, WINDOWS[0, 1:]).item(), rel=1e-5)


def test_it_is_smoothed_and_streamed(family):
    import_module(f"my_{family.model_type}")
    model, folded = tiny(family), tiny(family)
    groups = ARCHITECTURES[family.model_type].smoothed
    for layer in decoder_layers(folded):
        weights = layer.state_dict()
        largest = {group: torch.rand(weights[f"{group.readers[0]}.weight"].shape[1]) + 0.1 for group in groups}
        smoothed = fold(weights, largest, dict.fromkeys(groups, 0.6), head_dim(model.config))
        assert sum(not torch.equal(smoothed[name], weights[name]) for name in weights) >= 2 * len(groups)
        layer.load_state_dict(smoothed)
    torch.testing.assert_close(folded(WINDOWS).logits, model(WINDOWS).logits, atol=2e-4, rtol=1e-4)

    tokens = ids(model)
    stream = Stream(Path("model"), QUANT, [tokens])
    stream.advance(stream.files.layer(0), {})
    expected = prepare(model, QUANT)(tokens, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(stream.hidden[0], expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_described_is_refused(family):
    described = import_module(f"my_{family.model_type}").ARCHITECTURES[family.model_type]
    ARCHITECTURES._things[family.model_type] = Architecture(shared_inputs=described.shared_inputs)
    with pytest.raises(UserError, match="has no such layers: give kv_site=post_rope"):
        prepare(tiny(family), QuantConfig(kv_site="pre_rope"))
    with pytest.raises(UserError, match="give method=rtn"):
        SmoothQuant(Path("model"), SmoothQuantConfig())
    ARCHITECTURES._things[family.model_type] = Architecture(shared_inputs=(("self_attn.query",),))
    with pytest.raises(UserError, match=r"names 'self_attn.query' as a Linear layer, and the model has no such module"):
        prepare(tiny(family), QuantConfig())
