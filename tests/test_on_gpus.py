"""What runs on a GPU, run without one: on fake tensors, which have a device, a dtype and a shape, and no values.

A tensor left on the CPU that meets one on the GPU raises here as it would there; what comes out must lie on the GPU, in
the dtype that went in, and scales in fp32. Values, speed and what CUDA refuses for its sizes, but for those of integer
products, are for a GPU to show.
"""

import ctypes
import functools
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CONFIG, FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, MistralConfig

from datagen import attention, sampling
from datagen.decoder import Decoder
from qat.evaluate.perplexity import score_windows
from qat.infer import packed
from qat.infer.integer_cache import IntegerCache
from qat.ptq import METHODS as POST_TRAINING
from qat.ptq import smoothquant
from qat.ptq import stream as calibration
from qat.quant import hadamard, kernels, products
from qat.quant.config import QuantConfig
from qat.quant.kv_formats import KV_FORMATS, vllm_int4
from qat.quant.kv_formats.integers import Integers
from qat.quant.linear import QuantLinear
from qat.quant.number_format import Format, dequantize, fake_quantize, inside, quantize, round_to_grid
from qat.quant.packing import STAND_IN, makes_rows, pack, pack_rows, stand_in, stand_in_rows, unpack
from qat.quant.prepare import freeze, prepare
from qat.quant.quantizers import QUANTIZERS
from qat.quant.rotated import RECORD, Rotation, causal_lm_class
from qat.quant.tensor_scales import measured, set_tensor_scales
from qat.runtime import machine
from qat.store import model_folder, weight_files
from qat.train import distill
from qat.train.distill import Distiller, LabelTargets, TeacherTargets, TopKTargets
from qat.train.losses import LOSSES
from qat.train.rotations import cayley

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.addr_, aten.matmul, aten.linear, aten._int_mm)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # which knows inputs again

DTYPES = [torch.bfloat16, torch.float32]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
"""GPTQ goes through channel by channel."""


class Answers(TorchDispatchMode):
    """Fake tensors have no values. Who asks for one is told 1, or that tensors are equal; a mask selects everything."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.equal.default:
            _ = args[0] == args[1]  # raises if they lie on two devices
            return True
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], [_everything(index) for index in args[1]], *args[2:])
        if func.overloadpacket in PRODUCTS:  # which CUDA wants of one dtype, and fake tensors do not mind
            assert len({x.dtype for x in args if isinstance(x, Tensor)}) == 1, func
        if func.overloadpacket is aten._int_mm:  # whose sizes only CUDA checks
            (rows, inner), (_, outs) = (x.shape for x in args)
            assert rows > 16, rows
            assert inner % 8 == outs % 8 == 0, (inner, outs)
        return func(*args, **(kwargs or {}))


def _everything(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool:
        return index
    return torch.arange(len(index), device=index.device)


@classmethod
def forward_then_backward(cls, *args):
    """In the place of a Function's apply. The autograd engine itself wants the GPU; our part of it does not."""
    needs = tuple(isinstance(x, Tensor) and x.is_floating_point() for x in args)
    ctx = SimpleNamespace(needs_input_grad=needs, mark_non_differentiable=lambda *tensors: None)
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    result = cls.forward(ctx, *args)
    outputs = result if isinstance(result, tuple) else (result,)
    gradients = cls.backward(ctx, *[torch.ones_like(output) for output in outputs])
    assert len(gradients) == len(args)
    for x, gradient in zip(args, gradients, strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            check(gradient, x.dtype, x.shape)
    return result


def check(x: Tensor, dtype: torch.dtype, shape=None) -> None:
    assert x.device == GPU
    assert x.dtype == dtype
    assert shape is None or x.shape == shape


class Moved:
    """In the place of Module._apply, by which modules move: a fake tensor cannot take the place of another in it."""

    def __init__(self):
        self.made = {}

    def __get__(self, module, kind=None):
        return functools.partial(self, module)

    def __call__(self, module, change, recurse=True):
        for child in module.children():
            self(child, change)
        for name, old in module.named_parameters(recurse=False):
            if (id(old), id(change)) not in self.made:  # tied weights stay one; who is kept here keeps its id
                new = torch.nn.Parameter(change(old.detach()), requires_grad=old.requires_grad)
                self.made[id(old), id(change)] = new, old, change
            module.register_parameter(name, self.made[id(old), id(change)][0])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, change(buffer))
        return module


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> None:
    """What torch does around each call on a GPU, made to do nothing: a build for CPUs has no such thing."""
    if torch.backends.cuda.is_built():
        return
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    source, home = tmp_path_factory.mktemp("guard") / "guard.cpp", Path(torch.__file__).parent
    source.write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }\n"
    )
    library, flags = source.with_suffix(".so"), ["-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}"]
    subprocess.run(["g++", *flags, source, "-o", library, f"-L{home / 'lib'}", "-lc10"], check=True)
    ctypes.CDLL(str(library))


@pytest.fixture
def gpu(student, guard, monkeypatch):
    """Fake tensors, and a GPU for all who ask for this process's."""
    monkeypatch.setattr(torch.autograd.Function, "apply", forward_then_backward)
    # DeepSpeed leaves a Function of its own there, once it has partitioned a model in this process.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    monkeypatch.setattr(machine, "device", lambda: GPU)
    monkeypatch.setattr(calibration, "device", lambda: GPU)
    monkeypatch.setattr(machine, "inference_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(products, "integer_product", lambda device, qmax: products.int_mm)  # a trial needs values
    monkeypatch.setattr(kernels, "on", lambda device: None)
    monkeypatch.setattr(Decoder, "_new_graphs", lambda self: None)
    monkeypatch.setattr(model_folder, "check_runs", lambda model, directory: None)  # it computes without this mode
    hadamard.hadamard_matrix.cache_clear()
    vllm_int4._signs.cache_clear()
    monkeypatch.setattr(torch.nn.Module, "_apply", Moved())
    with FakeTensorMode() as mode, Answers():
        opened = weight_files.safe_open
        monkeypatch.setattr(weight_files, "safe_open", lambda *args, **how: Read(opened, mode, *args, **how))
        yield
    hadamard.hadamard_matrix.cache_clear()
    vllm_int4._signs.cache_clear()


@pytest.fixture
def started(gpu, monkeypatch) -> list:
    """Our kernels are used, and do nothing; the tensors that each of those that started was given."""
    host = pytest.importorskip("qat.quant.kernels.host", reason="needs Triton (requirements-dev.txt)")
    calls = []

    class Kernel:
        fn = staticmethod(lambda: None)

        def __getitem__(self, grid):
            return lambda *args, **how: calls.append([x for x in args if isinstance(x, Tensor)])

    for name in (
        "round",
        "values",
        "multiply",
        "norm",
        "norm_gradients",
        "gated",
        "gated_gradients",
        "unpair",
        "stored_values",
    ):
        monkeypatch.setattr(host.device, name, Kernel())
    monkeypatch.setattr(host, "current", lambda x: nullcontext())
    monkeypatch.setattr(kernels, "on", {"cuda": host}.get)
    monkeypatch.setattr(products, "own_is_faster", lambda *trial: True)
    return calls


class Read:
    """A safetensors file whose tensors become fake ones, on the CPU."""

    def __init__(self, opened, mode, *args, **how):
        self.file, self.mode = opened(*args, **how), mode

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return self.file.get_slice(name)

    def get_tensor(self, name):
        with unset_fake_temporarily():
            tensor = self.file.get_tensor(name)
        return self.mode.from_tensor(tensor)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """On disk, and written before any tensor is fake."""
    directory = tmp_path_factory.mktemp("student")
    tiny_model(dtype=torch.bfloat16, **SMALL).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    QuantConfig(kv_rotation="hadamard").save(directory)
    return directory


def model_on_gpu(dtype=torch.bfloat16, family=LlamaConfig, **changes):
    return tiny_model(family, dtype=dtype, num_hidden_layers=1, **changes).requires_grad_(False).to(GPU)


def tokens_on_gpu(count=24, batch=1):
    return torch.zeros(batch, count, dtype=torch.int64, device=GPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("method", QUANTIZERS)
def test_quantizers(method, group_size, dtype, gpu):
    by = QUANTIZERS[method]
    bits, group_size = 4 if 4 in by.allowed_bits else by.allowed_bits[0], by.group_size or group_size
    x, form = torch.randn(3, 5, 32, device=GPU, dtype=dtype), Format(bits, method, group_size, tensor_scale=512.0)
    groups = (3, 5, 32 // group_size if group_size else 1)
    if form.learned:
        step = torch.ones(1, device=GPU, dtype=dtype)
        check(form.learned.fake_quantize(x, step, form.qmax), dtype, x.shape)
        return
    quantized = quantize(x, form)
    values, grid = round_to_grid(x, form)
    check(quantized.codes, by.code_dtype, x.shape)
    for found in (grid, quantized.grid):
        for part in found:
            assert part is None or check(part, torch.float32, groups) is None
    for rounded in (values, dequantize(quantized, dtype), round_to_grid(x, form, grid)[0]):
        check(rounded, dtype, x.shape)
    check(quantize(x, form, grid).codes, by.code_dtype, x.shape)
    read = unpack(pack(quantized, form), form)
    check(read.codes, by.code_dtype, x.shape)
    check(read.grid.scale, torch.float32, groups)
    if makes_rows(form, (6, 32), parts=2):
        weight = x.flatten(0, 1)[:6].clone()
        setattr(weight, STAND_IN, torch.stack([pack_rows(quantize(part, form), form) for part in weight.split(3)]))
        for read in (stand_in(weight, form), stand_in_rows(weight, form, torch.arange(6, device=GPU))):
            check(read.codes, by.code_dtype, weight.shape)
            check(read.grid.scale, torch.float32, (6, groups[-1]))
    if form.clips:
        check(inside(x, form, grid), torch.bool, x.shape)
    else:
        check(fake_quantize(x, form), dtype, x.shape)


VOCABULARY = QuantConfig(overrides={"model.embed_tokens": {"w_bits": 8}, "lm_head": {"w_bits": 8, "a_bits": 8}})
QUANTS = [
    QuantConfig(),
    VOCABULARY,
    QuantConfig(overrides={"lm_head": {"w_bits": 3, "w_quantizer": "statsq", "w_group_size": 16}}),
    QuantConfig(
        w_quantizer="minmax_asymmetric", a_quantizer="minmax_asymmetric", kv_quantizer="minmax_asymmetric", kv_bits=8
    ),
    QuantConfig(w_quantizer="statsq", a_quantizer="lsq", kv_granularity="token"),
    QuantConfig(w_group_size=16, kv_rotation="hadamard"),
    QuantConfig(w_quantizer="ggml_q4_0", a_quantizer="ggml_q8_0"),
    QuantConfig(kv_site="pre_rope", kv_granularity="token"),
    QuantConfig(kv_site="pre_rope", w_bits=16),
    QuantConfig(a_bits=16, kv_rotation="hadamard", kv_granularity="token"),
    QuantConfig(w_quantizer="nvfp4", a_quantizer="fp8", kv_bits=8, kv_quantizer="fp8"),
]


@pytest.mark.parametrize(
    ("quant", "dtype"), [*((quant, torch.bfloat16) for quant in QUANTS), (QUANTS[0], torch.float32)]
)
def test_a_students_forward_and_backward(quant, dtype, gpu):
    model = prepared(model_on_gpu(dtype), quant)
    check_layers(model, dtype)
    check(model(tokens_on_gpu()).logits, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", [QUANTS[0], QUANTS[3], QUANTS[5]], ids=["symmetric", "zero points", "groups"])
def test_a_students_kernels(quant, dtype, started):
    """What they are given and make lies on the GPU, in memory as they read it."""
    model = prepared(model_on_gpu(dtype), quant)
    check_layers(model, dtype)
    check(model(tokens_on_gpu()).logits, dtype)
    assert started
    for first, *others in started:
        assert first.device == GPU
        assert first.stride(-1) == 1
        assert all(x.device == GPU and x.is_contiguous() for x in others if x.dtype != torch.int8)


@pytest.mark.parametrize("quant", [QuantConfig(), VOCABULARY], ids=["decoder", "vocabulary too"])
def test_a_frozen_student(quant, gpu):
    model = prepared(model_on_gpu(), quant)
    freeze(model)
    check_layers(model, torch.bfloat16)
    check(model(tokens_on_gpu()).logits, torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns", "outs"), [(1, 13, 11), (16, 16, 9), (33, 8, 8)])
def test_an_integer_product_of_any_size(rows, columns, outs, gpu):
    codes, weight = (torch.zeros(size, columns, dtype=torch.int8, device=GPU) for size in (rows, outs))
    check(products.int_mm(codes, weight), torch.int32, (rows, outs))


def test_a_rotated_student(gpu):
    """R4, and the map in front of a tied output layer; its rotations take steps in fp64."""
    config = LlamaConfig(**{**CONFIG, **SMALL, "intermediate_size": 24, "num_hidden_layers": 1})
    setattr(config, RECORD, Rotation("hadamard", head_map=True).record())
    model = causal_lm_class(config)._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").to(GPU)
    model = prepared(model.requires_grad_(False), QuantConfig(kv_rotation="hadamard"))
    check_layers(model, torch.bfloat16)
    check(model(tokens_on_gpu()).logits, torch.bfloat16)
    targets = LabelTargets(tokens_on_gpu()[0, 1:])
    check(Distiller(model)(tokens_on_gpu(), targets)[0], torch.float32, ())
    matrix = torch.eye(16, dtype=torch.float64, device=GPU)
    check(cayley(matrix, torch.zeros(16, 16, device=GPU), 0.5), torch.float64, (16, 16))


def prepared(model, quant: QuantConfig):
    """A student; its learned steps go where the engine would put them."""
    model = prepare(model, quant)
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.input_step is not None:
            module.input_step = torch.nn.Parameter(module.input_step.to(GPU), requires_grad=False)
    return model


def check_layers(model, dtype) -> None:
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(lambda module, inputs, output: check(output, dtype))


def targets(loss: str, kind: str, teacher, tokens):
    if kind == "label":
        return LabelTargets(tokens[0, 1:], LOSSES[loss])
    if kind == "top k":
        likely = torch.zeros(tokens.shape[1] - 1, 5, dtype=torch.int32, device=GPU)
        return TopKTargets(likely, likely.half())
    hidden, records = LOSSES[loss].run(teacher, tokens)
    return TeacherTargets(hidden, teacher.lm_head.weight, LOSSES[loss], records)


@pytest.mark.parametrize("quant", QUANTS[1:3], ids=["codes", "clipped values"])
def test_distillation_by_a_quantized_output_layer(quant, gpu, monkeypatch):
    """Over several chunks and blocks."""
    monkeypatch.setitem(distill.CHUNK_TOKENS, "cuda", 10)
    monkeypatch.setattr(distill, "VOCABULARY_BLOCK", 128)
    student = Distiller(prepare(model_on_gpu(), quant))
    check(student(tokens_on_gpu(), LabelTargets(tokens_on_gpu()[0, 1:]))[0], torch.float32, ())


@pytest.mark.parametrize(
    ("loss", "kind", "dtype"),
    [
        ("label", "label", torch.bfloat16),
        ("logits", "top k", torch.bfloat16),
        ("logits", "teacher", torch.float32),
        ("logits+hidden", "teacher", torch.bfloat16),
        ("logits+attention", "teacher", torch.bfloat16),
    ],
)
def test_distillation(loss, kind, dtype, gpu, monkeypatch):
    monkeypatch.setitem(distill.CHUNK_TOKENS, "cuda", 10)
    teacher = model_on_gpu(dtype, MistralConfig, sliding_window=6)
    student = Distiller(prepare(model_on_gpu(dtype, MistralConfig, sliding_window=6), QuantConfig()))
    for learned in student(tokens_on_gpu(), targets(loss, kind, teacher, tokens_on_gpu())):
        check(learned, torch.float32, ())
    with torch.no_grad():
        check(student(tokens_on_gpu(), LabelTargets(tokens_on_gpu()[0, 1:]))[0], torch.float32, ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "method", "rotation", "granularity"),
    [(4, "minmax", "hadamard", "token_head"), (8, "minmax_asymmetric", "none", "token")],
)
def test_keys_and_values(bits, method, rotation, granularity, dtype, gpu):
    kv, keys = (
        Integers(Format(bits, method), granularity, rotation),
        torch.randn(2, 2, 9, 16, device=GPU, dtype=dtype),
    )
    check(kv.round(kv.keys(keys), dtype), dtype, keys.shape)
    projected = keys.transpose(1, 2).flatten(2)
    check(kv.projection(projected, 16), dtype, projected.shape)
    quant = QuantConfig(kv_bits=bits, kv_quantizer=method, kv_rotation=rotation, kv_granularity=granularity)
    check_cached(prepare(model_on_gpu(dtype), quant), dtype)


@pytest.mark.parametrize("name", [name for name, form in KV_FORMATS.items() if not form.adjustable])
def test_caches_of_formats(name, gpu):
    quant = QuantConfig(kv_bits=KV_FORMATS[name].bits, kv_format=name)
    model = prepare(model_on_gpu(head_dim=64), quant)
    set_tensor_scales(model, dict.fromkeys(measured(model, quant), 1.0))
    check_cached(model, torch.bfloat16)
    check(model(tokens_on_gpu(9, 2)).logits, torch.bfloat16)


def check_cached(model, dtype):
    cache = IntegerCache(model)
    for count in (9, 1):
        check(model(tokens_on_gpu(count, 2), past_key_values=cache).logits, dtype)
    for layer in cache.layers:
        for stored in (layer.keys, layer.values):
            check(stored, torch.uint8)
            assert stored.shape[-2] == 10


def test_a_packed_model(student, gpu, monkeypatch):
    model = packed.load(str(student))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device == GPU, name
    check_layers(model, torch.bfloat16)
    cache = model.new_cache()
    for count in (24, 1):
        check(model(tokens_on_gpu(count), past_key_values=cache).logits, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_as_students_and_in_the_decoder(family, gpu):
    more = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "attention_bias": True}
    student, teacher = (model_on_gpu(family=family, hidden_act="gelu", **more) for _ in range(2))
    check(prepared(student, QuantConfig(kv_rotation="hadamard"))(tokens_on_gpu()).logits, torch.bfloat16)
    decoder = Decoder(teacher, 4, 40, sampling.Truncation(0.7, 20, 0.9))
    on_host = torch.zeros(4, dtype=torch.int64)
    with torch.inference_mode():
        check(decoder.logits(on_host.to(GPU), on_host.to(GPU), 8), torch.float32, (4, 300))
    decoder.keep(torch.tensor([0, 2]))
    two = on_host[:2]
    chosen, surprisal, logits = decoder.step(two, two, two == 0, two.double())
    check(logits, torch.float32, (2, 300))
    assert (chosen.device.type, chosen.dtype) == ("cpu", torch.int64)
    assert (surprisal.device.type, surprisal.dtype) == ("cpu", torch.float64)


def test_the_decoders_attention_kernel(gpu, monkeypatch):
    """What it is given lies on the GPU, in memory as it reads it."""
    own = pytest.importorskip("datagen.attention_triton", reason="needs Triton (requirements-dev.txt)")
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **how: calls.append([x for x in args if isinstance(x, Tensor)])

    monkeypatch.setattr(own, "_attend", Kernel())
    monkeypatch.setattr(own, "_together", Kernel())
    monkeypatch.setattr(own, "current", lambda x: nullcontext())
    monkeypatch.setattr(attention, "kernel_on_gpu", lambda *sizes: own)
    decoder = Decoder(model_on_gpu(), 4, 600)
    four = torch.arange(4)
    check(decoder.step(four, four).logits, torch.float32, (4, 300))
    assert len(calls) == 2 * len(decoder.layers)
    assert all(x.device == GPU and x.is_contiguous() for call in calls for x in call)


def test_sampling(gpu):
    logits, draw = torch.randn(4, 3000, device=GPU), torch.zeros(4, dtype=torch.float64, device=GPU)
    for truncation in (sampling.Truncation(), sampling.Truncation(0.7, 20, 0.9)):
        chosen, surprisal = sampling.choose(logits, draw > 0, draw, truncation)
        check(chosen, torch.int64, (4,))
        check(surprisal, torch.float64, (4,))


def test_evaluation(gpu):
    model, teacher = prepare(model_on_gpu(), QuantConfig()), model_on_gpu()
    assert len(score_windows(model, torch.zeros(2, 24, dtype=torch.int64), teacher, progress=False)) == 2


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_a_layer_of_a_post_training_method(method, student, gpu, monkeypatch):
    monkeypatch.setattr(smoothquant, "ALPHAS", (0.5,))
    quant = QuantConfig(w_quantizer="minmax_asymmetric", w_group_size=16)
    stream = calibration.Stream(student, quant, [torch.zeros(1, 24, dtype=torch.int64)])
    weights = stream.files.layer(0)
    kind = POST_TRAINING[method]
    rounded, grids, _ = kind(student, kind.config()).quantize_layer(stream, weights)
    assert len(grids) == (7 if method == "gptq" else 0)
    for name, weight in rounded.items():
        assert (weight.device.type, weight.dtype) == ("cpu", torch.bfloat16), name
    for grid in grids.values():
        assert {(part.device.type, part.dtype) for part in grid if part is not None} == {("cpu", torch.float32)}
    stream.advance(rounded, grids)
    assert {(x.device.type, x.dtype) for x in stream.hidden} == {("cpu", torch.bfloat16)}
