"""Scales of weights that learn: they begin with a given grid, bit for bit, and end as the grid that is stored."""

import time

import pytest
import torch
from commands import ROOT, error_of, finish, kill, run_python, start_training
from layers import A8, FULL, make
from safetensors.torch import load_file
from tiny import ids
from training import log_of, losses

import qat
from qat.data.sequences import TrainingData
from qat.evaluate import heldout
from qat.evaluate.perplexity import perplexity, text_windows
from qat.export import export
from qat.export.formats import DEFAULT_EXPORT_FORMAT
from qat.infer import simulated
from qat.quant.config import QuantConfig
from qat.quant.learned_scales import check_codes_last, learn_scales, train_only_scales
from qat.quant.linear import quant_linears
from qat.quant.number_format import Format, Quantized, dequantize, grid_of, learned_gradients, quantize, round_to_grid
from qat.quant.prepare import prepare
from qat.quant.quantizers.base import Grid
from qat.runtime.errors import UserError
from qat.store import models, student_folder
from qat.store.model_folder import skeleton
from qat.store.sidecars import GRIDS_FILE, load_grids
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, TeacherTargets
from qat.train.starting_point import grids_of

FORMS = [
    Format(4),
    Format(8, "minmax_asymmetric"),
    Format(4, "minmax_signed", 16),
    Format(3, "minmax_full", 24),
    Format(2, "seq"),
    Format(2, "ternary"),
]
QUANT = QuantConfig(3, 8, 4, w_group_size=16)
STEPS = 6


@pytest.mark.parametrize("inputs", [A8, FULL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_that_learns_its_scale_begins_as_it_was(form, dtype, inputs):
    layer = make(form, inputs).to(dtype)
    x = torch.randn(5, 48, dtype=dtype)
    before = layer(x)
    layer.learn_scale(grid_of(layer.weight, form))
    assert torch.equal(layer.to(dtype)(x), before), "a cast leaves the grid alone"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_parameter_is_the_change_of_the_largest_value(form):
    layer = make(form, A8)
    layer.learn_scale(start := grid_of(layer.weight, form))
    largest = form.code_range[1]
    with torch.no_grad():
        layer.scale_change.copy_(-0.3 * largest * start.scale)
    grid = layer.learned_grid()
    torch.testing.assert_close(grid.scale, 0.7 * start.scale)
    x, grad = torch.randn(5, 48), torch.randn(5, 24)
    y = layer(x)
    torch.testing.assert_close(y, round_to_grid(x, A8)[0] @ round_to_grid(layer.weight, form, grid)[0].T + layer.bias)
    y.backward(grad)
    of_values = grad.T @ round_to_grid(x, A8)[0]
    of_weight, of_scale = learned_gradients(of_values, layer.weight, form, grid)
    torch.testing.assert_close(layer.weight.grad, of_weight)
    torch.testing.assert_close(layer.scale_change.grad, of_scale / largest, rtol=1e-4, atol=1e-5)
    layer.freeze(grid)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("quantizer", ["minmax", "minmax_asymmetric", "minmax_full", "minmax_signed"])
def test_codes_that_stay_are_read_back_from_their_values_or_refused(quantizer, bits, tiny_directory):
    """Whatever the scale, and wherever the zero point is: rows of one sign are the worst."""
    form = Format(bits, quantizer)
    model = prepare(skeleton(tiny_directory), QuantConfig(bits, 8, 16, w_quantizer=quantizer))
    lowest, highest = form.code_range
    codes = torch.arange(lowest, highest + 1, dtype=torch.int8).repeat(512, 1)
    scale = torch.linspace(1, 2, 512)[:, None]
    grid = Grid(scale, None if form.symmetric else torch.full_like(scale, lowest))
    values = dequantize(Quantized(codes, grid), torch.bfloat16)
    lasts = torch.equal(quantize(values, form, grid).codes, codes)
    check_codes_last(model, torch.float32)
    try:
        check_codes_last(model, torch.bfloat16)
    except UserError:
        assert not lasts
    else:
        assert lasts


def test_scales_alone_learn_in_a_loop_of_your_own(tiny_directory, tmp_path):
    teacher, student = (models.load(str(tiny_directory), torch.float32) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    prepare(student, QUANT)
    learn_scales(student)
    train_only_scales(student)
    distiller, tokens = Distiller(student), torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    first = None
    for _ in range(8):
        loss, _ = distiller(tokens, TeacherTargets.of(teacher, tokens))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or loss.item()
    assert loss.item() < 0.98 * first
    qat.save(student, tmp_path / "student", source=tiny_directory)
    for name, weight in student_folder.find(tmp_path / "student").weights():
        if isinstance(weight, Quantized):
            assert torch.equal(weight.codes, quantize(before[name], QUANT.weights).codes)
        else:
            assert torch.equal(weight, before[name])
    with torch.no_grad():
        expected = student(tokens).logits
    for loaded in (simulated.load(str(tmp_path / "student"), torch.float32), qat.load(str(tmp_path / "student"))):
        assert torch.equal(loaded(tokens).logits, expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_gradient_of_a_scale_whose_codes_stay_is_that_of_the_product(form):
    layer, x, grad = make(form, A8), torch.randn(5, 48), torch.randn(5, 24)
    layer.learn_scale(start := grid_of(layer.weight, form))
    codes, inputs = quantize(layer.weight, form).codes, round_to_grid(x, A8)[0]
    train_only_scales(layer)
    change = torch.randn(start.scale.shape) * start.scale / 4
    with torch.no_grad():
        layer.scale_change.copy_(change)
    layer(x).backward(grad)
    change.requires_grad_()
    steps = codes.unflatten(-1, (change.shape[1], -1)) - (
        0 if start.zero_point is None else start.zero_point[..., None]
    )
    values = steps * (start.scale + change / form.code_range[1])[..., None]
    y = inputs @ values.flatten(1).T + layer.bias
    torch.testing.assert_close(layer(x), y)
    y.backward(grad)
    torch.testing.assert_close(layer.scale_change.grad, change.grad, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None


@pytest.fixture(scope="module")
def rounded(tiny_directory, tiny_data, tmp_path_factory):
    """What GPTQ made, with grids of its own."""
    output = tmp_path_factory.mktemp("gptq") / "gptq"
    places = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={output}"]
    run_python("quantize", "--method=gptq", *places, "--w_bits=3", "--w_group_size=16")
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_begins_as_gptqs_model_bit_for_bit(dtype, rounded, tmp_path):
    """Codes, grid, logits; where its values lay the grid anew, it does not."""
    student = prepare(models.load(str(rounded), dtype), QUANT)
    anew = student(ids(student)).logits
    learn_scales(student, grids_of(rounded, QUANT, TrainConfig(train="all")))
    stored = dict(student_folder.find(rounded).weights())
    for name, linear in quant_linears(student).items():
        quantized = quantize(linear.weight, linear.weight_format, linear.learned_grid())
        assert torch.equal(quantized.codes, stored[f"{name}.weight"].codes)
        assert torch.equal(quantized.grid.scale, stored[f"{name}.weight"].grid.scale)
        assert torch.equal(dequantize(quantized, dtype), linear.weight)
    expected = simulated.load(str(rounded), dtype)
    logits = student(ids(student)).logits
    assert torch.equal(logits, expected(ids(student)).logits)
    assert not torch.equal(anew, logits)


ARMS = {
    "all": ["--train=all", "--w_quantizer=minmax_full", "--w_bits=3"],
    "scales": ["--train=scales", "--w_bits=3", "--w_group_size=16"],
}


@pytest.mark.parametrize("arm", ARMS)
def test_two_ranks_learn_and_survive_a_kill(arm, rounded, tiny_directory, tiny_data, tmp_path):
    """The losses, the weights, the grids of an uninterrupted run, bit for bit; and what is trained is what is exported.
    The scales alone: on another number of ranks too, from GPTQ's model, whose codes stay as they are."""

    def command(name):
        places = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / name}"]
        json_file = f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"
        start = [f"--student={rounded}"] if arm == "scales" else []
        sizes = [f"--steps={STEPS}", "--lr=3e-3", "--batch_size=2", "--save_every=2"]
        return [*places, json_file, *start, *sizes, *ARMS[arm]]

    def killed(name, ranks):
        process = start_training(2, *command(name))
        while process.poll() is None and not (tmp_path / name / "checkpoints" / "latest").exists():
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
        kill(process)
        finish(start_training(ranks, *command(name)))
        return load_file(tmp_path / name / "final" / "model.safetensors"), load_grids(tmp_path / name / "final")

    finish(start_training(2, *command("whole")))
    final = tmp_path / "whole" / "final"
    weights, grids = load_file(final / "model.safetensors"), load_grids(final)
    resumed_weights, resumed_grids = killed("killed", 2)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())
    assert len(grids) == 2 * 7
    assert all(torch.equal(resumed_grids[name].scale, grid.scale) for name, grid in grids.items())

    student = student_folder.find(final)
    export.export(student, tmp_path / "export", DEFAULT_EXPORT_FORMAT)
    export.verify(student, tmp_path / "export", DEFAULT_EXPORT_FORMAT, torch.randint(2, 300, (2, 24)))
    first = log_of(tmp_path / "whole")[0]["kl"]
    data = TrainingData(tiny_data, models.load_tokenizer(str(tiny_directory)), seed=0)
    teacher = models.load(str(tiny_directory), torch.float32)
    if arm == "all":
        values = {name: grid_of(weights[f"{name}.weight"], Format(3, "minmax_full")) for name in grids}
        assert not any(torch.equal(values[name].scale, grid.scale) for name, grid in grids.items())
        begun = prepare(models.load(str(tiny_directory), torch.float32), student.quant)
    else:
        before, after = (dict(one.weights()) for one in (student_folder.find(rounded), student))
        for name, weight in before.items():
            is_quantized = isinstance(weight, Quantized)
            assert torch.equal(after[name].codes, weight.codes) if is_quantized else torch.equal(after[name], weight)
        started = load_grids(rounded)
        assert not any(torch.equal(started[name].scale, grid.scale) for name, grid in grids.items())
        _, resized = killed("resized", 1)
        for name, grid in grids.items():
            torch.testing.assert_close(resized[name].scale, grid.scale, rtol=1e-3, atol=1e-5)
        begun = simulated.load(str(rounded), torch.float32)
    distiller = Distiller(begun)
    samples = [data.sample(number).input_ids for number in range(2)]
    with torch.no_grad():
        expected = sum(distiller(tokens, TeacherTargets.of(teacher, tokens))[1].item() for tokens in samples) / 2
    assert first == pytest.approx(expected, rel=1e-5)
    assert sum(record["kl"] for record in log_of(tmp_path / "whole")[-2:]) < 2 * first


def test_scales_stay_in_fp32_where_the_student_computes_in_bf16(tiny_directory, tiny_data, tmp_path):
    """Only their changes are rounded to bf16; what is stored is what the engine computed with."""
    places = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'run'}"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"
    held_out = [f"--eval_text={ROOT / 'LICENSE'}", "--eval_window=64", "--eval_sequences=2"]
    sizes = ["--steps=3", "--lr=3e-3", "--batch_size=2", "--train=all", "--w_bits=3"]
    finish(start_training(2, *places, json_file, *held_out, *sizes))
    final = tmp_path / "run" / "final"
    student, form = student_folder.find(final), Format(3)
    assert student.dtype == torch.bfloat16
    begun = models.load(str(tiny_directory), torch.bfloat16)
    for name, grid in student.grids().items():
        change = (grid.scale - grid_of(begun.get_submodule(name).weight, form).scale) * form.code_range[1]
        torch.testing.assert_close(change, change.bfloat16().float(), rtol=2e-3, atol=1e-6)
        assert change.any()
        assert not torch.equal(grid.scale, grid.scale.bfloat16().float())
    tokenizer = models.load_tokenizer(str(tiny_directory))
    windows = text_windows(heldout.paragraphs(str(ROOT / "LICENSE")), tokenizer, 64, 2)
    found = perplexity(simulated.load(str(final), torch.bfloat16), windows).perplexity
    assert found == pytest.approx(log_of(tmp_path / "run")[-1]["ppl_text"], rel=1e-3)


def test_scales_that_cannot_learn_are_refused(monkeypatch, rounded, tiny_directory, tiny_data, tmp_path, caplog):
    places = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'run'}"]

    def refusal(*settings):
        return error_of(monkeypatch, "train", *places, "--batch_size=2", *settings)

    assert "no scales of weights to learn" in refusal("--train=all", "--w_bits=16")
    assert "train='steps' is invalid: choose weights or all or scales" in refusal("--train=steps")
    in_bf16 = [f"--deepspeed={ROOT / 'ds_configs' / 'zero3.json'}", "--train=scales"]
    assert "in bfloat16, the model's dtype, would lose their codes" in refusal(
        *in_bf16, "--w_bits=8", "--w_quantizer=minmax_asymmetric"
    )
    own = [f"--student={rounded}", "--w_bits=3", "--w_group_size=16", "--train=scales"]
    assert "give the same" in refusal(*own, "--overrides={'*.q_proj': {'w_bits': 8}}")
    (rounded / GRIDS_FILE).rename(tmp_path / GRIDS_FILE)
    assert f"{GRIDS_FILE}" in refusal(*own)
    (tmp_path / GRIDS_FILE).rename(rounded / GRIDS_FILE)
    caplog.set_level("INFO", "qat")
    assert grids_of(rounded, QUANT, TrainConfig()) == {}
    assert "and computes new ones from its rounded weights" in caplog.text
