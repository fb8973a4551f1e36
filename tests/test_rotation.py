"""Rotations: Hadamard matrices, folding them into weights, and the models that compute the rest online."""

import json
import shutil

import pytest
import torch
from commands import ROOT, error_of, finish, run_python, start_training
from compressed_tensors.transform import TransformConfig, TransformFactory
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training import losses
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import qat
from datagen import decoder
from launch.served import file_of
from qat.data.sequences import TrainingData
from qat.export import export
from qat.export.formats import EXPORT_FORMATS, FAKE, GGUF
from qat.infer import simulated
from qat.infer.integer_cache import IntegerCache
from qat.quant import hadamard
from qat.quant.architecture import quantizable_linears
from qat.quant.config import QuantConfig
from qat.quant.prepare import freeze, prepare
from qat.quant.rotated import rotation_of
from qat.runtime.errors import UserError
from qat.store import models, rotate, student_folder
from qat.store.compressed_tensors import PACK_QUANTIZED
from qat.store.model_folder import ModelFolder, read_config
from qat.train.rotations import LearnConfig, Rotating, learn

CPU = torch.device("cpu")
JSON = f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"
W4A4KV4 = QuantConfig(4, 4, 4, kv_rotation="hadamard")
FLAGS = ["--w_bits=4", "--a_bits=4", "--kv_bits=4", "--kv_rotation=hadamard"]


def ids(tokens: int = 20) -> torch.Tensor:
    return torch.randint(2, 300, (1, tokens), generator=torch.Generator().manual_seed(1))


def varied_model(config_class=LlamaConfig, **changes):
    """A tiny model whose norms and biases are no ones and zeros, and that gains a factor from channel to channel."""
    model = tiny_model(config_class, **changes)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data = torch.randn_like(weight) + ("norm" in name)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model with tied embeddings."""
    directory = tmp_path_factory.mktemp("rotation") / "plain"
    varied_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def rotated(plain):
    directory = plain.with_name("rotated")
    run_python("rotate", f"--model={plain}", f"--output={directory}")
    return directory


SIZES = [1, 2, 8, 12, 20, 24, 28, 36, 44, 52, 60, 76, 96, 100, 108, 128, 140, 148, 344, 576, 688, 896, 1536]


@pytest.mark.parametrize("size", [*SIZES, 9, 22, 46])
def test_hadamard_matrices_are_orthogonal_and_the_transform_multiplies_by_them(size):
    matrix = hadamard.hadamard_matrix(size, CPU, torch.float64)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    block = hadamard.block_size(size)
    assert (block == size) == (size in SIZES)
    assert torch.allclose(matrix[:block, :block].abs(), torch.tensor(block**-0.5).double(), atol=1e-12)
    x = torch.randn(3, 2, size, dtype=torch.float64, requires_grad=True)
    y = hadamard.transform(x)
    assert torch.allclose(y, x @ matrix, atol=1e-12)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.allclose(x.grad, grad @ matrix.t(), atol=1e-12), "backward is the transpose"


def test_widths_of_known_models_are_rotated_whole():
    widths = [5120, 6656, 11008, 13824, 17920, 14336, 28672, 18944, 8960, 4864, 29568, 3072, 9728, 25600]
    assert [hadamard.block_size(width) for width in widths] == widths


def test_bf16_is_rounded_once():
    x = torch.randn(4, 1536).bfloat16()
    assert torch.equal(hadamard.transform(x), hadamard.transform(x.float()).bfloat16())


CASES = [
    (LlamaConfig, {}),
    (LlamaConfig, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    (MistralConfig, {"tie_word_embeddings": False, "intermediate_size": 88}),
    (Qwen2Config, {}),
    (Qwen3Config, {"num_key_value_heads": 1}),
]


def in_fp64(model):
    """The model with norms that compute in fp64: transformers' round to fp32."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, m=module: (
                m.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon))
            )
    return model.double()


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("down", ["hadamard", "blocks", "none"])
@pytest.mark.parametrize(("config_class", "changes"), CASES)
def test_the_function_stays(config_class, changes, down, untie, tmp_path):
    model = varied_model(config_class, **changes).double()
    model.save_pretrained(tmp_path / "plain")
    folder = ModelFolder.read(tmp_path / "plain")
    kind = "random" if untie else "hadamard"
    rotation = rotate.rotation_for(folder.config, down, untie)
    rotate.write(folder, tmp_path / "rotated", rotation, rotate.draw(folder.config, kind, 0), {})
    found = models.load(str(tmp_path / "rotated"), torch.float64)
    assert found.config.tie_word_embeddings == (folder.config.tie_word_embeddings and not untie)
    with torch.inference_mode():
        expected, logits = in_fp64(model)(ids()).logits, in_fp64(found)(ids()).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    ours, theirs = quantizable_linears(found), quantizable_linears(model)
    assert not any(torch.equal(ours[name].weight, theirs[name].weight) for name in theirs)
    ordinary = down == "none" and not found.config.tie_word_embeddings
    assert (type(found) is type(model)) == ordinary, "R1 and R2 are in the weights of an ordinary model"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_narrow_dtypes_round(plain, rotated, dtype, tolerance):
    expected = models.load(str(plain), torch.float64)(ids()).logits
    logits = models.load(str(rotated), dtype)(ids()).logits
    assert (logits.double() - expected).norm() <= tolerance * expected.norm()


def test_it_is_not_run_without_its_online_rotations(monkeypatch, plain, rotated, tmp_path):
    with pytest.raises(UserError, match="without its online rotations"):
        prepare(AutoModelForCausalLM.from_pretrained(rotated), QuantConfig())
    with pytest.raises(UserError, match="engine=torch does not"):
        decoder.check(read_config(str(rotated)), 8)
    assert "rotated already" in error_of(monkeypatch, "rotate", f"--model={rotated}", f"--output={tmp_path / 'again'}")


def flags(plain, rotated, data, output) -> list[str]:
    more = ["--steps=4", "--lr=1e-3", "--batch_size=2", "--save_every=2", "--keep=2"]
    return [f"--model={plain}", f"--student={rotated}", f"--data={data}", f"--output={output}", JSON, *more, *FLAGS]


@pytest.fixture(scope="module")
def run(plain, rotated, tiny_data, tmp_path_factory):
    """A training on two ranks of a student that is rotated, by a teacher that is not."""
    output = tmp_path_factory.mktemp("runs") / "run"
    finish(start_training(2, *flags(plain, rotated, tiny_data, output)))
    return output


def test_training_shards(plain, rotated, tiny_data, run, tmp_path):
    finish(start_training(1, *flags(plain, rotated, tiny_data, tmp_path / "one")))
    for one, two in zip(losses(tmp_path / "one"), losses(run), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_training_resumes(plain, rotated, tiny_data, run, tmp_path):
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("final", "step-000004"))
    (resumed / "checkpoints" / "latest").write_text("step-000002")
    halfway = resumed / "checkpoints" / "step-000002" / "manifest.json"
    before = halfway.stat().st_mtime_ns
    finish(start_training(2, *flags(plain, rotated, tiny_data, resumed)))
    assert halfway.stat().st_mtime_ns == before
    assert losses(resumed) == losses(run)
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (resumed, run)]
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_a_trained_student_is_one_model_everywhere(rotated, run):
    """In its final/, in its checkpoint, packed, and decoding with its integer cache."""
    final = str(run / "final")
    student, packed = simulated.load(final, torch.float32), qat.load(final)
    checkpoint = student_folder.find(run / "checkpoints")
    assert checkpoint.directory == rotated
    gathered = simulated.simulate(rotated, checkpoint.weights(), torch.float32, checkpoint.quant, torch.float32)
    expected = student(ids()).logits
    assert torch.equal(packed(ids()).logits, expected)
    assert torch.equal(gathered(ids()).logits, expected)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = student.generate(ids(6), use_cache=False, **settings)
    assert torch.equal(packed.generate(ids(6), **settings), tokens)
    before = models.load(str(rotated), torch.float32)
    assert not torch.equal(student.model.norm.head_map.weight, before.model.norm.head_map.weight), "it is trained too"


def test_cached_decoding_equals_the_full_forward(rotated):
    model = rounded(rotated, torch.float64)
    tokens, cache = ids(12), IntegerCache(model)
    with torch.inference_mode():
        steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens).logits, rtol=1e-7, atol=1e-7)


def rounded(folder, dtype=torch.float32):
    model = prepare(models.load(str(folder), dtype), W4A4KV4)
    freeze(model)
    return model


def test_rotated_hidden_states_are_not_compared(monkeypatch, plain, rotated, tiny_data, tmp_path):
    given = flags(plain, rotated, tiny_data, tmp_path / "run")
    assert "student's are rotated" in error_of(monkeypatch, "train", *given, "--loss=logits+hidden")


def test_smoothquant_keeps_the_function_of_a_rotated_model(plain, rotated, tiny_data, tmp_path):
    smooth = tmp_path / "smooth"
    more = [f"--data={tiny_data}", f"--output={smooth}", "--alpha=0.5", "--a_bits=8", "--w_bits=8", "--kv_bits=16"]
    run_python("quantize", "--method=smoothquant", f"--model={rotated}", *more)
    expected, before = (models.load(str(folder), torch.float32) for folder in (plain, rotated))
    found = models.load(str(smooth), torch.float32)
    torch.testing.assert_close(found(ids()).logits, expected(ids()).logits, rtol=2e-4, atol=2e-4)
    assert not torch.equal(found.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert rotation_of(simulated.load(str(smooth), torch.float32).config) == rotation_of(before.config)


def test_gptq_corrects_the_inputs_that_are_rotated(rotated, tiny_data, tmp_path):
    places = [f"--model={rotated}", f"--data={tiny_data}", f"--output={tmp_path / 'gptq'}"]
    run_python("quantize", "--method=gptq", *places, *FLAGS)
    student, teacher = simulated.load(str(tmp_path / "gptq"), torch.float32), models.load(str(rotated), torch.float32)
    tokens = torch.cat([ids(40), ids(40).flip(1)])
    error = [(model(tokens).logits - teacher(tokens).logits).norm() for model in (student, rounded(rotated))]
    assert error[0] < error[1]


@pytest.fixture(scope="module")
def served(plain):
    """What engines can run: R4 in blocks of a power of two, an output layer of its own, rounded to nearest."""
    directory = plain.with_name("served")
    run_python("rotate", f"--model={plain}", f"--output={directory}", "--down=blocks", "--untie=true")
    run_python("quantize", f"--model={directory}", f"--output={directory}-rtn", *FLAGS)
    return student_folder.find(plain.with_name("served-rtn"))


def test_an_export_states_r4_as_engines_read_it(plain, served, tmp_path):
    assert served.base_model == str(plain), "what the model card says"
    export.export(served, tmp_path / "export", PACK_QUANTIZED)
    windows = ids(40).view(2, 20)
    verified = export.verify(served, tmp_path / "export", PACK_QUANTIZED, windows)
    assert verified.exported == verified.trained
    assert "transformers' own loader leaves it out" in EXPORT_FORMATS[PACK_QUANTIZED].all_deviations(served)[-1]
    stated = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]["transform_config"]
    layer = torch.nn.Module()
    layer.down = torch.nn.Linear(96, 8, bias=False, dtype=torch.float64)
    name, scheme = next(iter(TransformConfig.model_validate(stated).config_groups.items()))
    assert scheme.apply[0].targets == [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    scheme.apply[0].targets = ["down"]
    scheme.precision = torch.float64
    x = torch.randn(3, 96, dtype=torch.float64)
    expected = layer.down(hadamard.transform(x, 32))
    TransformFactory.from_scheme(scheme, name=name).apply_to_model(layer)
    torch.testing.assert_close(layer.down(x), expected)


def test_formats_refuse_what_they_cannot_state(served, rotated, run):
    for form in EXPORT_FORMATS:
        with pytest.raises(UserError, match="--untie true"):
            export.check(student_folder.find(run / "final"), form)
    for form in EXPORT_FORMATS.keys() - {PACK_QUANTIZED}:
        with pytest.raises(UserError, match="--down none"):
            export.check(served, form)


def test_llama_cpp_does_not_measure_a_model_whose_rotation_it_would_leave_out(rotated):
    with pytest.raises(UserError, match="--untie true"), file_of(str(rotated), "as_is"):
        pass


def test_engines_run_what_is_all_in_the_weights(plain, tmp_path):
    """R1 and R2, with an output layer: an ordinary model, as transformers itself reads it."""
    run_python("rotate", f"--model={plain}", f"--output={tmp_path / 'r'}", "--down=none", "--untie=true")
    found, expected = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "r", plain))
    torch.testing.assert_close(found(ids()).logits, expected(ids()).logits, rtol=1e-4, atol=1e-4)
    run_python("quantize", f"--model={tmp_path / 'r'}", f"--output={tmp_path / 'rtn'}", *FLAGS)
    student = student_folder.find(tmp_path / "rtn")
    for form in (FAKE, GGUF):
        export.check(student, form)


def tangent(matrix, gradient):
    """The part of a gradient along which a matrix stays orthogonal."""
    product = gradient.double() @ matrix.mT
    return (product - product.mT) / 2


@pytest.mark.parametrize("untie", [False, True])
def test_in_full_precision_no_rotation_is_better_than_another(plain, untie):
    """The gradient of the loss has no part along the orthogonal matrices, until something is rounded."""
    folder = ModelFolder.read(plain)
    rotation = rotate.rotation_for(folder.config, "hadamard", untie)
    matrices = rotate.draw(folder.config, "random", 0)
    sizes = []
    for quant in (QuantConfig(16, 16, 16), QuantConfig(16, 4, 4)):
        rotating = Rotating(folder, rotation, quant)
        kl, gradient = rotating.gradient(matrices, [ids(), ids(12)])
        parts = [(getattr(matrices, name), getattr(gradient, name)) for name in ("residual", "values")]
        sizes.append([tangent(*part).norm().item() for part in parts])
        assert (kl < 1e-4) == (quant.a_bits == 16)
    assert sizes[0][0] < 1e-3 * sizes[1][0]
    assert sizes[0][1] < 1e-3 * sizes[1][1]


def test_learned_rotations_are_orthogonal_and_lower_the_kl(plain, tiny_data):
    folder, data = ModelFolder.read(plain), TrainingData(tiny_data, models.load_tokenizer(str(plain)), 0)
    rotation, quant = rotate.rotation_for(folder.config, "hadamard", untie=False), QuantConfig(16, 4, 16)
    start = rotate.draw(folder.config, "hadamard", 0)
    found = learn(folder, rotation, quant, start, data, LearnConfig(steps=12, batch_size=4))
    for matrices in (found.residual, found.values):
        identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
        torch.testing.assert_close(matrices @ matrices.mT, identity.expand_as(matrices), rtol=0, atol=1e-12)
    rotating = Rotating(folder, rotation, quant)
    samples = [data.sequence(number).input_ids for number in range(len(data))]
    before, after = (rotating.gradient(matrices, samples)[0] for matrices in (start, found))
    assert after < before


def test_launch_rotate_learns(plain, tiny_data, tmp_path):
    """And what it writes computes the same function still."""
    more = [f"--data={tiny_data}", "--steps=2", "--batch_size=2", *FLAGS]
    run_python("rotate", f"--model={plain}", f"--output={tmp_path / 'learned'}", *more)
    found, expected = (models.load(str(folder), torch.float32) for folder in (tmp_path / "learned", plain))
    torch.testing.assert_close(found(ids()).logits, expected(ids()).logits, rtol=1e-4, atol=1e-4)


def test_scales_of_tensors_are_not_learned_under(monkeypatch, plain, tiny_data, tmp_path):
    given = [f"--model={plain}", f"--output={tmp_path / 'rotated'}", f"--data={tiny_data}"]
    assert "w_quantizer=nvfp4 has scales of tensors" in error_of(monkeypatch, "rotate", *given, "--w_quantizer=nvfp4")
    message = error_of(monkeypatch, "rotate", *given, "--kv_format=nvfp4")
    assert "kv_format=nvfp4 has scales of tensors" in message


def test_flags_that_say_nothing_are_refused(monkeypatch, plain, tmp_path):
    given = [f"--model={plain}", f"--output={tmp_path / 'rotated'}", "--a_bits=4"]
    assert "nothing is learned" in error_of(monkeypatch, "rotate", *given)


def test_a_student_is_saved_with_its_own_rotation(plain, rotated, tmp_path):
    student = prepare(models.load(str(rotated), torch.float32), W4A4KV4)
    with pytest.raises(UserError, match="rotated differently"):
        qat.save(student, tmp_path / "student", source=plain)
    qat.save(student, tmp_path / "student", source=rotated)
    assert torch.equal(qat.load(str(tmp_path / "student"))(ids()).logits, rounded(rotated)(ids()).logits)
