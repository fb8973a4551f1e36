"""Students of NVFP4, MXFP4 and FP8, exported: read back, by others too, they are what was trained."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, finish, kill, run_python, start_training
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from students import WINDOWS, write_student
from tiny import ids, tiny_model
from training import losses
from transformers import AutoModelForCausalLM

import qat
from qat.data.sequences import TrainingData
from qat.export import export, model_card
from qat.export.formats import EXPORT_FORMATS, GGUF
from qat.infer import packed, simulated
from qat.ptq import gptq, stream
from qat.ptq.smoothquant import SmoothQuant
from qat.quant.config import CONFIG_FILE, SCALES_FILE, QuantConfig
from qat.quant.linear import quant_linears
from qat.quant.number_format import Format, dequantize, quantize
from qat.quant.prepare import calibrate, prepare
from qat.quant.tensor_scales import set_tensor_scales, tensor_scales_in
from qat.runtime.errors import UserError
from qat.store import models, student_folder
from qat.store.compressed_tensors import FLOAT_QUANTIZED, INT_QUANTIZED, LAYOUTS, MXFP4, NVFP4, PACK_QUANTIZED
from qat.store.sidecars import save_tensor_scales
from qat.train.config import TrainConfig

CASES = [
    (NVFP4, QuantConfig(4, 16, 16, w_quantizer="nvfp4")),
    (NVFP4, QuantConfig(4, 8, 8, w_quantizer="nvfp4", a_quantizer="fp8", kv_quantizer="fp8", kv_rotation="hadamard")),
    (NVFP4, QuantConfig(4, 4, 8, w_quantizer="nvfp4", a_quantizer="nvfp4", kv_granularity="token")),
    (MXFP4, QuantConfig(4, 4, 4, w_quantizer="mxfp4", a_quantizer="mxfp4", kv_quantizer="mxfp4")),
    (FLOAT_QUANTIZED, QuantConfig(8, 8, 8, w_quantizer="fp8", a_quantizer="fp8", kv_quantizer="fp8")),
    (PACK_QUANTIZED, QuantConfig(4, 8, 16, a_quantizer="fp8", w_group_size=32)),
    (PACK_QUANTIZED, QuantConfig(4, 4, 16, a_quantizer="nvfp4")),
    (NVFP4, QuantConfig(4, 4, 16, w_quantizer="nvfp4_4over6", a_quantizer="nvfp4")),
    (FLOAT_QUANTIZED, QuantConfig(8, 8, 16, w_quantizer="fp8", a_quantizer="fp8_tensor")),
    (FLOAT_QUANTIZED, QuantConfig(8, 8, 16, w_quantizer="fp8_tensor", a_quantizer="fp8_tensor")),
]
FP8_CACHE = {"kv_bits": 8, "kv_format": "vllm_fp8_scaled"}
CACHES = [
    (PACK_QUANTIZED, QuantConfig(a_bits=16, **FP8_CACHE)),
    (INT_QUANTIZED, QuantConfig(w_bits=8, **FP8_CACHE)),
    (FLOAT_QUANTIZED, QuantConfig(w_bits=8, w_quantizer="fp8", a_quantizer="fp8_tensor", **FP8_CACHE)),
    (PACK_QUANTIZED, QuantConfig(overrides={"model.layers.-1.*": FP8_CACHE})),
    (NVFP4, QuantConfig(4, 4, 4, w_quantizer="nvfp4", a_quantizer="nvfp4", kv_format="nvfp4")),
]
NAMES = [f"{form} {quant}" for form, quant in CASES]
FORMATS_OF_WEIGHTS = [
    Format(4, "nvfp4", 16, tensor_scale=512.0),
    Format(4, "nvfp4_4over6", 16, tensor_scale=512.0),
    Format(4, "mxfp4", 32),
    Format(8, "fp8"),
    Format(8, "fp8_tensor", tensor_scale=2.0**-6),
]
WIDE = {"head_dim": 32}  # blocks of the cache


@pytest.mark.parametrize(("form", "quant"), [*CASES, *CACHES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_export_is_what_was_trained_in_memory_and_packed(form, quant, dtype, tmp_path):
    student = write_student(tmp_path / "final", quant, dtype, **WIDE)
    export.check(student, form)
    export.export(student, tmp_path / "export", form)
    export.verify(student, tmp_path / "export", form, WINDOWS)  # bit for bit, or UserError
    trained = prepare(models.load(str(tmp_path / "final"), dtype), quant)  # not frozen: as it is trained
    set_tensor_scales(trained, student.tensor_scales)
    tokens = ids(trained, batch=2)
    expected = trained(tokens).logits
    for place in ("final", "export"):
        assert torch.equal(simulated.load(str(tmp_path / place), dtype)(tokens).logits, expected)
    simulation, model = simulated.load(str(tmp_path / "final"), torch.float32), qat.load(str(tmp_path / "export"))
    assert torch.equal(model(tokens).logits, simulation(tokens).logits)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    by_forwards = simulation.generate(tokens[:, :6], use_cache=False, **how)
    assert torch.equal(model.generate(tokens[:, :6], **how), by_forwards)


@pytest.mark.parametrize(("form", "quant"), [*CASES[2:5], CASES[-1]], ids=[*NAMES[2:5], NAMES[-1]])
def test_transformers_own_loader_reads_the_same_weights(form, quant, tmp_path):
    """4-bit floats it unpacks to bf16, in which they are exact."""
    dtype = torch.float32 if form == FLOAT_QUANTIZED else torch.bfloat16
    quant = QuantConfig(quant.w_bits, 16, 16, w_quantizer=quant.w_quantizer)
    export.export(write_student(tmp_path / "final", quant, dtype), tmp_path / "export", form)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=dtype)
    ours = simulated.load(str(tmp_path / "export"), dtype)
    theirs(ids(ours))  # it decompresses at the first call
    for name, weight in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(name), weight), name


@pytest.mark.parametrize(("form", "quant"), CACHES, ids=str)
def test_an_export_states_a_cache_that_engines_have_in_all_layers(form, quant, tmp_path):
    """As compressed-tensors and vLLM read it: fp32 scales of attention, and one description for all of it."""
    student = write_student(tmp_path / "final", quant, torch.bfloat16)
    export.export(student, tmp_path / "export", form)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    found = {name: scale for name, scale in stored.items() if name.endswith((".k_scale", ".v_scale"))}
    described = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(described).kv_cache_scheme
    said = [sentence for sentence in EXPORT_FORMATS[form].all_deviations(student) if "KV cache" in sentence]
    if quant.kv_format != "vllm_fp8_scaled":
        assert not found
        assert read is None
        assert "not all layers have kv_format=vllm_fp8_scaled" in said[-1] or quant.kv_format == "nvfp4"
        return
    assert (read.num_bits, read.type, read.strategy) == (8, "float", "tensor")
    assert read.symmetric
    assert read.dynamic is False
    assert len(said) == 1
    for number in range(2):
        for ours, theirs in (("keys", "k_scale"), ("values", "v_scale")):
            expected = torch.tensor([student.tensor_scales[f"model.layers.{number}.self_attn.{ours}"]])
            assert torch.equal(found.pop(f"model.layers.{number}.self_attn.{theirs}"), expected)
    assert not found


def test_transformers_own_loader_simulates_the_same_cache(tmp_path):
    quant = CACHES[0][1]
    export.export(write_student(tmp_path / "final", quant), tmp_path / "export", PACK_QUANTIZED)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    ours = simulated.load(str(tmp_path / "export"), torch.float32)(WINDOWS).logits
    torch.testing.assert_close(theirs(WINDOWS).logits, ours)
    write_student(tmp_path / "without", quant.everywhere(kv_bits=16))
    without = simulated.load(str(tmp_path / "without"), torch.float32)(WINDOWS).logits
    assert (ours - without).abs().max() > 0.01


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_4over6", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gguf_holds_them_without_loss(name, dtype, tmp_path):
    """Read by gguf's own dequantizer; q and k are reordered there, and NVFP4's scale of the tensor stands beside it."""
    quant = QuantConfig(4, 8, 4, w_quantizer=name, overrides={"*.0.*.o_proj": {"w_quantizer": "minmax"}})
    student = write_student(tmp_path / "final", quant, dtype, intermediate_size=128)
    if dtype == torch.bfloat16:  # integers times fp16 scales are no bf16 numbers, as which they were trained
        student = write_student(
            tmp_path / "final", QuantConfig(4, 8, 4, w_quantizer=name), dtype, intermediate_size=128
        )
    export.check(student, GGUF)
    export.export(student, tmp_path / "export", GGUF)
    export.verify(student, tmp_path / "export", GGUF, WINDOWS)  # bit for bit, or UserError


@pytest.mark.parametrize("form", FORMATS_OF_WEIGHTS)
def test_gptq_with_an_identity_hessian_is_rtn(form):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    config = gptq.GPTQConfig()
    found, expected = gptq.gptq(weight, torch.eye(64), form, config), quantize(weight, form)
    assert torch.equal(found.codes.float(), expected.codes.float())
    assert torch.equal(found.grid.scale, expected.grid.scale)
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(1)) @ torch.randn(64, 64)
    hessian = gptq.hessian_of([inputs])
    better = dequantize(gptq.gptq(weight, hessian, form, config), torch.float32)
    error = gptq.error_of(weight - dequantize(expected, torch.float32), hessian)
    assert gptq.error_of(weight - better, hessian) < 0.8 * error


@pytest.mark.parametrize(
    ("form", "method", "weights", "inputs"),
    [
        (NVFP4, "gptq", "nvfp4", "nvfp4"),
        (MXFP4, "smoothquant", "mxfp4", "mxfp4"),
        (MXFP4, "gptq", "mxfp4", "fp8"),
        (FLOAT_QUANTIZED, "gptq", "fp8_tensor", "fp8_tensor"),
        (FLOAT_QUANTIZED, "rtn", "fp8", "fp8_tensor"),
    ],
)
def test_post_training_methods_make_students_that_are_exported(
    form, method, weights, inputs, tiny_directory, tiny_data, tmp_path
):
    bits = {"nvfp4": 4, "mxfp4": 4, "fp8": 8, "fp8_tensor": 8}
    settings = [f"--w_quantizer={weights}", f"--w_bits={bits[weights]}"]
    settings += [f"--a_quantizer={inputs}", f"--a_bits={bits[inputs]}"]
    places = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'student'}"]
    settings += ["--kv_format=vllm_fp8_scaled", "--kv_bits=8"] if form == FLOAT_QUANTIZED else []
    run_python("quantize", f"--method={method}", "--sequences=4", *places, *settings)
    student = student_folder.find(tmp_path / "student")
    export.export(student, tmp_path / "export", form)
    export.verify(student, tmp_path / "export", form, WINDOWS)
    model = qat.load(str(tmp_path / "student"))
    assert torch.equal(model(WINDOWS).logits, qat.load(str(tmp_path / "export"))(WINDOWS).logits)


@pytest.mark.parametrize("quantizer", ["nvfp4", "fp8_tensor"])
def test_scales_measured_layer_by_layer_are_those_of_the_whole_model(quantizer, tiny_directory):
    bits = 4 if quantizer == "nvfp4" else 8
    cache = {"kv_bits": bits, "kv_format": "nvfp4" if quantizer == "nvfp4" else "vllm_fp8_scaled"}
    others = {"*.down_proj": {"a_quantizer": "fp8", "a_bits": 8}, "model.layers.0.self_attn": {"kv_bits": 16}}
    quant = QuantConfig(4, bits, a_quantizer=quantizer, **cache, overrides=others)
    teacher = models.load(str(tiny_directory), torch.float32)
    student = prepare(models.load(str(tiny_directory), torch.float32), quant)
    calibrate(student, teacher, WINDOWS)
    found = stream.measured_scales(Path(tiny_directory), quant, [WINDOWS[:1], WINDOWS[1:]])
    assert found == tensor_scales_in(student)
    assert len(found) == 2 * 6 + 2


def test_layers_that_engines_fuse_share_the_scale_of_their_tensors(tmp_path):
    student = write_student(tmp_path / "final", CASES[0][1])
    export.export(student, tmp_path / "export", NVFP4)
    stored = load_file(tmp_path / "export" / "model.safetensors")
    scales = {name.removesuffix("weight_global_scale"): s for name, s in stored.items() if "global_scale" in name}
    state = tiny_model().state_dict()
    for layer in ("model.layers.0.", "model.layers.1."):
        for fused in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up"), ("mlp.down",)):
            found = {scales[f"{layer}{name}_proj."].item() for name in fused}
            largest = max(state[f"{layer}{name}_proj.weight"].abs().max() for name in fused)
            assert len(found) == 1
            assert 2688 / 4 < found.pop() * largest <= 2688 / 2
    assert tensor_scales_in(prepare(tiny_model(), CASES[0][1])) == student.tensor_scales
    weights = {name: weight for name, weight in state.items() if f"{name.removesuffix('weight')}weight_scale" in stored}
    assert student.tensor_scales.keys() == weights.keys()


@pytest.mark.parametrize(
    ("form", "code_bytes", "scale_bytes"), [(NVFP4, 8, 1), (MXFP4, 16, 1), (FLOAT_QUANTIZED, 64, 4)]
)
def test_memory_is_what_the_format_promises(form, code_bytes, scale_bytes, tmp_path):
    """Per group: the codes, and the scale as it is stored. A scale of the tensor is not counted: it is a number."""
    name = {NVFP4: "nvfp4", MXFP4: "mxfp4", FLOAT_QUANTIZED: "fp8"}[form]
    kv = "fp8" if name == "nvfp4" else name
    quant = QuantConfig(8 if name == "fp8" else 4, 16, 4 if kv == "mxfp4" else 8, w_quantizer=name, kv_quantizer=kv)
    write_student(tmp_path, quant, intermediate_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=2)
    model = qat.load(str(tmp_path))
    for linear in quant_linears(model).values():
        weights = linear.in_features * linear.out_features
        groups = weights * linear.weight_format.bits // 8 // code_bytes
        assert linear.packed.nbytes == groups * (code_bytes + scale_bytes)
    per_head = 16 + 1 if kv == "mxfp4" else 32 + 4
    assert packed.memory(model).cache_per_token == 2 * 2 * 2 * per_head


@pytest.mark.parametrize(
    ("form", "quant", "weights", "inputs"),
    [
        (
            *CASES[2],
            "one per 16 input channels, over one per tensor",
            "one per 16 channels of a token, dynamic, over one",
        ),
        (*CASES[-1], "one per tensor, shared by what engines fuse", "one per tensor, measured on calibration text"),
        (*CASES[4], "one per output channel |", "one per token, dynamic |"),
    ],
)
def test_the_card_says_what_shares_a_scale_and_on_what_it_was_measured(form, quant, weights, inputs, tmp_path):
    student = write_student(tmp_path / "final", quant)  # no training run is beside it
    export.export(student, tmp_path / "export", form)
    model_card.write(student, form, model_card.Origin("", ""), "", tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"| {weights}" in card
    assert f"| {inputs}" in card


@pytest.mark.parametrize("quantizer", ["nvfp4", "fp8_tensor"])
@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_scale_that_no_number_fits_is_refused_with_the_layers_name(quantizer, broken, tiny_directory):
    bits = 4 if quantizer == "nvfp4" else 8
    sound, teacher, student = (models.load(str(tiny_directory), torch.float32) for _ in range(3))
    with torch.no_grad():
        for model in (teacher, student):
            model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = broken
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has the value (inf|nan)"):
        prepare(student, QuantConfig(bits, 16, 16, w_quantizer=quantizer))
    student = prepare(sound, QuantConfig(16, bits, 16, a_quantizer=quantizer))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.input has the value (inf|nan)"):
        calibrate(student, teacher, WINDOWS)


def test_refusals_name_the_format_that_fits(tmp_path):
    student = write_student(tmp_path / "final", CASES[0][1])
    for form in (PACK_QUANTIZED, INT_QUANTIZED, MXFP4, FLOAT_QUANTIZED):
        with pytest.raises(UserError, match=r"cannot store such weights\. Give --format nvfp4-pack-"):
            export.check(student, form)
    (tmp_path / "ints").mkdir()
    with pytest.raises(UserError, match="Give --format pack-quantized or int-quantized or hf-fake"):
        export.check(write_student(tmp_path / "ints" / "final", QuantConfig()), NVFP4)
    with pytest.raises(UserError, match="give w_bits=4"):
        QuantConfig(w_bits=8, w_quantizer="nvfp4")
    with pytest.raises(UserError, match="whose scales are for 16 weights: leave w_group_size out"):
        QuantConfig(w_quantizer="nvfp4", w_group_size=32)
    with pytest.raises(UserError, match="one scale per tensor: leave w_group_size out"):
        QuantConfig(w_bits=8, w_quantizer="fp8_tensor", w_group_size=32)
    with pytest.raises(UserError, match="blocks of 32, which do not divide the model's 16 channels per head"):
        prepare(tiny_model(), QuantConfig(kv_quantizer="mxfp4"))
    with pytest.raises(UserError, match="lm_head supports integer quantizers only"):
        prepare(tiny_model(), QuantConfig(overrides={"lm_head": {"w_bits": 8, "w_quantizer": "fp8"}}))
    with pytest.raises(UserError, match="measured before method=smoothquant changes the activations"):
        SmoothQuant.check(QuantConfig(4, 4, 4, a_quantizer="nvfp4"))
    with pytest.raises(UserError, match="kv_quantizer='nvfp4' is invalid"):
        QuantConfig(kv_quantizer="nvfp4")
    save_tensor_scales(student.tensor_scales | {"model.layers.0.mlp.up_proj.weight": math.inf}, tmp_path / "final")
    with pytest.raises(UserError, match=f"{SCALES_FILE} does not fit the model"):
        qat.load(str(tmp_path / "final"))
    (tmp_path / "final" / SCALES_FILE).unlink()
    quant = QuantConfig(4, 4, 16, a_quantizer="nvfp4")
    quant.save(tmp_path / "final")
    with pytest.raises(UserError, match=r"tensor_scales.safetensors lacks model.layers.0.mlp.down_proj.input"):
        qat.load(str(tmp_path / "final"))
    assert prepare(tiny_model(), quant)(WINDOWS).logits.isnan().any(), "scales that nobody measured must be noticed"
    QuantConfig(16, 16, **FP8_CACHE).save(tmp_path / "final")
    with pytest.raises(UserError, match=r"tensor_scales.safetensors lacks model.layers.0.self_attn.keys"):
        qat.load(str(tmp_path / "final"))
    with pytest.raises(UserError, match="kv_format=vllm_fp8_scaled has scales that are measured before method=smooth"):
        SmoothQuant.check(QuantConfig(**FP8_CACHE))


def test_differences_say_which_engine_runs_what():
    said = " ".join(EXPORT_FORMATS[NVFP4].deviations(CASES[1][1]))
    assert "do not quantize them" in said
    assert "compute capability 7.5" in said
    said = " ".join(EXPORT_FORMATS[MXFP4].deviations(CASES[3][1]))
    assert "capability 10.0" in said
    assert {form for form, _ in CASES} <= set(LAYOUTS)


@pytest.fixture(scope="module", params=[("zero3_cpu.json", False), ("zero3.json", True)], ids=["fp32", "bf16, killed"])
def runs(request, tiny_directory, tiny_data, tmp_path_factory):
    """Two ranks train NVFP4 weights and activations; and again, killed after the first checkpoint, and resumed."""
    json_file, again = request.param
    quant = ["--w_quantizer=nvfp4", "--a_quantizer=nvfp4", "--a_bits=4", "--kv_format=vllm_fp8_scaled", "--kv_bits=8"]
    how = [f"--deepspeed={ROOT / 'ds_configs' / json_file}", "--steps=3", "--lr=1e-2", "--save_every=1", *quant]
    how += [f"--model={tiny_directory}", f"--data={tiny_data}"]
    whole, killed = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "killed"))
    finish(start_training(2, *how, f"--output={whole}"))
    if not again:
        return [whole]
    process = start_training(2, *how, f"--output={killed}")
    while process.poll() is None and not (killed / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    kill(process)
    finish(start_training(2, *how, f"--output={killed}"))
    return [whole, killed]


def test_trained_under_zero3_killed_resumed_and_exported(runs, tmp_path):
    """A checkpoint has the scales of the run: those that the first weights, and the teacher's activations, gave,
    whatever has become of them. They are powers of two, and layers that read one tensor share them."""
    scales = load_file(runs[0] / SCALES_FILE)
    assert len(scales) == 28 + 4
    assert all(math.frexp(scale.item())[0] == 0.5 for scale in scales.values())
    for first, second in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for part in ("weight", "input"):
            one, other = (scales[f"model.layers.1.{name}.{part}_tensor_scale"] for name in (first, second))
            assert one == other
    for run in runs:
        assert load_file(run / "final" / SCALES_FILE) == scales
        assert losses(run) == losses(runs[0])
    for place, name in ((runs[0] / "final", "final"), (runs[0] / "checkpoints", "checkpoint")):
        export.export(student_folder.find(place), tmp_path / name, NVFP4)
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("final", "checkpoint"))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
    export.verify(student_folder.find(runs[0] / "final"), tmp_path / "checkpoint", NVFP4, WINDOWS)


def test_scales_are_those_of_the_values_of_all_ranks(runs, tiny_directory, tiny_data):
    """Each rank has measured a sequence of its own; transformers' cache has its keys and values."""
    teacher = models.load(str(tiny_directory), torch.bfloat16 if len(runs) > 1 else torch.float32)
    data = TrainingData(tiny_data, models.load_tokenizer(str(tiny_directory)), TrainConfig().seed)
    held = [teacher(data.sample(rank).input_ids).past_key_values.layers for rank in range(2)]
    scales = load_file(runs[0] / SCALES_FILE)
    for number in range(2):
        for part in ("keys", "values"):
            largest = max(getattr(layers[number], part).abs().max().item() for layers in held)
            expected = Format(8, "fp8_tensor").by.scale_of_tensor(2 * largest)
            assert scales[f"model.layers.{number}.self_attn.{part}_tensor_scale"] == expected


def test_scales_that_are_missing_are_missed(runs, tmp_path):
    for name in ("config.json", CONFIG_FILE):
        (tmp_path / name).write_text((runs[0] / "final" / name).read_text())
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["tensor_scales"] == SCALES_FILE
    shutil.copy(runs[0] / "final" / SCALES_FILE, tmp_path)
    assert QuantConfig.load(tmp_path).measures_scales
    (tmp_path / SCALES_FILE).unlink()
    with pytest.raises(UserError, match=f"{SCALES_FILE}, which defines how its weights are rounded, is missing"):
        QuantConfig.load(tmp_path)
