import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from qat.linear import InputQuantizer, QuantLinear
from qat.quantizers import fake_quantize, quantize

SETTINGS = [(4, 8), (4, 16), (16, 8), (8, 8), (2, 6)]


def make(w_bits, a_bits, bias=True, readers=1):
    torch.manual_seed(0)
    quantizer = None if a_bits == 16 else InputQuantizer(a_bits, readers)
    return QuantLinear.convert(nn.Linear(48, 24, bias=bias), w_bits, quantizer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("w_bits", "a_bits"), SETTINGS)
def test_equals_linear_of_fake_quantized_tensors_with_its_gradients(w_bits, a_bits, bias):
    layer = make(w_bits, a_bits, bias)
    x = torch.randn(2, 5, 48, requires_grad=True)
    grad = torch.randn(2, 5, 24)
    layer(x).backward(grad)
    got = [layer(x).detach(), x.grad, layer.weight.grad] + ([layer.bias.grad] if bias else [])

    weight, bias_, x_ = (None if t is None else t.detach().requires_grad_() for t in (layer.weight, layer.bias, x))
    y = linear(fake_quantize(x_, a_bits), fake_quantize(weight, w_bits), bias_)
    y.backward(grad)
    expected = [y.detach(), x_.grad, weight.grad] + ([bias_.grad] if bias else [])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_equals_the_integer_product():
    layer = make(4, 8, bias=False)
    x = torch.randn(7, 48)
    (x_codes, x_scale), (w_codes, w_scale) = quantize(x, 8), quantize(layer.weight, 4)
    integers = x_codes.int() @ w_codes.int().t()
    torch.testing.assert_close(layer(x), integers * x_scale * w_scale.t(), rtol=1e-5, atol=1e-5)


def test_siblings_quantize_their_input_once(monkeypatch):
    calls = []
    monkeypatch.setattr("qat.linear.quantize", lambda x, bits: calls.append(bits) or quantize(x, bits))
    q = make(4, 8, readers=2)
    k = QuantLinear.convert(nn.Linear(48, 24), 4, q.input_quantizer)
    x = torch.randn(3, 48)
    q(x.detach()), k(x.detach())  # each layer its own view of the input, as DeepSpeed's hooks give it
    assert calls == [8]
    q(x), k(x.clone())
    assert calls == [8, 8, 8]
    with torch.no_grad():
        x.mul_(2)  # the same tensor, other values: must not be mistaken for what was quantized before
    alone = make(4, 8)
    assert torch.equal(q(x), alone(x))


def test_saves_codes_and_the_parameter_itself():
    layer = make(4, 8)
    x = torch.randn(64, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    others = [t for t in saved if t is not layer.weight]
    assert len(others) == len(saved) - 1
    assert sum(t.nbytes for t in others) == 64 * 48 + 64 * 4, "int8 codes and one fp32 scale per token"


def test_frozen_layer_gives_the_same_bits():
    layer = make(4, 8)
    x = torch.randn(3, 48)
    before = layer(x)
    layer.freeze()
    assert torch.equal(layer(x), before)
