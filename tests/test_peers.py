"""What is measured beside other code learns the same, from the same: benchmarks/peers.py."""

import sys

import pytest
import torch
from commands import ROOT
from tiny import tiny_model

from launch.paper import claims
from qat.quant.config import QuantConfig
from qat.quant.prepare import prepare
from qat.train.distill import Distiller, TeacherTargets

sys.path.append(str(ROOT / "benchmarks"))
import peer_arms


def test_the_plain_loss_is_ours():
    teacher, ids = tiny_model().eval(), torch.arange(20)[None]
    torch.manual_seed(1)
    student = prepare(tiny_model(), QuantConfig(4, 8, 16))
    plain = peer_arms.full_logits(student, teacher)(ids)
    plain.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    student.zero_grad()
    ours, _ = Distiller(student).train()(ids, TeacherTargets.of(teacher, ids))
    ours.backward()
    assert plain.item() == pytest.approx(ours.item(), rel=1e-5)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_the_page_of_results_shows_every_arm():
    figures = {"kl": 0.5, "kl_stderr": 0.01, "perplexity": 30.0, "tokens_per_second": 70.0, "peak_gb": 4.5}
    arms = [
        {"name": name, "grid": "per channel", "method": arm.method, "exports": arm.exports, **figures}
        for name, arm in peer_arms.ARMS.items()
    ]
    arms[-1]["tokens_per_second"] = None
    made = {"bits": "W4A8", "steps": 40, "batch_size": 2, "machine": "a Xeon", "versions": {"torch": "2"}, "arms": arms}
    title, said, table = claims._peers(made)
    assert title == "## Beside other code"
    assert "40 steps of 2 sequences on a Xeon" in said
    assert "| ours | per channel | QAT" in table
    assert len(table.splitlines()) == 2 + len(arms)
    assert claims._peers({}) == []
