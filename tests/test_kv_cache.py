import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ids, tiny_model

from qat.infer.integer_cache import IntegerCache
from qat.quant.config import QuantConfig
from qat.quant.hadamard import hadamard_matrix
from qat.quant.kv_formats.integers import Integers
from qat.quant.number_format import Format, fake_quantize, quantize
from qat.quant.packing import pack, unpack
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError

KV_SETTINGS = [
    {"kv_site": site, "kv_granularity": granularity, "kv_rotation": rotation, "kv_quantizer": quantizer}
    for site in ("post_rope", "pre_rope")
    for granularity in ("token_head", "token")
    for rotation in ("none", "hadamard")
    for quantizer in ("minmax", "minmax_asymmetric")
    if (site, rotation) != ("pre_rope", "hadamard")
]


def double_model(settings, **changes):
    """In fp64, so that no rounding of the matrix products decides on which side of a half a value lies."""
    return prepare(tiny_model(**changes), QuantConfig(4, 8, **settings)).double()


@pytest.mark.parametrize("settings", KV_SETTINGS)
def test_cached_decoding_equals_the_full_forward(settings):
    model = double_model(settings)
    tokens = ids(model, tokens=12)
    full = model(tokens).logits
    cache, steps = None, []
    for i in range(tokens.shape[1]):
        output = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full)


STORED = [
    settings | {"kv_bits": bits} for settings in KV_SETTINGS if settings["kv_site"] != "pre_rope" for bits in (3, 4, 8)
]


@pytest.mark.parametrize("settings", STORED)
def test_the_integer_cache_decodes_what_training_simulated(settings):
    model = double_model(settings, num_key_value_heads=2)
    tokens = ids(model, batch=2, tokens=12)
    full = model(tokens).logits
    cache = IntegerCache(model)
    steps = [model(tokens[:, :5], past_key_values=cache).logits]  # a prompt, then token by token
    steps += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), full)
    code_bytes = 16 if settings["kv_bits"] == 8 else 8  # of one head's 16 channels
    groups, code_bytes = (2, code_bytes) if settings["kv_granularity"] == "token_head" else (1, 2 * code_bytes)
    grid_bytes = 4 if settings["kv_quantizer"] == "minmax" else 5
    assert cache.nbytes() == 2 * 2 * 2 * 12 * groups * (code_bytes + grid_bytes), "layers, K and V, batch, tokens"


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_the_integer_cache_equals_generate_without_a_cache(beams):
    model = double_model({"kv_rotation": "hadamard"})
    prompt, mask = ids(model, batch=2, tokens=6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0  # left padding
    settings = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(model.generate(prompt, past_key_values=IntegerCache(model), **settings), expected)


def test_what_was_stored_is_not_taken_for_new_keys():
    """Attention that knows nothing of the cache would multiply rotated keys with queries that are not."""
    model = double_model({"kv_rotation": "hadamard"})
    model.set_attn_implementation("eager")
    with pytest.raises(AttributeError, match="Stored"):
        model(ids(model), past_key_values=IntegerCache(model))


@given(st.integers(2, 8), st.sampled_from(["minmax", "minmax_asymmetric"]), st.integers(1, 5), st.integers(1, 8))
def test_packing_loses_nothing(bits, method, rows, half):
    form = Format(bits, method)
    quantized = quantize(torch.randn(2, rows, 2 * half), form)
    codes, grid = unpack(pack(quantized, form), form)
    assert torch.equal(codes, quantized.codes)
    assert torch.equal(grid.scale, quantized.grid.scale)
    assert grid.zero_point is None or torch.equal(grid.zero_point, quantized.grid.zero_point)


@pytest.mark.parametrize("config", [QuantConfig(kv_bits=16), QuantConfig(kv_site="pre_rope")])
def test_what_no_cache_can_store_is_refused(config):
    with pytest.raises(UserError, match="kv_site=post_rope"):
        IntegerCache(prepare(tiny_model(), config))


@pytest.mark.parametrize("settings", KV_SETTINGS)
def test_padding_does_not_reach_other_tokens(settings):
    model = prepare(tiny_model(), QuantConfig(16, 16, 4, **settings))
    tokens = ids(model, tokens=10)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(got, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", KV_SETTINGS)
def test_gradient_checkpointing_is_exact(settings):
    gradients = []
    for checkpointing in (False, True):
        model = prepare(tiny_model(), QuantConfig(4, 8, 4, **settings)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(model), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_rotation_leaves_full_precision_attention_unchanged():
    """With 8 bits the KV error is small; what remains must be that error, not the rotation's."""
    tokens = ids(tiny_model())
    exact = tiny_model()(tokens).logits
    plain = prepare(tiny_model(), QuantConfig(16, 16, 8))(tokens).logits
    rotated = prepare(tiny_model(), QuantConfig(16, 16, 8, kv_rotation="hadamard"))(tokens).logits
    assert (rotated - exact).abs().max() < 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("size", [2, 16, 128])
def test_hadamard_is_orthogonal_and_symmetric(size):
    matrix = hadamard_matrix(size, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, matrix.t())


def test_granularities_share_scales_as_they_say():
    keys = torch.randn(1, 3, 5, 8)  # [batch, kv_heads, tokens, head_dim]
    per_head = Integers(Format(4), "token_head", "none").round(keys, keys.dtype)
    assert torch.equal(per_head[0, 1, 2], fake_quantize(keys[0, 1, 2], Format(4)))
    per_token = Integers(Format(4), "token", "none").round(keys, keys.dtype)
    assert torch.equal(per_token[0, :, 2].flatten(), fake_quantize(keys[0, :, 2].flatten(), Format(4)))
    projected = keys.transpose(1, 2).flatten(2)
    assert torch.equal(
        Integers(Format(4), "token_head", "none").projection(projected, 8), per_head.transpose(1, 2).flatten(2)
    )
