"""A quantizer and a loss from outside, in this process; test_plugins.py has the commands."""

from pathlib import Path

import pytest
import torch
from plugin_quantizer import LearnedRange, Squared
from tiny import tiny_model

import qat
from launch import quantize
from qat.train import starting_point
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, TeacherTargets


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


def test_what_is_learned_or_measured_is_refused_by_its_name():
    measured = {"*.down_proj": {"a_quantizer": "nvfp4", "a_bits": 4}}
    for quant, named in (
        (qat.QuantConfig(a_quantizer="learned_range"), "learned_range"),
        (qat.QuantConfig(overrides=measured), "nvfp4"),
    ):
        with pytest.raises(qat.UserError, match=f"a_quantizer={named} "):
            starting_point.check_teacher(Path("cache"), quant, TrainConfig())
        with pytest.raises(qat.UserError, match=f"a_quantizer={named} "):
            quantize.check(quantize.Quantization("model", Path("output")), quant, {})


def test_a_loss_of_ones_own_in_a_loop_of_ones_own():
    teacher, student = tiny_model(), qat.prepare(tiny_model(), qat.QuantConfig())
    tokens = torch.arange(5, 25)[None]
    loss, kl = Distiller(student)(tokens, TeacherTargets.of(teacher, tokens, Squared()))
    assert 0 < loss < kl
