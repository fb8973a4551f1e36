import json

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_prepare import ids
from transformers import AutoModelForCausalLM

from qat import export, models
from qat.errors import UserError
from qat.prepare import QuantConfig, prepare
from qat.quantizers import Format, quantize

SETTINGS = [QuantConfig(4, 8, 4), QuantConfig(8, 8, 16), QuantConfig(3, 6, 8, kv_rotation="hadamard")]


@pytest.fixture
def save(tmp_path):
    """Write a student as a training run does; its folder."""

    def save_student(quant, dtype=torch.float32, **how):
        directory = tmp_path / "final"
        tiny_model().to(dtype).save_pretrained(directory, **how)
        quant.save(directory)
        return directory

    return save_student


@pytest.mark.parametrize("quant", SETTINGS, ids=str)
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "100KB"}], ids=["one file", "several files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reloaded_equals_in_memory(quant, how, dtype, save, tmp_path):
    directory = save(quant, dtype, **how)
    export.export(directory, tmp_path / "export")
    in_memory = prepare(models.load(str(directory), dtype), quant)  # not frozen: as it is trained
    reloaded = export.load(str(tmp_path / "export"), dtype)
    assert torch.equal(reloaded(ids(reloaded)).logits, in_memory(ids(in_memory)).logits)


def test_stores_our_codes_and_scales(save, tmp_path):
    export.export(save(QuantConfig(4, 8, 4)), tmp_path / "export")
    stored = load_file(tmp_path / "export" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    codes, (scale, _) = quantize(tiny_model().get_parameter(f"{name}.weight"), Format(4))
    assert torch.equal(stored[f"{name}.weight"], codes)
    assert torch.equal(stored[f"{name}.weight_scale"], scale)
    assert stored["model.embed_tokens.weight"].dtype == torch.float32


def test_transformers_own_loader_reads_it(save, tmp_path):
    """The weights are the same; activations it rounds to max/127.5, not max/127, so the logits are only close."""
    export.export(save(QuantConfig(4, 8, 16)), tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    ours, full = export.load(str(tmp_path / "export"), torch.float32), tiny_model()
    tokens = ids(full)
    distance = (theirs(tokens).logits - ours(tokens).logits).abs().mean()
    assert distance < 0.1 * (ours(tokens).logits - full(tokens).logits).abs().mean()
    for name, weight in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(name), weight), name


def test_refuses_what_it_cannot_export(save, tmp_path):
    with pytest.raises(UserError, match="w_bits=16"):
        export.export(save(QuantConfig(16, 8, 4)), tmp_path / "export")
    with pytest.raises(UserError, match="a_bits=16"):
        export.export(save(QuantConfig(4, 16, 4)), tmp_path / "export")
    existing = tmp_path / "there"
    existing.mkdir()
    with pytest.raises(UserError, match="is there already"):
        export.export(save(QuantConfig()), existing)
    plain = tmp_path / "plain"
    tiny_model().save_pretrained(plain)
    with pytest.raises(UserError, match="no trained student"):
        export.export(plain, tmp_path / "export")


def test_config_says_what_the_bits_are(save, tmp_path):
    export.export(save(QuantConfig(4, 8, 4)), tmp_path / "export")
    group = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert group["group_0"]["weights"]["num_bits"] == 4
    assert group["group_0"]["input_activations"]["strategy"] == "token"
