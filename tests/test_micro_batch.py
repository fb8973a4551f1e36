"""Packed equals one by one: sequences in one row of a forward pass learn what each of them learns alone."""

import time

import pytest
import torch
from commands import finish, kill, start_training
from safetensors.torch import load_file
from tiny import tiny_model
from training import flags, latest, log_of, losses
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.integrations import sdpa_attention

from qat.data.sequences import Row, Sample
from qat.quant.config import QuantConfig
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.train import engines
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, TeacherTargets, TopKTargets
from qat.train.losses import LOSSES

LENGTHS = (17, 2, 40, 9)
WINDOW = 12
QUANTS = {
    "none": QuantConfig(16, 16, 16),
    "rotated": QuantConfig(4, 8, 4, kv_rotation="hadamard"),
    "before RoPE": QuantConfig(4, 8, 4, kv_site="pre_rope", kv_granularity="token"),
    "groups": QuantConfig(4, 6, 4, w_group_size=16, kv_quantizer="minmax_asymmetric"),
}
MODELS = {
    "llama": (LlamaConfig, {}),
    "sliding window": (MistralConfig, {"sliding_window": WINDOW}),
    "some windows": (
        Qwen2Config,
        {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": False},
    ),
}


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    return [Sample(n, torch.randint(2, 300, (1, length), generator=generator)) for n, length in enumerate(LENGTHS)]


def learned(student, row: Row, targets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(Loss, KL), and the gradients of one row."""
    student.zero_grad()
    figures = torch.stack(Distiller(student)(row.input_ids, targets))
    figures[0].backward()
    return figures.detach(), {name: p.grad.clone() for name, p in student.named_parameters()}


def taught(teacher, row: Row, loss: str):
    if not LOSSES[loss].needs_teacher:
        return engines.labels(loss)(row)
    with torch.no_grad():
        hidden, records = LOSSES[loss].run(teacher, row.input_ids, row.lengths)
    head = TeacherTargets.of(teacher, row.samples[0].input_ids).head
    return TeacherTargets(hidden, head, LOSSES[loss], records, row.predicted)


def check(student, teacher, targets_of) -> None:
    packed = Row.of(*samples())
    figures, gradients = learned(student, packed, targets_of(packed))
    alone = [learned(student, row, targets_of(row)) for row in map(Row.of, samples())]
    torch.testing.assert_close(figures, torch.stack([own for own, _ in alone]).mean(0), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        expected = torch.stack([own[name] for _, own in alone]).mean(0)
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("quant", QUANTS)
def test_packed_sequences_learn_what_each_learns_alone(quant, family):
    config, changes = MODELS[family]
    teacher, student = (tiny_model(config, **changes) for _ in range(2))
    prepare(student, QUANTS[quant])
    with torch.no_grad():  # a student of its own, also in full precision
        student.model.layers[0].mlp.down_proj.weight *= 0.9
    check(student, teacher, lambda row: taught(teacher, row, "logits"))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "logits"])
def test_with_every_loss(loss):
    teacher, student = tiny_model(), prepare(tiny_model(), QUANTS["rotated"])
    check(student, teacher, lambda row: taught(teacher, row, loss))


def test_with_the_most_likely_tokens_alone():
    teacher, student = tiny_model(), prepare(tiny_model(), QUANTS["rotated"])

    def top_k(row: Row) -> TopKTargets:
        ids = row.input_ids[0].split(row.lengths)
        with torch.no_grad():
            top = torch.cat([teacher(own[None]).logits[0, :-1].log_softmax(-1) for own in ids]).topk(8)
        return TopKTargets(top.indices, top.values, lengths=row.predicted)

    check(student, teacher, top_k)


def test_no_scores_of_one_sequence_with_another_are_computed(monkeypatch):
    seen, attention = [], sdpa_attention.sdpa_attention_forward

    def noting(module, query, key, value, mask, **kwargs):
        seen.append((query.shape[2], key.shape[2], None if mask is None else tuple(mask.shape[2:])))
        return attention(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", noting)
    model, row = tiny_model(MistralConfig, sliding_window=WINDOW), Row.of(*samples())
    LOSSES["logits"].run(model, row.input_ids, row.lengths)
    assert seen == 2 * [(n, n, (n, n) if n > WINDOW else None) for n in LENGTHS]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="micro_batch_size=3 does not divide a rank's share of 4 sequences"):
        TrainConfig(batch_size=8, micro_batch_size=3).ds_settings(2)


def test_two_ranks_train_as_one_by_one_and_resume_in_the_middle(tiny_directory, tiny_data, tmp_path):
    single, packed, killed = (tmp_path / name for name in ("single", "packed", "killed"))

    def command(output, size):
        return [*flags(tiny_directory, tiny_data, output), "--batch_size=4", f"--micro_batch_size={size}"]

    for output, size in ((single, 1), (packed, 2)):
        finish(start_training(2, *command(output, size)))
    for one, two in zip(log_of(single), log_of(packed), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["kl"] == pytest.approx(two["kl"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    weights = load_file(packed / "final" / "model.safetensors")
    for name, weight in load_file(single / "final" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-4, msg=name)

    process = start_training(2, *command(killed, 2))
    while process.poll() is None and not latest(killed):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    finish(start_training(2, *command(killed, 2)))
    assert losses(killed) == losses(packed)
    resumed = load_file(killed / "final" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
