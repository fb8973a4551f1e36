import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ids, tiny_model
from transformers import LlamaConfig, MistralConfig

from qat.data.sequences import Row, Sample
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.train import distill
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, LabelTargets, TeacherTargets, TopKTargets
from qat.train.losses import LOSSES, Loss
from qat.train.losses.base import log_softmax
from qat.train.teacher_cache import TeacherCache


def targets(teacher, tokens, loss=LOSSES["logits"]):
    with torch.no_grad():
        hidden, records = loss.run(teacher, tokens)
    return TeacherTargets(hidden, teacher.lm_head.weight, loss, records)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_fused_loss_and_gradients_equal_the_naive_formula(tied, chunk, monkeypatch):
    monkeypatch.setitem(distill.CHUNK_TOKENS, "cpu", chunk)
    monkeypatch.setattr(distill, "VOCABULARY_BLOCK", 128)  # the vocabulary has 300: the last block is a short one
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


def test_logits_in_bf16_are_compared_in_fp32():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (4 * torch.randn(32, 5000, generator=generator).bfloat16() for _ in range(2))
    expected_student = student.double()
    expected = LOSSES["logits"].chunk(teacher.double(), 32, expected_student)
    for found, exact in zip(LOSSES["logits"].chunk(teacher, 32, student), expected, strict=True):
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    # The gradient takes the logits' place: rounded to bf16 at its end, and nowhere before.
    torch.testing.assert_close(student.double(), expected_student, rtol=2**-8, atol=1e-9)


def test_a_measurement_does_no_work_for_gradients(monkeypatch):
    student, products = tiny_model(), []
    tokens = ids(student)
    distiller = Distiller(student)
    monkeypatch.setattr(distill, "matmul", lambda a, b: products.append(b.shape) or a @ b)
    with torch.no_grad():
        measured, _ = distiller(tokens, LabelTargets(tokens[0, 1:]))
    assert len(products) == 1
    learned, _ = distiller(tokens, LabelTargets(tokens[0, 1:]))
    assert torch.equal(measured, learned.detach())
    assert len(products) == 4


def test_without_targets_the_head_gives_logits():
    student, plain = tiny_model(), tiny_model()
    Distiller(student)
    assert torch.equal(student(ids(plain)).logits, plain(ids(plain)).logits)


def test_after_backward_the_loss_holds_no_gradient_and_refuses_another():
    """One of [vocabulary, hidden] would lie beside the next forward pass."""
    student = tiny_model(tie_word_embeddings=False)
    weight, tokens, given = student.lm_head.weight, ids(student), []
    shape = weight.shape  # the embedding's too
    weight.register_hook(lambda grad: given.append(grad.data_ptr()))
    loss, _ = Distiller(student)(tokens, LabelTargets(tokens[0, 1:]))
    before = alive(shape)
    loss.backward(retain_graph=True)
    assert given == [weight.grad.data_ptr()], "given away, not copied"
    assert alive(shape) == before, "the gradient that the loss held is the weight's now"
    first = weight.grad.clone()
    with pytest.raises(RuntimeError, match="works once: compute the loss again"):
        loss.backward()
    assert torch.equal(weight.grad, first)


def alive(shape) -> set[int]:
    """Where the tensors of a shape lie that somebody holds."""
    gc.collect()
    return {x.data_ptr() for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.shape == shape}


def test_an_output_layer_with_a_bias_is_refused():
    with pytest.raises(UserError, match="output layer has a bias"):
        distill.DistillationHead.convert(torch.nn.Linear(4, 9))


def loss_and_gradient(logits, targets):
    """Of the fused head, whose input and weight are chosen so that its logits are ``logits``."""
    head = distill.DistillationHead.convert(torch.nn.Linear(1, 1, bias=False))
    head.weight = torch.nn.Parameter(torch.eye(logits.shape[1], dtype=logits.dtype))
    hidden = logits.detach().requires_grad_()
    loss, kl = head(hidden, targets)
    loss.backward()
    return loss, kl, hidden.grad


def test_label_loss_is_cross_entropy_with_the_next_token():
    logits, labels = torch.randn(9, 40, dtype=torch.double, requires_grad=True), torch.arange(9)
    loss, kl, gradient = loss_and_gradient(logits, LabelTargets(labels))
    expected = torch.nn.functional.cross_entropy(logits, labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(gradient, logits.grad)


@given(st.integers(1, 39), st.integers(1, 6))
def test_top_k_loss_is_the_cross_entropy_of_k_tokens_and_the_rest(k, tokens):
    logits = torch.randn(tokens, 40, dtype=torch.double, requires_grad=True)
    log_p, ids_ = torch.randn(tokens, 40, dtype=torch.double).log_softmax(-1).topk(k)
    loss, kl, gradient = loss_and_gradient(logits, TopKTargets(ids_, log_p))

    def with_rest(p):
        return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)

    p, q = with_rest(log_p.exp()), with_rest(logits.softmax(-1).gather(1, ids_))
    expected = -(p * q.log()).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(kl, (p * (p / q).log()).sum(-1).mean())
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize(("family", "window"), [(LlamaConfig, None), (MistralConfig, 3)])
def test_hidden_state_and_attention_losses_and_gradients_equal_the_naive_formulas(family, window):
    more = {} if window is None else {"sliding_window": window}
    teacher, student = (tiny_model(family, **more).double() for _ in range(2))
    teacher.requires_grad_(False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    tokens = ids(teacher)
    seen = {}
    for name, model in (("teacher", teacher), ("student", student)):
        model.set_attn_implementation("eager")
        seen[name] = model(tokens, output_attentions=True, output_hidden_states=True)
    expected_attention = torch.stack(
        [
            (p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log()).sum(-1).mean()
            for p, q in zip(seen["teacher"].attentions, seen["student"].attentions, strict=True)
        ]
    ).mean()
    expected_hidden = torch.stack(
        [
            (s - t).square().sum() / t.square().sum()
            for s, t in zip(seen["student"].hidden_states, seen["teacher"].hidden_states, strict=True)
        ]
    ).mean()

    (expected_attention + expected_hidden).backward()
    expected_gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()

    def extra(name):
        loss = LOSSES[name]
        return loss.extra(*(loss.run(model, tokens)[1] for model in (student, teacher)))

    # Both are summed in fp32, whatever the model computes in.
    attention, hidden = extra("logits+attention"), extra("logits+hidden")
    torch.testing.assert_close(attention.double(), expected_attention, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.double(), expected_hidden, rtol=1e-5, atol=0)
    (attention + hidden).backward()
    for name, parameter in student.named_parameters():
        if expected_gradients[name] is not None:
            error = (parameter.grad - expected_gradients[name]).norm() / expected_gradients[name].norm()
            assert error < 1e-4, name


@pytest.mark.parametrize("loss", ["logits+hidden", "logits+attention"])
def test_what_else_is_matched_adds_to_the_loss_and_reaches_zero(loss):
    teacher, same, other = tiny_model(), tiny_model(), prepare(tiny_model(), QuantConfig(4, 8, 4))
    tokens = ids(teacher)
    plain, matched = targets(teacher, tokens), targets(teacher, tokens, LOSSES[loss])
    for student, adds in ((same, False), (other, True)):
        distiller = Distiller(student)
        more, least = distiller(tokens, matched)[0], distiller(tokens, plain)[0]
        assert (more > least + 1e-3) if adds else torch.isclose(more, least, rtol=1e-6)


class ReverseKL(Loss):
    """KL(student || teacher) of both distributions at a temperature: as somebody else would write a loss."""

    meaning = "KL(student || teacher) at a temperature"

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature

    def chunk(self, target, tokens, student_logits):
        log_student, log_teacher = (log_softmax(logits / self.temperature) for logits in (student_logits, target))
        difference, student = log_student - log_teacher, log_student.exp()
        kl = (student * difference).sum(-1, keepdim=True)
        student_logits.copy_(student * (difference - kl) / (self.temperature * tokens))
        return kl.sum(), kl.sum()


@pytest.fixture
def reverse(monkeypatch):
    """The name of a loss that a plug-in has added, until the test ends."""
    monkeypatch.setattr(LOSSES, "_things", dict(LOSSES))
    LOSSES.add("reverse", ReverseKL(temperature=2.0))
    return "reverse"


@pytest.mark.parametrize("chunk", [4, 1000])
def test_a_loss_of_a_plug_in_trains(reverse, chunk, monkeypatch):
    """Its gradients are autograd's of the naive formula, and a step along them makes it smaller."""
    monkeypatch.setitem(distill.CHUNK_TOKENS, "cpu", chunk)
    teacher = tiny_model().double()
    student, naive = (tiny_model().double() for _ in range(2))
    with torch.no_grad():
        for parameter in (*student.parameters(), *naive.parameters()):
            parameter.mul_(1.1)
    tokens = ids(teacher)
    assert TrainConfig(loss=reverse).loss == reverse
    learned_from, distiller = targets(teacher, tokens, LOSSES[reverse]), Distiller(student)
    loss, kl = distiller(tokens, learned_from)
    loss.backward()

    with torch.no_grad():
        log_p = (teacher(tokens).logits[0, :-1] / 2).log_softmax(-1)
    log_q = (naive(tokens).logits[0, :-1] / 2).log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close((loss, kl), (expected, expected))
    for (name, a), b in zip(student.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)

    torch.optim.SGD(student.parameters(), lr=1e-3).step()
    assert distiller(tokens, learned_from)[0] < loss


def test_a_loss_that_there_is_not_is_refused(reverse):
    with pytest.raises(UserError, match=r"loss='mse' is invalid: choose logits or .* or reverse"):
        TrainConfig(loss="mse")
    with pytest.raises(UserError, match=r"The loss 'mse' is unknown: choose logits or .* with --plugin"):
        LOSSES["mse"]


@pytest.mark.parametrize(("top_k", "refused"), [(0, []), (8, ["reverse"])])
def test_a_cache_serves_the_losses_that_can_use_it(top_k, refused, reverse, tmp_path):
    """Whole distributions all of them, the most likely tokens those that take them."""
    TeacherCache(tmp_path).record({"top_k": top_k})
    for name in ("logits", reverse):
        if name in refused:
            with pytest.raises(UserError, match=r"loss=reverse needs .* has only its 8 most .* --top_k 0"):
                TeacherCache(tmp_path, name).check_loss()
        else:
            TeacherCache(tmp_path, name).check_loss()
    student, sample = tiny_model(), Sample(0, ids(tiny_model()))
    hidden = {"hidden": predicting(student, sample.input_ids).detach()}
    top = student(sample.input_ids).logits[0, :-1].detach().log_softmax(-1).topk(8)
    TeacherCache(tmp_path).write_head(student.lm_head.weight)
    TeacherCache(tmp_path).write(0, [{"ids": top.indices, "log_probabilities": top.values} if top_k else hidden])
    for name in {"logits", reverse}.difference(refused):
        cache = TeacherCache(tmp_path, name)
        loss, kl = Distiller(tiny_model())(sample.input_ids, cache(Row.of(sample)))
        assert kl.abs() < 1e-6, "the student is its teacher"
        assert (loss == kl) == (name == reverse)
