import pytest
import torch
from tiny import FAMILIES, ids, tiny_model
from transformers import GPTNeoXConfig

from qat.quant.config import QuantConfig
from qat.quant.linear import quant_linears
from qat.quant.prepare import freeze, prepare
from qat.runtime.errors import UserError


def test_sixteen_everywhere_changes_nothing():
    model, teacher = tiny_model(), tiny_model()
    prepare(model, QuantConfig(16, 16, 16))
    assert not quant_linears(model)
    assert torch.equal(model(ids(model)).logits, teacher(ids(model)).logits)


@pytest.mark.parametrize("config_class", FAMILIES)
def test_every_family_is_quantized_in_all_its_blocks(config_class):
    model = tiny_model(config_class)
    full = model(ids(model)).logits
    prepare(model, QuantConfig(4, 8, 4))
    assert len(quant_linears(model)) == 7 * model.config.num_hidden_layers
    low = model(ids(model)).logits
    assert low.isfinite().all()
    assert not torch.equal(low, full)
    freeze(model)
    assert torch.equal(model(ids(model)).logits, low)


def test_finer_bits_come_closer():
    teacher = tiny_model()
    full = teacher(ids(teacher)).logits
    errors = []
    for bits in (2, 4, 6, 8):
        model = prepare(tiny_model(), QuantConfig(bits, bits, bits))
        errors.append((model(ids(model)).logits - full).abs().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_names_and_state_dict_stay():
    model, plain = prepare(tiny_model(), QuantConfig()), tiny_model()
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_config_round_trip(tmp_path):
    config = QuantConfig(3, 6, 8, kv_granularity="token")
    config.save(tmp_path)
    assert QuantConfig.load(tmp_path) == config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"w_bits": 9}, "w_bits=9"),
        ({"a_bits": 1}, "a_bits=1"),
        ({"kv_bits": 32}, "kv_bits=32"),
        ({"kv_site": "before"}, "kv_site='before'"),
        ({"kv_site": "pre_rope", "kv_rotation": "hadamard"}, "kv_rotation=hadamard needs"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(UserError, match=named):
        QuantConfig(**settings)


def test_other_architectures_are_refused():
    model = tiny_model(GPTNeoXConfig)
    with pytest.raises(UserError, match="gpt_neox"):
        prepare(model, QuantConfig())


def test_unrotatable_head_dim_is_refused():
    with pytest.raises(UserError, match="head_dim"):
        prepare(tiny_model(head_dim=24), QuantConfig(kv_rotation="hadamard"))
