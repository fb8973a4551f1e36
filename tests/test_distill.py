from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_model
from test_prepare import ids

from qat import distill
from qat.distill import Distiller, TeacherTargets, predicting
from qat.prepare import QuantConfig, prepare


def targets(teacher, tokens):
    with torch.no_grad():
        return TeacherTargets(predicting(teacher, tokens), lambda: nullcontext(teacher.lm_head.weight))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_fused_loss_and_gradients_equal_the_naive_formula(tied, chunk, monkeypatch):
    monkeypatch.setitem(distill.CHUNK_TOKENS, "cpu", chunk)
    teacher = tiny_model(tie_word_embeddings=tied).double()
    student, naive = (prepare(tiny_model(tie_word_embeddings=tied), QuantConfig()).double() for _ in range(2))
    tokens = ids(teacher)
    cross_entropy, kl = Distiller(student)(tokens, targets(teacher, tokens))
    (3 * cross_entropy).backward()  # a factor, as gradient accumulation brings

    with torch.no_grad():
        p = teacher(tokens).logits[0, :-1].softmax(-1)
    log_q = naive(tokens).logits[0, :-1].log_softmax(-1)
    expected = -(p * log_q).sum(-1).mean()
    (3 * expected).backward()
    torch.testing.assert_close(cross_entropy, expected)
    torch.testing.assert_close(kl, (p * (p.log() - log_q)).sum(-1).mean())
    for (name, a), b in zip(student.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_a_student_that_equals_its_teacher_has_no_kl_and_no_gradient():
    teacher, student = tiny_model(), tiny_model()
    tokens = ids(teacher)
    cross_entropy, kl = Distiller(student)(tokens, targets(teacher, tokens))
    cross_entropy.backward()
    assert kl.abs() < 1e-6
    assert all(p.grad.abs().max() < 1e-6 for p in student.parameters())


def test_without_targets_the_head_gives_logits():
    student, plain = tiny_model(), tiny_model()
    Distiller(student)
    assert torch.equal(student(ids(plain)).logits, plain(ids(plain)).logits)
