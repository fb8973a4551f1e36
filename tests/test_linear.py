import gc

import pytest
import torch
from layers import A8, FULL, W4, make
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from qat.quant import products
from qat.quant.linear import QuantLinear
from qat.quant.number_format import Format, Quantized, fake_quantize, grid_of, inside, quantize, round_to_grid
from qat.quant.quantizers.base import Grid

SETTINGS = [
    (W4, A8),
    (W4, FULL),
    (FULL, A8),
    (A8, A8),
    (Format(2), Format(6)),
    (Format(4, group_size=16), A8),
    (Format(4, "minmax_asymmetric"), Format(8, "minmax_asymmetric")),
    (Format(3, "minmax_asymmetric", 24), A8),
    (Format(4, group_size=16, scale_dtype="bfloat16"), A8),
    (Format(4, "ggml_q4_0", 16), Format(8, "ggml_q8_0", 16)),
    (W4, Format(8, "ggml_q8_0", 16)),
    (FULL, Format(8, "ggml_q8_0", 16)),
    (Format(4, "ggml_q4_0", 16), FULL),
    (Format(4, "minmax_full"), Format(8, "minmax_full")),
    (Format(4, "minmax_signed"), A8),
    (Format(3, "minmax_signed", 24), A8),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("weight", "inputs"), SETTINGS)
def test_equals_linear_of_fake_quantized_tensors_with_its_gradients(weight, inputs, bias):
    layer = make(weight, inputs, bias)
    x = torch.randn(2, 5, 48, requires_grad=True)
    grad = torch.randn(2, 5, 24)
    layer(x).backward(grad)
    got = [layer(x).detach(), x.grad, layer.weight.grad] + ([layer.bias.grad] if bias else [])

    w, b, x_ = (None if t is None else t.detach().requires_grad_() for t in (layer.weight, layer.bias, x))
    y = linear(fake_quantize(x_, inputs), fake_quantize(w, weight), b)
    y.backward(grad)
    expected = [y.detach(), x_.grad, w.grad] + ([b.grad] if bias else [])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_clipped_weight_gets_no_gradient():
    form = Format(4, "statsq")
    layer = make(form, A8)
    passes = inside(layer.weight, form, grid_of(layer.weight, form))
    layer(torch.randn(5, 48)).sum().backward()
    assert not passes.all()
    assert not layer.weight.grad[~passes].any()
    assert layer.weight.grad[passes].all()


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("w_quantizer", "a_quantizer"),
    [
        ("minmax", "minmax"),
        ("minmax_full", "minmax_full"),
        ("minmax_signed", "minmax"),
        ("minmax", "minmax_asymmetric"),
        ("minmax_asymmetric", "minmax"),
        ("minmax_asymmetric", "minmax_asymmetric"),
    ],
)
def test_forward_is_the_exact_product_of_the_codes_for_every_number_of_rows(
    w_quantizer, a_quantizer, w_bits, dtype, rows
):
    weight, inputs = Format(w_bits, w_quantizer), Format(8, a_quantizer)
    layer = make(weight, inputs, bias=False).to(dtype)
    x = torch.randn(rows, 48, dtype=dtype) + 0.5
    (x_codes, (x_scale, x_zero)), (w_codes, (w_scale, w_zero)) = quantize(x, inputs), quantize(layer.weight, weight)
    exact = (
        (x_codes.double() - (0 if x_zero is None else x_zero))
        @ (w_codes.double() - (0 if w_zero is None else w_zero)).t()
    ).float()
    expected = (exact * x_scale * w_scale.t()).to(dtype)
    assert torch.equal(layer(x), expected)
    layer.freeze()
    assert torch.equal(layer.to(torch.bfloat16).float().to(dtype)(x), expected), "casts must leave the scales alone"


@pytest.mark.parametrize("product", products.INTEGER_PRODUCTS)
@pytest.mark.parametrize("qmax", [7, 127])
def test_every_product_that_is_exact_gives_the_same_numbers(product, qmax):
    """Also where the sum is beyond 2^24, and fp32 rounds it; with zero points; and of the codes -128 and -qmax-1."""
    if not products.exact_ones([product], torch.device("cpu"), qmax):
        assert product is not products.float_blocks, "it must be exact everywhere"
        pytest.skip("not exact on this processor")
    torch.manual_seed(0)
    x = Quantized(torch.randint(90, 128, (5, 3000), dtype=torch.int8), Grid(torch.rand(5, 1)))
    codes = torch.randint(qmax // 2, qmax + 1, (8, 3004), dtype=torch.int8)[:, :3000]
    w = Quantized(codes, Grid(torch.rand(8, 1)))
    exact = (x.codes.double() @ w.codes.double().t()).float()
    assert qmax < 127 or exact.max() > 2**24
    expected = exact * x.grid.scale * w.grid.scale.t()
    assert torch.equal(products.matmul_codes(x, w, qmax, torch.float32, product), expected)
    zeros = torch.randint(-128, 0, (5, 1)).float(), torch.randint(-qmax - 1, 0, (8, 1)).float()
    x, w = (Quantized(one.codes, Grid(one.grid.scale, zero)) for one, zero in zip((x, w), zeros, strict=True))
    exact = ((x.codes.double() - x.grid.zero_point) @ (w.codes.double() - w.grid.zero_point).t()).float()
    expected = exact * x.grid.scale * w.grid.scale.t()
    assert torch.equal(products.matmul_codes(x, w, qmax, torch.float32, product), expected)
    lowest = [torch.full((40, 3000), code, dtype=torch.int8) for code in (-128, -qmax - 1)]
    assert torch.equal(product(*lowest).double(), lowest[0].double() @ lowest[1].double().t())


def test_a_product_that_saturates_is_not_exact(monkeypatch):
    """A processor without VNNI adds pairs of products, of unsigned inputs, in 16 bits."""

    def saturating(codes, weight):
        pairs = ((codes.int()[:, None] + 128) * weight.int()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * weight.int().sum(-1)

    monkeypatch.setattr(products, "_TEST_SIZE", {"cpu": 32})
    assert products.exact_ones([saturating], torch.device("cpu"), qmax=63)
    assert not products.exact_ones([saturating], torch.device("cpu"), qmax=127)


def test_a_product_that_does_not_heed_strides_is_not_exact():
    """As oneDNN's prepacking, given the codes of a packed layer, which lie beside their scales."""

    def careless(codes, weight):
        return codes.int() @ weight.as_strided(weight.shape, (weight.shape[1], 1)).int().t()

    assert not products.exact_ones([careless], torch.device("cpu"), qmax=7)


def test_a_learned_step_needs_its_start_and_then_learns():
    form = Format(8, "lsq")
    layer = QuantLinear.convert(nn.Linear(48, 24), W4, form, None)
    x = torch.randn(7, 48, requires_grad=True)
    assert layer(x).isnan().all(), "a step that nobody initialised must not go unnoticed"
    with torch.no_grad():
        layer.input_step.fill_(0.05)
    layer(x).square().sum().backward()
    assert layer.input_step.grad.isfinite().all()
    assert layer.input_step.grad.any()
    on_grid = (x / 0.05).round().clamp(-127, 127) * 0.05
    torch.testing.assert_close(layer(x), linear(on_grid, fake_quantize(layer.weight, W4), layer.bias))


def test_siblings_quantize_their_input_once(monkeypatch):
    calls = []

    def counting(x, form, *grid):
        calls.extend([form.bits] * (form == A8))
        return quantize(x, form, *grid)

    monkeypatch.setattr("qat.quant.linear.quantize", counting)
    q = make(readers=2)
    k = QuantLinear.convert(nn.Linear(48, 24), W4, A8, q.input_quantizer)
    x = torch.randn(3, 48)
    q(x.detach()), k(x.detach())  # each layer its own view of the input, as DeepSpeed's hooks give it
    assert calls == [8]
    q(x), k(x.clone())
    assert calls == [8, 8, 8]
    with torch.no_grad():
        x.mul_(2)  # the same tensor, other values: must not be mistaken for what was quantized before
    alone = make()
    assert torch.equal(q(x), alone(x))


def test_saves_codes_and_the_parameter_itself():
    layer = make()
    x = torch.randn(64, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    others = [t for t in saved if t is not layer.weight]
    assert len(others) == len(saved) - 1
    expected = 64 * 48 + 64 * 4 + 24 * 4
    assert sum(t.nbytes for t in others) == expected, "int8 codes, and one fp32 scale per token and output channel"


def test_gradient_checkpointing_keeps_nothing_of_a_layer_that_clips():
    """Neither codes nor a mask of what is clipped: they would be as large as what checkpointing saves. The collector
    also knows dead weak references, which cannot be asked what they are."""
    layer, x = make(inputs=Format(4, "mse")), torch.randn(64, 48, requires_grad=True)
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor)}
    y = checkpoint(layer, x, use_reentrant=False)
    new = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and id(thing) not in before]
    assert not [thing.dtype for thing in new if thing.numel() == x.numel()]
    y.sum().backward()
    found, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(found, x.grad)


def test_layers_that_read_one_input_share_its_mask(monkeypatch):
    masks = []
    monkeypatch.setattr("qat.quant.linear.inside", lambda *args: masks.append(inside(*args)) or masks[-1])
    q = make(inputs=Format(4, "mse"), readers=2)
    k = QuantLinear.convert(nn.Linear(48, 24), W4, Format(4, "mse"), q.input_quantizer)
    x = torch.randn(3, 48)
    q(x), k(x)
    assert len(masks) == 1


@pytest.mark.parametrize("inputs", [A8, FULL, Format(8, "ggml_q8_0", 16)])
def test_frozen_layer_gives_the_same_bits(inputs):
    layer = make(inputs=inputs)
    x = torch.randn(3, 48)
    before = layer(x)
    layer.freeze()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight, round_to_grid(make().weight, W4)[0])
