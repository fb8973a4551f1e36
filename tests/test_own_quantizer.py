"""A quantizer and a loss from outside, all the way: two ranks, a kill, the rest of the run, evaluation and export."""

import json
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, finish, kill, run_python, start_training
from plugin_quantizer import LearnedRange, Squared
from safetensors.torch import load_file
from tiny import tiny_model
from training import flags, losses

import qat
from launch import quantize, train
from qat.infer import simulated
from qat.quant.quantizers import QUANTIZERS
from qat.store.sidecars import STEPS_FILE
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, TeacherTargets

PLUGIN = "--plugin=plugin_quantizer"
TESTS = ROOT / "tests"
OWN = ["--a_quantizer=learned_range", "--loss=squared", PLUGIN]


@pytest.fixture(scope="module")
def trained(tiny_directory, tiny_data, tmp_path_factory):
    """Two runs: one as it is, one that was killed and started again."""
    folder = tmp_path_factory.mktemp("own")
    finish(start_training(2, *flags(tiny_directory, tiny_data, folder / "whole"), *OWN, cwd=TESTS))
    again = [*flags(tiny_directory, tiny_data, folder / "killed"), *OWN]
    process = start_training(2, *again, cwd=TESTS)
    while process.poll() is None and not (folder / "killed" / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    assert not (folder / "killed" / "final").exists()
    finish(start_training(2, *again, cwd=TESTS))
    return folder


def test_killed_and_resumed_equals_uninterrupted(trained):
    assert losses(trained / "killed") == losses(trained / "whole")
    steps = [load_file(trained / name / "final" / STEPS_FILE) for name in ("whole", "killed")]
    assert all(step.shape == (2,) and torch.equal(step, steps[1][name]) for name, step in steps[0].items())


def test_it_learns_its_range(trained, tiny_directory):
    student = simulated.load(str(trained / "whole" / "final"), torch.float32)
    for name, step in load_file(trained / "whole" / "final" / STEPS_FILE).items():
        assert torch.equal(student.get_parameter(name), step)
    assert losses(trained / "whole")[-1][0] < losses(trained / "whole")[0][0]


def test_evaluated_exported_and_loaded(trained, tmp_path):
    student, text = trained / "whole" / "final", f"--text={ROOT / 'LICENSE'}"
    measure = ["evaluate", f"--model={student}", text, "--window=32", "--windows=4", f"--output={tmp_path}/result.json"]
    run_python(*measure, PLUGIN, cwd=TESTS)
    export = ["export", f"--checkpoint={student}", f"--output={tmp_path / 'export'}", text, PLUGIN]
    assert "learned_range" in run_python(*export, cwd=TESTS).stdout
    (score,) = json.loads((tmp_path / "result.json").read_text())["texts"].values()
    assert score["perplexity"] > 1
    tokens = torch.arange(2, 22).view(2, 10)
    expected = simulated.load(str(student), torch.float32)(tokens).logits
    assert torch.equal(qat.load(str(tmp_path / "export"))(tokens).logits, expected)


def test_the_losss_gradient_is_autograds():
    teacher, student = torch.randn(5, 9), torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    (student.softmax(-1) - teacher.double().softmax(-1)).square().sum().backward()
    logits = student.detach().clone()
    Squared().chunk(teacher.double(), 1, logits)
    torch.testing.assert_close(logits, student.grad)


def test_clipped_activations_get_no_gradient():
    x, parameter = torch.linspace(-1, 1, 9, requires_grad=True), torch.tensor([0.1, 0.0])
    LearnedRange().fake_quantize(x, parameter, qmax=7).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_without_its_plugin_it_is_refused_in_a_sentence(trained, monkeypatch):
    monkeypatch.delitem(QUANTIZERS._things, "learned_range")
    with pytest.raises(qat.UserError, match=r"a_quantizer='learned_range' is invalid: choose minmax or .*--plugin"):
        qat.QuantConfig.load(trained / "whole" / "final")


def test_what_is_learned_or_measured_is_refused_by_its_name():
    measured = {"*.down_proj": {"a_quantizer": "nvfp4", "a_bits": 4}}
    for quant, named in (
        (qat.QuantConfig(a_quantizer="learned_range"), "learned_range"),
        (qat.QuantConfig(overrides=measured), "nvfp4"),
    ):
        with pytest.raises(qat.UserError, match=f"a_quantizer={named} "):
            train.check_teacher(Path("cache"), quant, TrainConfig())
        with pytest.raises(qat.UserError, match=f"a_quantizer={named} "):
            quantize.check(quantize.Quantization("model", Path("output")), quant, {})


def test_a_loss_of_ones_own_in_a_loop_of_ones_own():
    teacher, student = tiny_model(), qat.prepare(tiny_model(), qat.QuantConfig())
    tokens = torch.arange(5, 25)[None]
    loss, kl = Distiller(student)(tokens, TeacherTargets.of(teacher, tokens, Squared()))
    assert 0 < loss < kl
