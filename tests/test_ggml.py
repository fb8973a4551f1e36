"""llama.cpp's blocks: our codes and scales are those of its own functions, which the package xllamacpp exports."""

import ctypes
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from commands import ROOT, finish, start_training
from compiler import needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from layers import same
from students import WINDOWS, write_student
from tiny import ids, tiny_model, tiny_tokenizer
from torch import nn
from transformers import Qwen2Config

import qat
from launch import cli
from launch.train import TrainConfig
from qat.export import export
from qat.export.formats import EXPORT_FORMATS, GGUF
from qat.infer import packed, simulated
from qat.infer.packed import PackedLinear
from qat.quant import fused, number_format
from qat.quant.architecture import quantizable_linears
from qat.quant.config import QuantConfig
from qat.quant.linear import InputQuantizer, QuantLinear
from qat.quant.number_format import Format, Quantized, dequantize, inside, quantize, round_to_grid
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.store import gguf_files, models, student_folder
from qat.store.gguf_files import blocks

Q4_0, Q5_0, Q8_0 = (Format(bits, f"ggml_q{bits}_0", 32) for bits in (4, 5, 8))
FORMATS = [Q4_0, Q5_0, Q8_0]
BLOCK_BYTES = {4: 18, 5: 22, 8: 34}

package = importlib.util.find_spec("xllamacpp")
GGML = ctypes.CDLL(str(next(Path(package.submodule_search_locations[0]).glob("xllamacpp.*.so"))))
GGML.ggml_cpu_init()


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return x.ctypes.data_as(ctypes.c_void_p)


def ggmls(x: torch.Tensor, bits: int) -> np.ndarray:
    """The bytes of x [rows, columns] as the engine on this processor quantizes it: uint8 [rows, bytes]."""
    x = np.ascontiguousarray(x.float().numpy())
    found = np.zeros((len(x), x.shape[1] // 32 * BLOCK_BYTES[bits]), np.uint8)
    getattr(GGML, f"quantize_row_q{bits}_0")(pointer(x), pointer(found), ctypes.c_int64(x.size))
    return found


def ours(quantized: Quantized, form: Format) -> np.ndarray:
    return blocks(quantized, gguf.GGMLQuantizationType[f"Q{form.bits}_0"])


ORDINARY = st.floats(-1, 1, width=32)
EXTREME = st.floats(width=32, allow_nan=False, allow_infinity=False)
"""Denormal ones, and those whose scale overflows or underflows in fp16, zeros of both signs, and ties."""
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.9375, 1e-42, -1e-42, 2**-23, 3e38, 1e-7])
BLOCKS = st.one_of(*(arrays("float32", (2, 64), elements=kind) for kind in (ORDINARY, EXTREME, FEW)))


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # infinite scales
@given(BLOCKS, st.sampled_from(FORMATS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_and_scales_are_ggmls(x, form, dtype):
    """Whatever the dtype of x: the engine's are those of its values in fp32."""
    x = torch.from_numpy(x).to(dtype).nan_to_num(0.0, 0.0, 0.0)
    found = ours(quantize(x, form), form)
    assert np.array_equal(found, ggmls(x, form.bits))
    values = torch.from_numpy(gguf.quants.dequantize(found, gguf.GGMLQuantizationType[f"Q{form.bits}_0"]))
    same(round_to_grid(x.float(), form)[0], values)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_and_scales_are_the_gguf_packages(form):
    """Of Q8_0 it rounds halves away from zero, and by another multiplier: one code or none in a hundred thousand."""
    x = torch.randn(512, 320, generator=torch.Generator().manual_seed(form.bits)) * torch.logspace(-6, 3, 512)[:, None]
    found = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[f"Q{form.bits}_0"])
    assert (found != ours(quantize(x, form), form)).sum() <= (3 if form == Q8_0 else 0)


@pytest.mark.parametrize(
    ("form", "known"),
    [
        (Q4_0, "00b8cf379d047be248bf269df36ad148ae15"),
        (Q5_0, "00b4d54aa5568f5d3b08e6b3916e4c19f7c4a27f5d2a"),
        (Q8_0, "08288518ad40d467fc9124b94be073089d30c457ec7f14a93cd063f88d20b547dc6f"),
    ],
    ids=str,
)
def test_known_bytes(form, known):
    """Also where xllamacpp is another version."""
    x = ((37 * torch.arange(32) % 64) - 31)[None] / 8
    assert ours(quantize(x, form), form).tobytes().hex() == known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [Q4_0, Q5_0], ids=str)
def test_what_is_clipped_gets_no_gradient(form, dtype):
    """It is more than half a step beyond the last code on the other side of the extreme element."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantized = quantize(x, form)
    passes = inside(x, form, quantized.grid)
    steps = x.double() / quantized.grid.scale.double().repeat_interleave(32, -1)
    assert not passes.all()
    assert (steps[passes] < form.qmax + 0.51).all()  # the scale is rounded to fp16
    assert (steps[~passes] > form.qmax + 0.49).all()
    assert (quantized.codes[~passes] == form.qmax).all()


@pytest.mark.parametrize(
    ("form", "dtype", "function"),
    [
        (Q4_0, torch.float32, number_format._fused_round),
        (Q4_0, torch.bfloat16, number_format._fused_quantize),
        (Q8_0, torch.bfloat16, number_format._fused_round),
        (Q4_0, torch.float32, number_format._fused_pass),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_compiled_equals_eager_bit_for_bit(form, dtype, function):
    """The scale is rounded to fp16 in both, and the first of several extreme elements gives its sign."""
    needs_compiler()
    x = torch.randn(65, 32, generator=torch.Generator().manual_seed(0))
    x[1], x[2, 3], x[3], x[4] = 0, 1e30, torch.arange(32) / 2 - 8, 1e-42
    x[5, ::3], x[6], x[7, 9] = -x[5].abs().max(), -0.0, torch.nan
    x[8:40] = (8 * x[8:40]).round()  # many ties
    eager = function.__wrapped__
    compiled = torch.compile(eager, dynamic=True, options=fused.options())
    arguments = x.to(dtype), form.by, form.qmax
    if function is number_format._fused_pass:
        arguments = x.flip(0), x.to(dtype), torch.ones(65, 1), None, form.by, form.qmax
    for one, other in zip(compiled(*arguments), eager(*arguments), strict=True):
        assert one is other is None or same(one, other) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and QAT_TEST_GPU=1")
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_gpu_eager_and_compiled_gives_the_bits_of_the_cpu(form):
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 5, 4096)[:, None]
    for rows in (x, x.bfloat16()):
        for function in (number_format._fused_quantize, number_format._fused_round):
            eager = function.__wrapped__
            for on_gpu in (eager, torch.compile(eager, dynamic=True, options=fused.options())):
                found, expected = on_gpu(rows.cuda(), form.by, form.qmax), eager(rows, form.by, form.qmax)
                assert all(a is b is None or torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_zeros_stay_zeros_and_small_blocks_become_zeros():
    for form in FORMATS:
        for x in (torch.zeros(1, 32), torch.full((1, 32), 1e-9)):
            values = dequantize(quantize(x, form), torch.float32)
            assert not values.any()
            assert values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_linear_layer_computes_what_ggmls_kernel_computes(form, dtype):
    """But for the order in which fp32 numbers are added up; before and after it is frozen, the same bits."""
    torch.manual_seed(form.bits)
    layer = nn.Linear(320, 24, bias=False)
    layer = QuantLinear.convert(layer, form, Q8_0, InputQuantizer(Q8_0, 1)).to(dtype)
    x = torch.randn(7, 320, dtype=dtype) * torch.logspace(-2, 2, 320, dtype=dtype)
    weights, inputs, dot = ggmls(layer.weight.detach(), form.bits), ggmls(x, 8), ctypes.c_float()
    kernel, expected = getattr(GGML, f"ggml_vec_dot_q{form.bits}_0_q8_0"), torch.empty(7, 24)
    for row, of_x in enumerate(inputs):
        for out, of_weight in enumerate(weights):
            kernel(320, ctypes.byref(dot), ctypes.c_size_t(0), pointer(of_weight), ctypes.c_size_t(0), pointer(of_x),
                   ctypes.c_size_t(0), 1)  # fmt: skip
            expected[row, out] = dot.value
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6 * expected.abs().max())
    layer.freeze()
    same(layer(x), y)
    PackedLinear.convert_packed(layer, packed._packed(layer.integers(), form), dtype)
    same(layer(x), y)


EXPORTED = [
    QuantConfig(4, 8, 16, w_quantizer="ggml_q4_0", a_quantizer="ggml_q8_0"),
    QuantConfig(5, 8, 16, w_quantizer="ggml_q5_0", a_quantizer="ggml_q8_0"),
    QuantConfig(8, 8, 16, w_quantizer="ggml_q8_0", a_quantizer="ggml_q8_0"),
]


@pytest.mark.parametrize(
    ("quant", "dtype"), [*((quant, torch.float32) for quant in EXPORTED), (EXPORTED[0], torch.bfloat16)], ids=str
)
def test_an_exported_file_has_the_bytes_that_ggml_makes_of_the_trained_weights(quant, dtype, tmp_path):
    student = write_student(tmp_path / "final", quant, dtype, config_class=Qwen2Config)  # which permutes no rows
    export.check(student, GGUF)
    export.export(student, tmp_path / "export", GGUF)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "export" / gguf_files.FILE).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    trained = quantizable_linears(tiny_model(Qwen2Config).to(dtype))
    assert len(trained) == 14
    for name, linear in trained.items():
        assert np.array_equal(stored[f"{names.get_name(name)}.weight"], ggmls(linear.weight.detach(), quant.w_bits))
    verified = export.verify(student, tmp_path / "export", GGUF, WINDOWS)
    assert "llama.cpp loads it" in verified.engine
    said = EXPORT_FORMATS[GGUF].deviations(quant)
    assert len(said) == 1
    assert "as trained" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_served_student_computes_what_was_trained(dtype, tmp_path):
    """Packed, simulated and frozen, in fp32: a forward pass of training, bit for bit, whatever its weights' dtype."""
    write_student(tmp_path, EXPORTED[0], dtype)
    trained = prepare(models.load(str(tmp_path), torch.float32), EXPORTED[0])
    expected = trained(ids(trained)).logits
    for model in (qat.load(str(tmp_path)), simulated.load(str(tmp_path), torch.float32)):
        same(model(ids(model)).logits, expected)


def test_only_scales_that_fp16_cannot_hold_are_refused():
    """Those of a row of next to nothing are off by half of fp16's smallest step: it is next to nothing still."""
    gguf_files._check_scale("name", torch.tensor([0.0, -0.0, -0.1, 1e-4, 3e4, 1e-9, -1e-6]))
    for scale in (7e4, torch.inf, torch.nan):
        with pytest.raises(UserError, match="cannot represent"):
            gguf_files._check_scale("name", torch.tensor([0.1, scale]))


def test_the_recipe_trains_what_llama_cpp_runs(tiny_data, tmp_path):
    """On two ranks of ZeRO-3, beside a recipe for training; the export says that all of it is as trained."""
    model = tmp_path / "model"
    tiny_model(head_dim=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    recipes = [f"--config={ROOT / 'launch' / 'recipes' / name}.yaml" for name in ("7b", "llama_cpp")]
    places = [f"--model={model}", f"--data={tiny_data}", f"--output={tmp_path / 'run'}", "--steps=2"]
    finish(start_training(2, *places, *recipes, f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"))
    student = student_folder.find(tmp_path / "run" / "final")
    assert student.quant == replace(EXPORTED[0], kv_bits=8, kv_format="ggml_q8_0/ggml_q4_0")
    export.export(student, tmp_path / "export", GGUF)
    assert "llama.cpp loads it" in export.verify(student, tmp_path / "export", GGUF, WINDOWS).engine
    differences = EXPORT_FORMATS[GGUF].all_deviations(student)
    assert any("-ctk q8_0 -ctv q4_0" in sentence for sentence in differences)
    assert not any("Weights" in sentence for sentence in differences)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vllm", QuantConfig(4, 8, 4, w_scale_dtype="bfloat16", kv_format="vllm_int4")),
        ("w4a4kv4", QuantConfig(4, 4, 4, "minmax_asymmetric", "mse", "mse", kv_rotation="hadamard")),
    ],
)
def test_the_recipes_of_grids_replace_those_of_a_recipe_for_training(name, expected, monkeypatch):
    recipes = [f"--config={ROOT / 'launch' / 'recipes' / one}.yaml" for one in ("7b", name)]
    monkeypatch.setattr(sys, "argv", ["train.py", *recipes])
    quant, _ = cli.parse("", QuantConfig, TrainConfig)
    assert quant == expected


def test_settings_that_contradict_the_blocks_are_refused():
    def refusal(**settings) -> str:
        with pytest.raises(UserError) as refused:
            prepare(tiny_model(intermediate_size=80), QuantConfig(**settings))
        return str(refused.value)

    assert "w_group_size=64 is invalid with w_quantizer=ggml_q4_0" in refusal(w_quantizer="ggml_q4_0", w_group_size=64)
    assert "give w_bits=8" in refusal(w_quantizer="ggml_q8_0")
    assert "give a_bits=8" in refusal(a_bits=4, a_quantizer="ggml_q8_0")
    assert "which has scales of its own" in refusal(w_quantizer="ggml_q4_0", w_scale_dtype="bfloat16")
    assert "has zero points" in refusal(w_quantizer="minmax_asymmetric", w_scale_dtype="bfloat16")
    assert "blocks of 32, which do not divide the model's 80" in refusal(w_quantizer="ggml_q4_0")
    assert "a_quantizer=ggml_q8_0 has blocks of 32" in refusal(a_quantizer="ggml_q8_0")
