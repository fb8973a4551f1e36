"""The KV caches of engines: their bytes, and that what is simulated is what is stored."""

import ctypes

import pytest
import torch
from compiler import needs_compiler, really_compiles
from hypothesis import given, settings
from hypothesis import strategies as st
from students import WINDOWS, write_student
from tiny import ids, tiny_model

import qat
from qat.export import export, model_card
from qat.export.formats import EXPORT_FORMATS, GGUF
from qat.infer import packed, simulated
from qat.infer.integer_cache import IntegerCache
from qat.quant import fused
from qat.quant.config import QuantConfig
from qat.quant.kv_formats import KV_FORMATS
from qat.quant.kv_formats.base import _fused_round
from qat.quant.kv_formats.vllm_int4 import _signs
from qat.quant.prepare import calibrate, prepare
from qat.quant.tensor_scales import tensor_scales_in
from qat.runtime.errors import UserError
from qat.store.compressed_tensors import INT_QUANTIZED, PACK_QUANTIZED, kv_cache_scheme

LARGEST = 4.0
FORMS = {
    name: form.for_tensor(form.scale_of_tensor(LARGEST)) if form.scales_tensors else form
    for name, form in KV_FORMATS.items()
    if not form.adjustable and type(form).__module__.startswith("qat.")  # no plug-ins of tests
}
"""With scales for numbers up to ``LARGEST``, where one must be measured."""
SCALED = [name for name, form in FORMS.items() if form.scales_tensors]
GGML = [name for name, form in KV_FORMATS.items() if form.engine == "llama.cpp"]
PAIR = "ggml_q8_0/ggml_q4_0"
DTYPES = (torch.float32, torch.bfloat16)

KNOWN = ((37 * torch.arange(64)) % 64 - 31).view(1, 1, 1, 64) / 8
"""What the vectors below are of; they come from the engines themselves."""
VECTORS = {
    "ggml_q4_0": "00b8cf379d047be248bf269df36ad148ae15",
    "ggml_q4_1": "3338c0c340d962fb952eb751da730c953ec851ea",
    "ggml_q5_0": "00b4d54aa5568f5d3b08e6b3916e4c19f7c4a27f5d2a",
    "ggml_q8_0": "08288518ad40d467fc9124b94be073089d30c457ec7f14a93cd063f88d20b547dc6f",
    "ggml_iq4_nl": "23a8cf26ae036be138cf159df25bd137be14",
    "vllm_int8": "8518ad40d467fc9124b94be073089d30c457ec7f14a93cd063f88d20b547dc6f",
    "vllm_fp8": "fe6af976f27bd6fc70f878ee7d5efb72",
    "vllm_fp8_unscaled": bytes(KNOWN.to(torch.float8_e4m3fn).view(torch.uint8).flatten().tolist()).hex(),
    "vllm_fp8_scaled": bytes((KNOWN * 64).to(torch.float8_e4m3fn).view(torch.uint8).flatten().tolist()).hex(),
}
ROTATED = {
    "ggml_q4_0": ((0.5, -0.5, -1, 0, 0, -2), "003849c78688484408888888c4440888c4cc"),
    "vllm_int4": (
        (-17.5, -14.5, 21.5, 36.5, -20, -29),
        "76fc464a7c85474c77c88a596acabce4b97c798b9580c88a7ac788b797a6749ba9aaca40",  # a scale with a zero point of 9
    ),
}


def quant_of(name: str) -> QuantConfig:
    return QuantConfig(4, 8, KV_FORMATS[name.split("/")[0]].bits, kv_format=name)


def prepared(name: str, **how):
    """A prepared model, with the scales of the full-precision one."""
    model = prepare(tiny_model(**how), quant_of(name))
    calibrate(model, tiny_model(**how), WINDOWS)
    return model


def begins(packed: torch.Tensor, expected: str) -> bool:
    return packed.numpy().tobytes().hex().startswith(expected)


@pytest.mark.parametrize("name", VECTORS)
def test_known_bytes(name):
    assert begins(FORMS[name].encode(KNOWN), VECTORS[name])


@pytest.mark.parametrize("name", ROTATED)
def test_known_rotations(name):
    form, (first, expected) = KV_FORMATS[name], ROTATED[name]
    rotated = form.values(KNOWN)
    assert rotated[0, 0, 0, :6].tolist() == list(first)
    assert begins(form.encode(rotated), expected)


def test_vllms_signs():
    assert "".join("-+"[int(sign > 0)] for sign in _signs(64, torch.device("cpu"))[:16]) == "+-++----+--++-+-"


@pytest.fixture(scope="session")
def ggml() -> ctypes.CDLL:
    """ggml's own functions, as the CPU engine calls them."""
    import xllamacpp.xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_cpu_init()
    return library


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("kind", ["normal", "heavy", "bf16", "ties", "small", "large"])
def test_bytes_and_numbers_are_ggmls(name, kind, ggml):
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    x = {
        "normal": x,
        "heavy": x**3,
        "bf16": x.bfloat16().float(),
        "ties": torch.round(4 * x) / 4,
        "small": x * 1e-6,
        "large": x * 1e3,
    }[kind]
    form, (of, size) = KV_FORMATS[name], (ctypes.c_void_p, ctypes.c_int64(x.numel()))
    ours = form.encode(x.view(1, 1, 1, -1)).flatten()
    theirs, numbers = torch.empty_like(ours), torch.empty_like(x)
    getattr(ggml, f"quantize_row_{form.type}")(of(x.data_ptr()), of(theirs.data_ptr()), size)
    getattr(ggml, f"dequantize_row_{form.type}")(of(theirs.data_ptr()), of(numbers.data_ptr()), size)
    assert torch.equal(ours, theirs)
    assert torch.equal(form.decode(ours.view(1, 1, 1, -1), 1, torch.float32).view_as(x), numbers)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=15)
@given(
    st.integers(1, 4),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 100.0]),
    st.integers(0, 99),
)
def test_fake_equals_stored(name, tokens, head_dim, size, seed):
    """Zeros, outliers and heads of one sign included; bf16 too."""
    x = torch.randn(2, 3, tokens, head_dim, generator=torch.Generator().manual_seed(seed)) * size
    x[:, 0, 0, 0] *= 1e3
    x[:, 1] = x[:, 1].abs() + size
    for dtype in DTYPES:
        form = FORMS[name]
        fake, stored = form.round(x.to(dtype), dtype), form.encode(x.to(dtype))
        assert stored.dtype == torch.uint8
        assert stored.shape[:-1] == x.shape[:-1]
        assert torch.equal(form.decode(stored, 3, dtype), fake)
        assert fake.dtype == dtype


@pytest.mark.parametrize("name", FORMS)
def test_nothing_hides_a_nan(name):
    x = torch.randn(1, 1, 3, 64)
    x[0, 0, 1, 7] = torch.nan
    found = FORMS[name].round(x, torch.float32)
    lost = {"vllm_fp8_unscaled": 7, "vllm_fp8_scaled": 7, "nvfp4": slice(16)}  # what shares its scale
    assert found[0, 0, 1, lost.get(name, slice(32))].isnan().all()
    assert not found[0, 0, ::2].isnan().any()


@pytest.mark.parametrize("name", ["vllm_int4", "ggml_q4_0"])
def test_compiled_equals_eager(name, monkeypatch):
    """A scale that compiled code leaves in fp32, where it is stored in fp16, shows here."""
    needs_compiler()
    form, x = KV_FORMATS[name], torch.randn(1, 2, 9, 64)
    found = []
    for compiles in (really_compiles, lambda device: False):
        monkeypatch.setattr(fused, "compiles", compiles)
        found.append(_fused_round(x.view(-1, form.block or 64), form, torch.bfloat16))
    for compiled, eager in zip(*found, strict=True):
        assert (compiled is None and eager is None) or torch.equal(compiled, eager)


@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_passes_but_where_a_value_was_clipped(name):
    form, x = FORMS[name], torch.randn(1, 2, 5, 64).requires_grad_()
    values = form.round(x, torch.float32)
    values.backward(torch.ones_like(values))
    passes, error = x.grad == 1, (x - values).abs()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
    assert passes.all() or (name not in SCALED and form.clips)
    assert passes.float().mean() > 0.9
    if not passes.all():
        assert error[~passes].min() > 0.9 * error[passes].mean(), "what was clipped is far from its value"


def test_what_clips_in_q4_0():
    """-8 is the first code, so 7 the last: 7.5 steps and more, of the other sign, have no gradient."""
    x = torch.zeros(1, 1, 1, 32)
    x[..., :5] = torch.tensor([-8.0, 7.0, 7.4, 7.5, 8.0])
    x.requires_grad_()
    KV_FORMATS["ggml_q4_0"].round(x, torch.float32).sum().backward()
    assert x.grad[0, 0, 0, :6].tolist() == [1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(("name", "scale"), [("vllm_fp8_unscaled", 1), ("vllm_fp8_scaled", 2**-3)])
def test_what_clips_with_a_scale_and_without_one(name, scale):
    form = KV_FORMATS[name].for_tensor(scale) if name in SCALED else KV_FORMATS[name]
    x = (torch.tensor([447.0, 448, 449, 1e6, -448, -464, 0.001, 0]) * scale).view(1, 1, 1, 8).requires_grad_()
    found = form.round(x, torch.float32)
    found.sum().backward()
    assert (found / scale).flatten().tolist() == [448, 448, 448, 448, -448, -448, 2**-9, 0]
    assert x.grad.flatten().tolist() == [1, 1, 0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "head_dim"), [(PAIR, 128), ("vllm_int4", 96), ("ggml_q4_1", 32), *((name, 64) for name in FORMS)]
)
def test_cached_decoding_equals_the_full_forward(name, head_dim):
    model = prepared(name, num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim).double()
    tokens = ids(model, batch=2, tokens=10)
    full = model(tokens).logits
    cache = IntegerCache(model)
    steps = [model(tokens[:, :5], past_key_values=cache).logits]
    steps += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(5, 10)]
    torch.testing.assert_close(torch.cat(steps, 1), full)
    keys, values = quant_of(name).kv_formats
    bits = keys.stored_bits(head_dim) + values.stored_bits(head_dim)
    assert cache.nbytes() == 2 * 2 * 10 * head_dim * bits / 8, "layers, batch, tokens"


@pytest.mark.parametrize("name", ["vllm_int4", PAIR, *SCALED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_student_trains_and_gradient_checkpointing_is_exact(name, dtype):
    gradients = []
    for checkpointing in (False, True):
        model = prepared(name, head_dim=64, dtype=dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(model), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][parameter]), parameter
        assert gradient.any(), f"{parameter} learns"


@pytest.mark.parametrize("name", ["vllm_int4", PAIR, *SCALED])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_the_cache_equals_generate_without(name, beams):
    model = prepared(name, head_dim=64).double()
    prompt, mask = ids(model, batch=2, tokens=6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    how = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, use_cache=False, **how)
    assert torch.equal(model.generate(prompt, past_key_values=IntegerCache(model), **how), expected)


@pytest.mark.parametrize("name", ["vllm_int4", PAIR, *SCALED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_loaded_equals_the_simulation(name, dtype, tmp_path):
    write_student(tmp_path, quant_of(name), dtype, head_dim=64)
    model, simulation = qat.load(str(tmp_path)), simulated.load(str(tmp_path), torch.float32)
    tokens = ids(model, batch=2)
    assert torch.equal(model(tokens).logits, simulation(tokens).logits)
    held = packed.memory(model).cache_per_token
    keys, values = quant_of(name).kv_formats
    assert held == 2 * 2 * 64 * (keys.stored_bits(64) + values.stored_bits(64)) / 8, "layers and heads"


@pytest.mark.parametrize("name", FORMS)
def test_more_bits_are_nearer_and_rotations_cancel(name):
    tokens = ids(tiny_model())
    exact = tiny_model(head_dim=64)(tokens).logits.log_softmax(-1)
    student = prepare(tiny_model(head_dim=64), QuantConfig(16, 16, KV_FORMATS[name].bits, kv_format=name))
    calibrate(student, tiny_model(head_dim=64), WINDOWS)
    found = student(tokens)
    error = (found.logits.log_softmax(-1) - exact).square().mean().sqrt()
    assert error < {8: 0.1, 5: 0.4, 4: 0.8}[KV_FORMATS[name].bits]


def test_layers_may_differ(tmp_path):
    quant = QuantConfig(
        kv_bits=8,
        kv_format="ggml_q8_0",
        overrides={"model.layers.1.*": {"kv_bits": 4, "kv_format": "ggml_q4_0"}, "model.layers.0.*": {"w_bits": 8}},
    )
    quant.save(tmp_path)
    assert QuantConfig.load(tmp_path) == quant
    model = prepare(tiny_model(head_dim=32), quant)
    assert [layer.self_attn.kv_quantizer.keys.type for layer in model.model.layers] == ["q8_0", "q4_0"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kv_format": "q4_0"}, r"kv_format='q4_0' is invalid: choose int or vllm_int4 or .* or ggml_iq4_nl"),
        ({"kv_format": "ggml_q8_0"}, "kv_bits=4 is invalid with kv_format=ggml_q8_0: give kv_bits=8"),
        ({"kv_format": "ggml_q4_0/ggml_q8_0", "kv_bits": 8}, "give kv_bits=4"),
        ({"kv_format": "ggml_q4_0/vllm_int4"}, "No engine stores .*ggml_q4_0/vllm_int4: give one format, or two of"),
        ({"kv_format": "vllm_int4/vllm_int8"}, "No engine stores"),
        ({"kv_format": "int/ggml_q4_0"}, "No engine stores"),
        ({"kv_format": "ggml_q4_0/ggml_q4_0/ggml_q4_0"}, "is unknown"),
        ({"kv_format": "ggml_q4_0", "kv_rotation": "hadamard"}, "kv_rotation=hadamard is invalid with kv_format="),
        ({"kv_format": "vllm_int4", "kv_granularity": "token"}, "kv_granularity=token is invalid"),
        ({"kv_format": "vllm_int4", "kv_site": "pre_rope"}, "kv_site=pre_rope is invalid"),
        ({"overrides": {"*": {"kv_bits": 8}}, "kv_format": "ggml_q4_0"}, "give kv_bits=4"),
    ],
)  # fmt: skip
def test_refusals(given, named):
    with pytest.raises(UserError, match=named):
        QuantConfig(**given)


@pytest.mark.parametrize(("name", "block", "head_dim"), [("ggml_q4_0", 32, 16), ("nvfp4", 16, 8)])
def test_heads_that_do_not_fit_are_refused(name, block, head_dim):
    with pytest.raises(UserError, match=f"blocks of {block} channels, .* heads have {head_dim}: give kv_format=int"):
        prepare(tiny_model(head_dim=head_dim), quant_of(name))


@pytest.mark.parametrize("name", SCALED)
def test_scales_are_those_of_the_full_precision_cache(name):
    """transformers' own cache has the keys after RoPE, and the values; the model that is measured stays as it was."""
    model, teacher = prepare(tiny_model(), quant_of(name)), tiny_model()
    assert model(WINDOWS).logits.isnan().any(), "scales that nobody measured must be noticed"
    before = teacher(WINDOWS)
    calibrate(model, teacher, WINDOWS)
    assert torch.equal(teacher(WINDOWS).logits, before.logits)
    form, found = KV_FORMATS[name], tensor_scales_in(model)
    for number, layer in enumerate(before.past_key_values.layers):
        for part, held in (("keys", layer.keys), ("values", layer.values)):
            expected = form.scale_of_tensor(form.margin * held.abs().max().item())
            assert found.pop(f"model.layers.{number}.self_attn.{part}") == expected
    assert not found
    assert model(WINDOWS).logits.isfinite().all()


def test_fp8_with_a_scale_is_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    scheme = kv_cache_scheme([quant_of("vllm_fp8_scaled")])
    x = torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(0)) ** 3
    theirs = fake_quantize(x, torch.tensor([2.0**-5]), None, QuantizationArgs(**scheme))
    assert (x.abs() > 448 / 32).any()
    assert torch.equal(KV_FORMATS["vllm_fp8_scaled"].for_tensor(2.0**-5).round(x, x.dtype), theirs)


def test_full_precision_stays_full_precision():
    quant = QuantConfig(16, 16, 16, kv_format="ggml_q4_0")
    tokens = ids(tiny_model())
    assert torch.equal(prepare(tiny_model(), quant)(tokens).logits, tiny_model()(tokens).logits)


def test_files_name_a_format_only_if_it_is_not_the_default(tmp_path):
    QuantConfig().save(tmp_path)
    assert "kv_format" not in (tmp_path / "quant_config.json").read_text()
    quant_of(PAIR).save(tmp_path)
    assert QuantConfig.load(tmp_path) == quant_of(PAIR)


@pytest.mark.parametrize(
    ("form", "name", "flags", "served"),
    [
        (GGUF, PAIR, "-ctk q8_0 -ctv q4_0 -fa on", ";"),
        (GGUF, "vllm_int4", "", ""),
        (PACK_QUANTIZED, "vllm_int4", "--kv-cache-dtype int4_per_token_head", " (GPUs rotate in bf16"),
        (PACK_QUANTIZED, "vllm_fp8", "--kv-cache-dtype fp8_per_token_head", " (GPUs divide"),
        (PACK_QUANTIZED, "vllm_fp8_unscaled", "--kv-cache-dtype fp8", " (FlashAttention 3 rounds queries"),
        (PACK_QUANTIZED, "ggml_q8_0", "", ""),
        (PACK_QUANTIZED, "vllm_fp8_scaled", "--kv-cache-dtype fp8", " (FlashAttention 3 rounds queries"),
        (INT_QUANTIZED, "vllm_fp8_scaled", "--kv-cache-dtype fp8", " (FlashAttention 3 rounds queries"),
        (GGUF, "vllm_fp8_scaled", "", ""),
        (PACK_QUANTIZED, "nvfp4", "", ""),
        (INT_QUANTIZED, "vllm_int8", "", ""),  # vLLM on CPUs has no such cache
    ],
)
def test_exports_name_the_flag_that_serves_what_was_trained(form, name, flags, served, tmp_path):
    student = write_student(tmp_path / "final", quant_of(name), head_dim=64)
    assert EXPORT_FORMATS[form].cache_flags(student.quant) == flags
    (said,) = (sentence for sentence in EXPORT_FORMATS[form].all_deviations(student) if "KV cache" in sentence)
    assert f"trained as {name}" in said
    assert not flags or f"{flags}{served}" in said
    export.export(student, tmp_path / "export", form)
    model_card.write(student, form, model_card.Origin("", ""), "", tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert bool(flags) == ("with the KV cache as trained" in card)
    mixed = QuantConfig(kv_bits=8, kv_format="ggml_q8_0", overrides={"model.layers.0.*": {"kv_bits": 16}})
    assert "as trained\n" not in model_card._serving(EXPORT_FORMATS[GGUF], mixed, "name")
