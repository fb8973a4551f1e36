import pytest
import torch
from conftest import tiny_model
from test_prepare import ids

from qat.kv_cache import KVQuantizer, hadamard_matrix
from qat.prepare import QuantConfig, prepare
from qat.quantizers import fake_quantize

KV_SETTINGS = [
    {"kv_site": site, "kv_granularity": granularity, "kv_rotation": rotation}
    for site in ("post_rope", "pre_rope")
    for granularity in ("token_head", "token")
    for rotation in ("none", "hadamard")
    if (site, rotation) != ("pre_rope", "hadamard")
]


@pytest.mark.parametrize("settings", KV_SETTINGS)
def test_cached_decoding_equals_the_full_forward(settings):
    model = prepare(tiny_model(), QuantConfig(4, 8, 4, **settings))
    tokens = ids(model, tokens=12)
    full = model(tokens).logits
    cache, steps = None, []
    for i in range(tokens.shape[1]):
        output = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)


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
    per_head = KVQuantizer(4, "token_head", "none").heads(keys)
    assert torch.equal(per_head[0, 1, 2], fake_quantize(keys[0, 1, 2], 4))
    per_token = KVQuantizer(4, "token", "none").heads(keys)
    assert torch.equal(per_token[0, :, 2].flatten(), fake_quantize(keys[0, :, 2].flatten(), 4))
    projected = keys.transpose(1, 2).flatten(2)
    assert torch.equal(
        KVQuantizer(4, "token_head", "none").projection(projected, 8), per_head.transpose(1, 2).flatten(2)
    )
