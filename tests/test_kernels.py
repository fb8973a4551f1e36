"""Our kernels for GPUs give the bits of the torch functions that they stand for. They run in Triton's interpreter here,
which conftest.py switches on, and are compiled for an H100, on which they were not timed."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from commands import ROOT
from layers import make
from tiny import CONFIG, ids, tiny_model
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, Qwen3Config

if sys.platform != "linux":
    pytest.skip("Triton is for Linux alone", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter  # without it this fails: it is in requirements-dev.txt

from datagen import attention, attention_triton
from datagen.decoder import Decoder
from qat.quant import kernels, number_format, packing, producers, products
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.quant.kernels import host
from qat.quant.number_format import Format, Quantized, dequantize, fake_quantize, quantize, round_to_grid
from qat.quant.prepare import prepare
from qat.quant.quantizers import QUANTIZERS
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import RECORD, Rotation, causal_lm_class

sys.path.append(str(ROOT / "benchmarks"))
from gpu_checks import numerics
from gpu_checks.bench import SMALL, Bench

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where numbers are NaN or too large
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = ["minmax", "minmax_asymmetric"]
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTEGERS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


@pytest.fixture(autouse=True)
def rounding(monkeypatch) -> None:
    """The interpreter cuts bits off where a GPU rounds; torch rounds as a GPU does. And it multiplies the bits of bf16
    as if they were integers."""
    theirs = interpreter._convert_float

    def convert(x, source, target, mode):
        if not {source.name, target.name} <= FLOATS.keys():
            return theirs(x, source, target, mode)
        size = source.primitive_bitwidth // 8
        floats = torch.from_numpy(x.view(f"int{8 * size}").copy()).view(FLOATS[source.name]).to(FLOATS[target.name])
        bits = floats.view(INTEGERS[floats.element_size()]).numpy()
        return bits.view(f"uint{8 * floats.element_size()}")

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle(convert(x.data, x.dtype, tl.float32, None).view("float32"), tl.float32)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *more: multiply(self, widened(a), widened(b), *more),
    )


@pytest.fixture
def used(monkeypatch) -> list[str]:
    """The kernels take the place of the torch functions; those that were called."""
    names = []

    class Own:
        def __getattr__(self, name):
            names.append(name)
            return getattr(host, name)

    monkeypatch.setattr(kernels, "on", lambda device: Own())
    monkeypatch.setattr(products, "own_is_faster", lambda *_: True)
    return names


def hard(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of all sizes, halves between codes, zeros of both signs, one sign alone, denormals, outliers, NaN,
    infinity."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-38, 30, rows)[:, None]
    x[:12] = torch.randn(12, columns, generator=generator)
    x[0], x[1], x[2] = 0, -0.0, torch.arange(columns) % 41 / 2 - 10
    x[3], x[4], x[5], x[6] = x[3].abs(), -x[4].abs(), x[5] * 2e-38, 1e-42
    x[7, 3], x[8, 1], x[9, 0], x[10, 2], x[11, 0] = 1e30, math.nan, -math.nan, math.inf, -math.inf
    return x.to(dtype).to(DEVICE)


def same(found, expected) -> bool:
    """Equal in every bit, but for those of NaN."""
    if expected is None or found is None or found.dtype != expected.dtype:
        return found is expected is None
    if not expected.dtype.is_floating_point:
        return torch.equal(found, expected)
    bits = INTEGERS[expected.element_size()]
    nan = found.isnan() & expected.isnan()
    return torch.equal(found.masked_fill(nan, 0).view(bits), expected.masked_fill(nan, 0).view(bits))


def all_of(x: torch.Tensor, form: Format) -> list[torch.Tensor | None]:
    """What quantizers make of x, by the functions that training calls."""
    codes, grid = quantize(x, form)
    values, found = round_to_grid(x, form)
    other = Grid(grid.scale * 0.7, grid.zero_point)  # so that values lie beyond the last codes
    on_other = quantize(x, form, other)
    parts = [codes, *grid, values, *found, dequantize(Quantized(codes, grid), x.dtype)]
    return [*parts, on_other.codes, round_to_grid(x, form, other)[0], dequantize(on_other, torch.bfloat16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("rows", "columns", "form"),
    [
        (40, 128, Format(4)),
        (33, 128, Format(8, group_size=64)),
        (33, 100, Format(2)),
        (17, 13, Format(4, scale_dtype="bfloat16")),
        (17, 48, Format(3, group_size=16, scale_dtype="float16")),
    ],
)
def test_kernels_give_the_bits_of_torch(rows, columns, form, method, dtype, used, monkeypatch):
    form = Format(form.bits, method, form.group_size, form.scale_dtype)
    x = hard(rows, columns, dtype)
    found = all_of(x, form)
    assert set(used) == {"quantize", "quantize_on", "round_rows", "round_rows_on", "dequantize"}
    monkeypatch.setattr(kernels, "on", lambda device: None)
    expected = all_of(x, form)
    assert [same(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("columns", [4096, 11008])
@pytest.mark.parametrize("method", METHODS)
def test_so_do_those_for_long_rows(columns, method):
    x, by = hard(13, columns, torch.bfloat16), QUANTIZERS[method]
    found = host.quantize(x, by, 127)
    expected = number_format._fused_quantize.__wrapped__(x, by, 127)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_may_lie_apart_or_across(used):
    x = hard(24, 40, torch.float32)
    for strided in (x[:, :30], x[::2], x.t()):
        expected = number_format._fused_round.__wrapped__(strided, QUANTIZERS["minmax"], 7)
        assert same(round_to_grid(strided, Format(4))[0], expected[0])
        one = Grid(torch.ones(1, 1, device=DEVICE).expand(len(strided), 1))  # one scale in memory for all rows
        assert same(quantize(strided, Format(4), one).codes, strided.round().clamp(-7, 7).to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("weight", "inputs", "multiplies"),
    [
        (Format(4), Format(8), True),
        (Format(4, "minmax_asymmetric"), Format(8, "minmax_asymmetric"), True),
        (Format(4, group_size=12), Format(8), False),
        (Format(4), Format(16), False),
        (Format(3, "statsq"), Format(8), True),
    ],
)
def test_a_layer_of_kernels_is_the_layer_of_torch(weight, inputs, multiplies, dtype, used, monkeypatch):
    """Forward and backward, and the rounding of a cache with its gradient."""
    torch.manual_seed(0)
    layer = make(weight, inputs).to(DEVICE, dtype)
    x = torch.randn(3, 23, layer.in_features, device=DEVICE).to(dtype)
    results = []
    for _ in range(2):
        row = x.clone().requires_grad_()
        y = layer(fake_quantize(row, Format(4)))
        y.backward(torch.ones_like(y) / 3)
        results.append([y.detach(), row.grad, layer.weight.grad])
        layer.weight.grad = None
        assert ("multiply" in used) == multiplies
        monkeypatch.setattr(kernels, "on", lambda device: None)
    assert all(same(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 17, 200])
@pytest.mark.parametrize(("columns", "out"), [(128, 64), (300, 273)])
def test_the_product_is_exact_and_scaled_as_by_torch(rows, columns, out, symmetric):
    generator = torch.Generator().manual_seed(0)
    method = METHODS[not symmetric]
    x = quantize(torch.randn(rows, columns, generator=generator).to(DEVICE), Format(8, method))
    weight = quantize(torch.randn(out, columns, generator=generator).to(DEVICE), Format(4, method))
    for dtype in DTYPES[:2]:
        expected = products.matmul_codes(x, weight, 7, dtype, products.float_blocks)
        zeros = None if symmetric else products._zeros(x.grid, x.codes, weight)
        found = host.multiply(x.codes, weight.codes, x.grid.scale, weight.grid.scale.view(1, -1), zeros, dtype)
        assert same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (7, 300), (1, 96), (5, 5000)])
def test_norms_and_gates_are_torchs_but_for_rounding(rows, columns, method, dtype):
    """Values and gradients; their codes are those of their values, and at most 1 in 10,000 is another than torch's, by
    one. Rows may lie apart."""
    by, generator = QUANTIZERS[method], torch.Generator().manual_seed(columns)
    x, y, grad = (torch.randn(rows, columns + 8, generator=generator).to(DEVICE, dtype)[:, 8:] for _ in range(3))
    weight = torch.rand(columns, generator=generator).add_(0.5).to(DEVICE, dtype)
    row, factor = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = row.float()
    expected = factor * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    expected.backward(grad)
    values, roots, *quantized = host.norm(x, weight, 1e-5, by, 127)
    gradients = host.norm_gradients(grad, x, weight, roots)
    both = [(values, expected.detach(), quantized)]
    near = [(values, expected), *zip(gradients, (row.grad, factor.grad), strict=True)]
    row, up = x.clone().requires_grad_(), y.clone().requires_grad_()
    expected = silu(row) * up
    expected.backward(grad)
    values, *quantized = host.gated(x, y, by, 127)
    both.append((values, expected.detach(), quantized))
    near += [(values, expected), *zip(host.gated_gradients(grad, x, y), (row.grad, up.grad), strict=True)]
    for found, wanted in near:
        assert found.dtype == dtype
        assert (found.double() - wanted.double()).norm() <= 2 * torch.finfo(dtype).eps * wanted.double().norm()
    for values, wanted, (codes, scale, zero_point) in both:
        own, grid = by.encode(values, 127)
        assert same(codes, own.to(torch.int8))
        assert same(scale, grid.scale)
        assert same(zero_point, grid.zero_point)
        off = (codes - by.encode(wanted, 127)[0]).abs()
        assert off.max() <= 1
        assert off.count_nonzero() <= 1e-4 * off.numel()


def test_a_norm_of_long_or_other_rows_is_torchs():
    weight, minmax = torch.ones(9000, device=DEVICE), QUANTIZERS["minmax"]
    assert host.norm(torch.ones(1, 9000, device=DEVICE), weight, 1e-5, minmax, 127) is None
    x = torch.randn(3, 32, device=DEVICE)
    assert host.norm(x, weight[:32].bfloat16(), 1e-5, minmax, 127) is None
    assert host.norm(x, weight[:32], 1e-5, QUANTIZERS["mse"], 127) is None
    assert host.gated(x, x.bfloat16(), minmax, 127) is None
    assert host.gated(x, x, QUANTIZERS["fp8"], 127) is None


@pytest.mark.parametrize(
    ("config_class", "method", "checkpointing"),
    [(LlamaConfig, "minmax", False), (Qwen3Config, "minmax_asymmetric", False), (LlamaConfig, "minmax", True)],
)
def test_layers_read_the_codes_of_the_norms_and_the_gate_before_them(
    config_class, method, checkpointing, used, monkeypatch
):
    """They make none themselves, but for attention's output; losses and gradients are those of the model's own
    functions but for rounding."""
    model = tiny_model(config_class)
    prepare(model, QuantConfig(4, 8, 4, a_quantizer=method)).to(DEVICE)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    calls = {}
    for on in (True, False):
        model.zero_grad()
        loss = model(ids(model, tokens=6).to(DEVICE), use_cache=False).logits.float().pow(2).mean()
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        if on:
            calls, found, of_kernels = Counter(used), loss, gradients
            monkeypatch.setattr(kernels, "on", lambda device: None)
    layers = model.config.num_hidden_layers * (1 + checkpointing)
    assert calls["norm"] == 2 * layers
    assert calls["gated"] == layers
    of_inputs = calls["quantize"] - calls["multiply"]  # each multiplied weight is quantized once
    assert of_inputs == layers
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        assert (of_kernels[name] - gradient).norm() <= 0.02 * gradient.norm(), name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("window", [None, 60, 300])
@pytest.mark.parametrize(("size", "kv_heads", "groups"), [(32, 2, 1), (64, 1, 3), (128, 1, 8)])
def test_decoding_attention_is_torchs(size, kv_heads, groups, window, dtype):
    """Slots at the ends of chunks and in between; the same keys and values are written, and none behind them is
    read."""
    position = torch.tensor([0, 1, 63, 64, 255, 256, 257, 511, 520, 599])
    generator, slots = torch.Generator().manual_seed(size), len(position)
    keys, values = torch.randn(2, slots, kv_heads, 600, size, generator=generator).to(DEVICE, dtype)
    qkv = torch.randn(slots, kv_heads * (groups + 2) * size, generator=generator).to(DEVICE, dtype)
    angles = torch.randn(slots, size // 2, generator=generator).repeat(1, 2)
    cos, sin, position = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype), position.to(DEVICE)
    own_keys, own_values = keys.clone(), values.clone()
    for slot, at in enumerate(position):
        own_keys[slot, :, at:] = own_values[slot, :, at:] = math.nan
    found = attention_triton.attend(qkv, cos, sin, position, own_keys, own_values, window)
    expected = attention.by_torch(qkv, cos, sin, position, keys, values, 600, window)
    assert (found.double() - expected.double()).norm() <= 2 * torch.finfo(dtype).eps * expected.double().norm()
    for own, wanted in ((own_keys, keys), (own_values, values)):
        assert same(own[range(slots), :, position], wanted[range(slots), :, position])


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config], ids=lambda kind: kind.model_type)
def test_decoding_by_our_attention_equals_the_full_forward(config_class, monkeypatch):
    """As far as bf16 tells."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = tiny_model(config_class, **heads).to(DEVICE, torch.bfloat16)
    tokens = ids(model, batch=3, tokens=12).cpu()
    monkeypatch.setattr(attention, "kernel_on_gpu", lambda *sizes: attention_triton)
    decoder = Decoder(model, 3, 12)
    assert all(layer.attention.triton for layer in decoder.layers)
    steps = [decoder.step(tokens[:, i], torch.full((3,), i)).logits.cpu() for i in range(12)]
    with torch.no_grad():
        full = model(tokens.to(DEVICE)).logits.float().cpu()
    assert (torch.stack(steps, 1) - full).norm() < 0.02 * full.norm()


def test_attention_that_is_wrong_or_missing_is_not_used(monkeypatch, caplog):
    """The device is a CPU that says it is a GPU."""

    class Gpu:
        type = "cuda"

    find = attention.kernel_on_gpu.__wrapped__
    monkeypatch.setattr(
        attention, "_check", lambda own, device, *more, check=attention._check: check(own, DEVICE, *more)
    )
    assert find(Gpu(), torch.bfloat16, 32, 3) is attention_triton
    assert find(torch.device("cpu"), torch.bfloat16, 32, 3) is None
    assert find(Gpu(), torch.bfloat16, 96, 1) is None
    assert find(Gpu(), torch.float32, 32, 3) is None
    assert not caplog.text
    right = attention_triton.attend

    def wrong(qkv, cos, sin, position, keys, values, window):
        result = right(qkv, cos, sin, position, keys, values, window)
        keys[0, 0, 0, 0] += 1
        return result

    for breaks, said in (
        (wrong, "it writes other keys or values"),
        (lambda *args: right(*args) * 1.1, "its result differs from torch's by 0.1"),
        (lambda *_: _raises(None), "out of shared memory"),
    ):
        monkeypatch.setattr(attention_triton, "attend", breaks)
        assert find(Gpu(), torch.bfloat16, 32, 3) is None
        assert said in caplog.text
    monkeypatch.setattr(attention_triton, "attend", right)
    monkeypatch.setenv("QAT_KERNELS", "0")
    assert find(Gpu(), torch.bfloat16, 32, 3) is None


class Launches(TorchDispatchMode):
    """Counts the operators that compute something."""

    FREE = ("alias", "as_strided", "detach", "empty", "expand", "permute", "reshape", "select", "slice", "split", "t",
            "transpose", "unsqueeze", "view", "_unsafe_view", "empty_like", "split_with_sizes")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.FREE
        return function(*args, **(kwargs or {}))


def test_a_quantized_layer_launches_fewer_kernels_than_full_precision(used, monkeypatch):
    """Forward and backward of one more decoder layer, in bf16; on an H100 full precision launches as many. The kernels
    are called, and do nothing."""
    started = []
    monkeypatch.setattr(host, "_start", lambda kernel, *args, **options: started.append(kernel))

    def launches(layers: int, quant: QuantConfig) -> int:
        model = prepare(tiny_model(num_hidden_layers=layers).bfloat16(), quant)
        row = ids(model)
        predicting(model, row).sum().backward()
        model.zero_grad()
        started.clear()
        with Launches() as counted:
            predicting(model, row).sum().backward()
        return counted.count + len(started)

    full, quantized = (launches(3, quant) - launches(2, quant) for quant in (QuantConfig(16, 16, 16), QuantConfig()))
    monkeypatch.setattr(producers, "join", lambda *_: None)
    apart = launches(3, QuantConfig()) - launches(2, QuantConfig())
    assert (full, quantized, apart) == (113, 96, 142)


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_not_quantized_or_rotated_before_is_the_models_own(bits, used):
    """Without codes to make, and where R4 changes what the last layer of the MLP reads."""
    config = LlamaConfig(**CONFIG)
    if bits == 8:
        setattr(config, RECORD, Rotation("hadamard").record())
    model = causal_lm_class(config)(config)
    prepare(model, QuantConfig(4, bits, 16)).to(DEVICE)
    with torch.no_grad():
        model(ids(model).to(DEVICE), use_cache=False)
    assert "gated" not in used
    assert ("norm" in used) == (bits == 8)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (300, 40)])
def test_pairs_of_codes_are_unpacked_as_by_torch(rows, columns, parts):
    """Also where each part has more behind its codes, as gathered weights have."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (parts, rows * columns + 12), generator=generator, dtype=torch.uint8).to(DEVICE)
    pairs = stored[:, : rows * columns].unflatten(1, (rows, columns)).squeeze(0)
    assert same(host.unpair(pairs), packing._unpaired(pairs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "form",
    [
        *(Format(4, name, group) for name in METHODS for group in (0, 32)),
        *(Format(8, name, group) for name in METHODS for group in (0, 32)),
        Format(2, "seq"),
        Format(3, "minmax_full", 16),
        Format(4, scale_dtype="float16"),
    ],
    ids=str,
)
def test_values_of_gathered_codes_are_those_of_torch(form, parts, dtype, used):
    """Also where a part, which may have an odd number of bytes, puts the next one's scales at odd addresses."""
    weight = torch.randn(15, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight[:, :2] = torch.tensor([0, 7])
    packed = torch.stack([packing.pack_rows(quantize(part, form), form) for part in weight.chunk(parts)])
    gathered = torch.nn.Parameter(torch.full((), torch.nan, device=DEVICE).expand(15, 96))
    setattr(gathered, packing.STAND_IN, packed)
    values = packing.stand_in_values(gathered, form, dtype)
    assert "stored_values" in used
    assert same(values, dequantize(packing.stand_in(gathered, form), dtype))


def test_triton_is_asked_once_for_what_it_compiles_anew(monkeypatch):
    """For other dtypes, alignments, strides and constants, not for other numbers of rows; and what runs is what it
    compiled."""

    starts = []

    class Compiled:
        """What Triton gives back: started like the kernel, with all arguments."""

        def __init__(self, number):
            self.number = number

        def __getitem__(self, programs):
            return lambda *args: starts.append((self.number, programs, args[4]))

    class Kernel:
        fn = staticmethod(lambda: None)
        compiled = 0

        def __getitem__(self, programs):
            def compile_and_start(*args, num_warps):
                self.compiled += 1
                Compiled(self.compiled)[programs](*args)
                return Compiled(self.compiled)

            return compile_and_start

    monkeypatch.setattr(host, "_compiled", {})
    kernel = Kernel()

    def start(rows: torch.Tensor, dtype: torch.dtype = torch.int8, constant: int = 7) -> int:
        host._run(kernel, rows, dtype, torch.ones(len(rows), 1), None, constant)
        return starts[-1][0]

    x = torch.zeros(40, 64)
    for rows in (40, 1, 16, 33):
        start(x[:rows])
    assert starts == [(1, (2, 1, 1), 40), (1, (1, 1, 1), 1), (1, (1, 1, 1), 16), (1, (2, 1, 1), 33)]
    others = [start(x.bfloat16()), start(x, torch.bfloat16), start(x, constant=3), start(x[:, 1:]), start(x[::2])]
    assert others == [2, 3, 4, 5, 6]
    assert start(x) == 1


def test_what_they_cannot_do_torch_does(used, monkeypatch):
    """Other grids, other floats, rows too long to be kept in registers."""
    minmax, x = QUANTIZERS["minmax"], torch.randn(3, 32, device=DEVICE)
    assert host.quantize(x, QUANTIZERS["minmax_full"], 7) is None
    assert host.quantize(x.double(), minmax, 7) is None
    assert host.round_rows(torch.zeros(1, 40000, device=DEVICE), minmax, 7) is None
    assert host.round_rows_on(x, torch.ones(3, 1, device=DEVICE), None, QUANTIZERS["ggml_q4_0"], 7) is None
    assert host.dequantize(x.to(torch.float8_e4m3fn), torch.ones(3, 1, device=DEVICE), None, torch.float32) is None
    others = {name: QUANTIZERS[name] for name in ("minmax_full", "nvfp4", "fp8", "ggml_q4_0")}
    forms = [Format(by.allowed_bits[-1], name, by.group_size, tensor_scale=512.0) for name, by in others.items()]
    found = [(round_to_grid(x, form)[0], quantize(x, form).codes) for form in forms]
    monkeypatch.setattr(kernels, "on", lambda device: None)
    for form, (values, codes) in zip(forms, found, strict=True):
        assert same(values, round_to_grid(x, form)[0])
        assert torch.equal(codes.float(), quantize(x, form).codes.float())


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_cpus_have_none_nor_has_who_wants_none(mode, monkeypatch, caplog):
    assert kernels.on("cpu") is None
    monkeypatch.setattr(torch, "device", lambda kind: DEVICE)
    with mode():
        assert kernels.on.__wrapped__("cuda") is host
    monkeypatch.setenv("QAT_KERNELS", "0")
    assert kernels.on.__wrapped__("cuda") is None
    assert not caplog.text


def test_they_are_tried_in_a_checkpointed_layer_as_well_as_anywhere(monkeypatch, caplog):
    """The first to ask is the first layer of the first step: what the trial saves is no part of that layer."""
    tried = []

    def layer(x):
        if not tried:
            with monkeypatch.context() as here:
                here.setattr(torch, "device", lambda kind: DEVICE)
                tried.append(kernels.on.__wrapped__("cuda"))
        return x.exp().sin()

    x = torch.linspace(0, 1, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert tried == [host]
    assert not caplog.text
    torch.testing.assert_close(x.grad, x.detach().exp().cos() * x.detach().exp())


@pytest.mark.parametrize(
    "name",
    [
        *("quantize", "round_rows", "quantize_on", "round_rows_on", "dequantize"),
        *("norm", "norm_gradients", "gated", "gated_gradients", "unpair", "stored_values"),
    ],
)
@pytest.mark.parametrize("breaks", [RuntimeError("no such GPU"), None])
def test_kernels_that_do_not_run_or_give_other_codes_are_not_used(name, breaks, monkeypatch, caplog):
    right = getattr(host, name)

    def run(*args):
        if breaks:
            raise breaks
        result = right(*args)
        (result[0] if isinstance(result, tuple) else result)[-1] += 1
        return result

    monkeypatch.setattr(torch, "device", lambda kind: DEVICE)
    monkeypatch.setattr(host, name, run)
    assert kernels.on.__wrapped__("cuda") is None
    said = "differs from what torch does" if "norm" in name or "gated" in name else "is not what torch does"
    assert ("no such GPU" if breaks else said) in caplog.text


def _nan(result):
    result[-1, -1] = math.nan
    return result


def _raises(result):
    raise RuntimeError("out of shared memory")


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(
    ("changes", "seconds", "with_zeros_alone", "expected"),
    [
        (lambda y: y, (1, 2), False, True),
        (lambda y: y, (2, 1), False, False),
        (lambda y: torch.nextafter(y, torch.full_like(y, math.inf)), (1, 2), False, False),
        (_nan, (1, 2), True, False),
        (_raises, (1, 2), False, False),
    ],
    ids=["right and faster", "slower", "one bit off", "wrong with zeros", "does not run"],
)
def test_our_product_is_used_where_it_is_right_and_faster(
    few, changes, seconds, with_zeros_alone, expected, monkeypatch
):
    """The device is a CPU, and the kernel is torch."""
    rows, took = [], iter(seconds)

    class Own:
        @staticmethod
        def multiply(codes, weight, x_scale, weight_scale, zeros, dtype):
            rows.append(len(codes))
            total = products.float_blocks(codes, weight)
            if zeros:
                y = products._corrected(total, *zeros, x_scale, weight_scale, codes.shape[1], dtype)
            else:
                y = products._scaled(total, x_scale, weight_scale, dtype)
            return changes(y) if zeros or not with_zeros_alone else y

    monkeypatch.setattr(kernels, "on", lambda device: Own() if device == "cpu" else None)
    monkeypatch.setattr(products, "_seconds", lambda call, device: next(took))
    monkeypatch.setattr(products, "_TEST_SIZE", {"cpu": 96})
    found = products.own_is_faster.__wrapped__(products.float_blocks, torch.device("cpu"), 7, few)
    assert found == expected
    if expected:
        assert set(rows) == {17, host.FEW_ROWS if few else 96}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "compile_kernels.py"]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(command, env=environment | {"PYTHONPATH": paths}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compiled_for_an_h100_no_register_is_spilled(compiled):
    assert {name: kernel["stack"] for name, kernel in compiled.items() if kernel["stack"]} == {}


def test_compiled_for_an_h100_every_operation_rounds_as_torchs_does(compiled):
    for name, kernel in compiled.items():
        arithmetic = set(re.findall(r"\b(?:div|mul|add|sub|fma|mad|cvt|r?sqrt)\.[\w.]*f(?:32|16)[\w.]*", kernel["ptx"]))
        assert not [one for one in arithmetic if "ftz" in one or "approx" in one or "full" in one or "fma" in one], name
        assert ("div.rn.f32" in arithmetic) == name.startswith(("round", "norm", "gated", "together")), name
        assert ("cvt.rn.bf16" in kernel["ptx"]) == name.endswith("to bf16"), name


def test_compiled_for_an_h100_products_are_of_its_tensor_cores(compiled):
    for name, kernel in compiled.items():
        assert ("wgmma.mma_async.sync.aligned" in kernel["ptx"]) == name.startswith("multiply")
        assert (".s32.s8.s8" in kernel["ptx"]) == name.startswith("multiply")


def test_what_the_gpu_checks_do_with_our_kernels(monkeypatch, tmp_path):
    """Elsewhere in the suite they find none."""

    def once(call, repeats=0):
        call()
        return 1.0

    monkeypatch.setattr(kernels, "on", lambda device: host)
    monkeypatch.setattr(products, "own_is_faster", lambda *_: True)
    monkeypatch.setattr(numerics, "device_seconds", once)
    bench = Bench(
        replace(SMALL, hidden=64, intermediate=96, heads=2, tokens=8, rows=(1, 17)), tmp_path, torch.device(DEVICE)
    )
    figures, holds = numerics.row_kernels(bench)
    assert (figures["mismatches"], holds) == (0, {"equal": True})
    assert figures["compared"] > 0
    figures, holds = numerics.product_kernel(bench)
    assert (figures["mismatches"], holds) == (0, {"equal": True})
    assert [*figures["us_by_rows"]] == [1, 17]
    figures, holds = numerics.norm_and_gate_kernels(bench)
    assert holds == {"few": True, "by one": True}
    assert figures["us"].keys() == {"norm", "gate"}
