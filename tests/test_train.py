"""Real runs of ``launch/train.py``, ZeRO-3, on CPU ranks."""

import json
import math
import os
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, error_of, finish, generate_flags, kill, run_python, start_command, start_training
from compiler import needs_compiler
from deepspeed.ops.op_builder import AsyncIOBuilder
from faults import odd
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from training import CONFIG, STEPS, flags, latest, log_of, losses
from transformers import LlamaConfig, Starcoder2Config

import qat
from launch import cli
from launch.stages import free_port
from launch.train import Paths
from qat.data.sequences import TrainingData
from qat.export import export
from qat.export.formats import DEFAULT_EXPORT_FORMAT
from qat.infer import simulated
from qat.quant.architecture import ARCHITECTURES, Architecture
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.runtime.preemption import RESUMABLE_EXIT
from qat.store import models, student_folder
from qat.train import flops, loop
from qat.train.checkpoint import TrainState
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, TeacherTargets
from qat.train.loop import check_sane, update_average

QUANT = QuantConfig(w_bits=3)  # coarse: much to learn in few steps


HELD_OUT = 5
"""Sequences to validate on: an odd number on two ranks."""


@pytest.fixture(scope="module")
def held_out_data(tiny_directory, tmp_path_factory) -> Path:
    """Sequences that are not trained on."""
    directory = tmp_path_factory.mktemp("held_out") / "shards"
    run_python("generate", *generate_flags(tiny_directory, directory), "--seed=1")
    return directory


@pytest.fixture(scope="module")
def run(tiny_directory, tiny_data, held_out_data, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks, with all that can be measured on the way."""
    output = tmp_path_factory.mktemp("run") / "whole"
    text = [f"--eval_text={ROOT / 'LICENSE'}", "--eval_window=64"]
    measured = [f"--eval_data={held_out_data}", *text, f"--eval_sequences={HELD_OUT}", "--eval_every=8"]
    said = finish(start_training(2, *flags(tiny_directory, tiny_data, output), *measured, "--peak_flops=1e9"))
    assert "peak memory of a rank: " in said
    return output


@pytest.fixture(scope="module")
def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def test_the_loss_falls(run):
    kl = [record["kl"] for record in log_of(run)]
    assert len(kl) == STEPS
    assert sum(kl[6:]) < 0.8 * sum(kl[:6]), "the second pass over the data, against the first"


def test_two_sharded_ranks_equal_one_plain_process(run, weights, tiny_directory, tiny_data):
    """The same global batches in plain PyTorch: no DeepSpeed, no sharding, no checkpointing."""
    model, tokenizer = str(tiny_directory), models.load_tokenizer(str(tiny_directory))
    teacher = models.load(model, torch.float32)
    student = Distiller(prepare(models.load(model, torch.float32), QUANT).train())
    data = TrainingData(tiny_data, tokenizer, CONFIG.seed)
    optimizer = torch.optim.AdamW(student.parameters(), CONFIG.lr, weight_decay=0.0, fused=True)
    for step, record in enumerate(log_of(run)):
        optimizer.param_groups[0]["lr"] = CONFIG.lr * CONFIG.lr_factor(step)
        optimizer.zero_grad()
        total = 0.0
        for number in (2 * step, 2 * step + 1):
            ids = data.sample(number).input_ids
            with torch.no_grad():
                targets = TeacherTargets(predicting(teacher, ids), teacher.lm_head.weight)
            loss, _ = student(ids, targets)
            (loss / 2).backward()
            total += loss.item() / 2
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CONFIG.gradient_clipping)
        optimizer.step()
        # Equal, until a code of a weight rounds otherwise: the norm that clips is summed in another order.
        assert record["loss"] == pytest.approx(total, rel=5e-5), f"step {step}"
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), f"step {step}"
    ours = dict(student.student.named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name].data, weight, rtol=0, atol=2e-4, msg=name)


def test_killed_and_resumed_equals_uninterrupted(run, weights, tiny_directory, tiny_data, tmp_path):
    """By the command line of the README, with DeepSpeed's own launcher, which is killed too; then by the module."""
    output = tmp_path / "killed"
    deepspeed = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}"]
    settings = flags(tiny_directory, tiny_data, output)
    process = start_command(*deepspeed, ROOT / "launch" / "train.py", *settings)
    while process.poll() is None and not (output / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    assert not (output / "final").exists(), "the run must be killed before its end for this test to say anything"
    finish(start_command(*deepspeed, "--module", "launch.train", *settings))
    assert losses(output) == losses(run)
    resumed = load_file(output / "final" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_a_signal_saves_and_the_run_goes_on(run, weights, tiny_directory, tiny_data, tmp_path):
    output = tmp_path / "signalled"
    process = start_training(1, *flags(tiny_directory, tiny_data, output))
    while process.poll() is None and not (output / "log.jsonl").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    saved = (output / "checkpoints" / "latest").read_text()
    assert int(saved.removeprefix("step-")) == len(log_of(output)) < STEPS
    finish(start_training(1, *flags(tiny_directory, tiny_data, output)))
    # One rank that accumulates two sequences takes the same global batches as two ranks.
    for one, two in zip(losses(output), losses(run), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_a_rank_that_a_signal_stops_exits_with_the_resumable_code(tiny_directory, tiny_data, tmp_path):
    """By it launch/slurm/resumable.sh puts a job back into the queue. Started by plain python, a rank is alone."""
    process = start_command("python", ROOT / "launch" / "train.py", *flags(tiny_directory, tiny_data, tmp_path))
    while process.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == RESUMABLE_EXIT
    assert said.splitlines()[-1] == f"stopped by a signal and saved: the same command resumes {tmp_path}"
    assert int(latest(tmp_path).removeprefix("step-")) == len(log_of(tmp_path))


def test_another_number_of_ranks_goes_on_with_the_same_batches(run, weights, tiny_directory, tiny_data, tmp_path):
    """2 -> 1 -> 2, each killed in between. Small groups of Parameters: each has a count of its own of Adam's steps."""
    output, small_groups = tmp_path / "resized", tmp_path / "small_groups.json"
    ds_config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    ds_config["zero_optimization"]["sub_group_size"] = 20_000
    small_groups.write_text(json.dumps(ds_config))
    command = [*flags(tiny_directory, tiny_data, output, small_groups), "--save_every=3"]
    for ranks in (2, 1):
        before, process = latest(output), start_training(ranks, *command)
        while process.poll() is None and latest(output) == before:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[0]
        kill(process)
    printed = finish(start_training(2, *command))
    assert "written by 1 ranks, for 2" in printed
    for resized, whole in zip(losses(output), losses(run), strict=True):
        assert resized == pytest.approx(whole, rel=1e-3)
    resumed = load_file(output / "final" / "model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=2e-4, msg=name)
    for file in (output / "checkpoints" / latest(output)).glob("*_optim_states.pt"):
        adam = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["state"]
        assert len(adam) > 1
        assert {int(group["step"]) for group in adam.values()} == {STEPS}


@pytest.mark.parametrize("size", ["7b", "13b", "30b"])
def test_the_recipes_are_the_papers(size, monkeypatch):
    recipe = ROOT / "launch" / "recipes" / f"{size}.yaml"
    places = ["--model=m", "--data=d", "--output=o"]
    monkeypatch.setattr("sys.argv", ["train.py", f"--config={recipe}", *places])
    _, quant, config = cli.parse("", Paths, QuantConfig, TrainConfig)
    assert str(quant) == "4-8-4"
    assert config.batch_size == 8
    assert config.lr == 2e-5
    assert [replace(config, steps=100).lr_factor(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size=2 cannot be shared by 3 ranks"):
        TrainConfig(batch_size=2).ds_settings(3)


def test_text_that_is_longer_than_the_model_attends_over_is_refused(monkeypatch, tiny_directory, tiny_data, tmp_path):
    short = shutil.copytree(tiny_directory, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    message = error_of(monkeypatch, "train", *flags(short, tiny_data, tmp_path / "out"))
    assert "The longest sequence of data=24 is longer than the 16 positions" in message


def test_an_output_that_cannot_be_written_to_is_refused(monkeypatch, tiny_directory, tiny_data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = error_of(monkeypatch, "train", *flags(tiny_directory, tiny_data, tmp_path / "file" / "run"))
    assert "cannot be written to" in message


def test_a_vanished_shard_is_named_and_the_checkpoint_stays(run, monkeypatch, tiny_directory, tiny_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "shard-00001.parquet").unlink()
    message = error_of(monkeypatch, "train", *flags(tiny_directory, data, run))
    assert "8 of its 12 sequences" in message
    assert latest(run) == f"step-{STEPS:06d}"


@pytest.mark.parametrize(
    ("loss", "norm", "found"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (2.0, math.inf, "gradient norm inf"),
        (12.0, 1.0, "more than max_loss_ratio=4"),
    ],
)
def test_a_loss_that_is_not_finite_or_explodes_stops_the_run(loss, norm, found, tmp_path):
    (tmp_path / "latest").write_text("step-000020")
    state = TrainState()
    for step in range(1, 41):
        state.step = step
        check_sane({"loss": 2.0 + step % 2, "grad_norm": 1.0}, CONFIG, state, tmp_path)
        update_average(state, 2.0 + step % 2)
    before = replace(state)
    check_sane({"loss": 2.0, "grad_norm": 1.0}, CONFIG, state, tmp_path)
    assert state == before, "a check changes nothing"
    assert state.average_loss == pytest.approx(2.5, abs=0.1)
    state.step += 1
    with pytest.raises(UserError, match=found) as stopped:
        check_sane({"loss": loss, "grad_norm": norm}, CONFIG, state, tmp_path)
    assert "The last good checkpoint is " + str(tmp_path / "step-000020") in str(stopped.value)


def test_validation_is_the_perplexity_of_the_quantized_student(run, tiny_directory, held_out_data):
    """What the run logged of its held-out shards, against evaluation of the trained student in one process."""
    student = simulated.load(str(run / "final"), torch.float32)
    data = TrainingData(held_out_data, models.load_tokenizer(str(tiny_directory)), 0)
    nats = tokens = 0.0
    for number in range(HELD_OUT):
        ids = data.sequence(number).input_ids
        logits = student(ids).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    evaluated = [record for record in log_of(run) if "ppl_generated" in record]
    assert [record["step"] for record in evaluated] == [8, STEPS]
    assert evaluated[-1]["ppl_generated"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert all("ppl_text" in record for record in evaluated)


def test_a_signal_before_there_is_anything_to_save_ends_training_at_once(
    monkeypatch, tiny_directory, tiny_data, tmp_path
):
    """Also in the midst of what does not come back to Python: it is not handled there."""

    def initialise() -> None:
        handlers = {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
        raise UserError(f"handled by {handlers}")

    monkeypatch.setattr("qat.train.engines.init_distributed", initialise)
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    }
    try:
        message = error_of(monkeypatch, "train", *flags(tiny_directory, tiny_data, tmp_path / "run"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert message == f"error: handled by {{{signal.SIG_DFL!r}}}"


def test_a_measurement_that_a_signal_kept_off_is_made_afterwards(monkeypatch, tmp_path):
    """Of the loop alone: what it calls is recorded. The signals come in steps 4, 8 and 10, of which the first two are
    due and the last is the run's end."""
    state, logged = TrainState(), []

    def take_step(*given):
        return SimpleNamespace(step=given[4].step + 1)

    def read(taken, *_):
        assert taken.step == state.step + 1, "figures are read in order, each once"
        state.step = taken.step
        return {"loss": 2.0, "grad_norm": 1.0}, state.step in (4, 8, 10)

    log = SimpleNamespace(step=lambda state, figures: logged.append((state.step, "ppl_text" in figures)))
    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr(loop, "read", read)
    monkeypatch.setattr(loop, "perplexities", lambda *_: {"text": 9.0})
    monkeypatch.setattr(loop, "RunLog", lambda *_: nullcontext(log))
    monkeypatch.setattr(loop.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(loop.checkpoint, "resume", lambda *_: state)
    monkeypatch.setattr(loop.checkpoint, "save", lambda *_: None)
    config = TrainConfig(steps=10, eval_every=4)
    ends = [loop.train(None, None, None, config, tmp_path, None, {"text": [torch.zeros(1, 2)]}) for _ in range(3)]
    assert ends == [False, False, True]
    assert [step for step, measured in logged if measured] == [5, 9, 10]


def test_figures_are_read_one_step_late_and_all_before_a_checkpoint(monkeypatch, tmp_path):
    """Of the loop alone. A signal of step 6 is heard of in step 7, unless step 6 is saved anyway; a loss that is not
    finite stops the run before anything is saved that came of it."""
    events: list[str] = []
    state, bad = TrainState(), 99

    def take_step(*given):
        events.append(f"take {given[4].step + 1}")
        return SimpleNamespace(step=given[4].step + 1)

    def read(taken, *_):
        state.step = taken.step
        events.append(f"read {taken.step}")
        if taken.step == bad:
            raise UserError("the loss is nan")
        return {}, taken.step == 6

    log = SimpleNamespace(step=lambda state, figures: events.append(f"log {state.step}"))
    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr(loop, "read", read)
    monkeypatch.setattr(loop, "RunLog", lambda *_: nullcontext(log))
    monkeypatch.setattr(loop.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(loop.checkpoint, "resume", lambda *_: state)
    monkeypatch.setattr(loop.checkpoint, "save", lambda *_: events.append(f"save {state.step}"))
    config = TrainConfig(steps=10, save_every=3)
    assert not loop.train(None, None, None, config, tmp_path, None, {})
    assert " ".join(events) == (
        "take 1 take 2 read 1 log 1 take 3 read 2 log 2 read 3 log 3 save 3 "
        "take 4 take 5 read 4 log 4 take 6 read 5 log 5 read 6 log 6 save 6"
    )
    events.clear()
    assert loop.train(None, None, None, config, tmp_path, None, {})
    assert " ".join(events) == (
        "take 7 take 8 read 7 log 7 take 9 read 8 log 8 read 9 log 9 save 9 take 10 read 10 log 10 save 10"
    )
    state.step, bad = 0, 2
    events.clear()
    with pytest.raises(UserError, match="the loss is nan"):
        loop.train(None, None, None, config, tmp_path, None, {})
    assert events[-1] == "read 2"
    assert not [event for event in events if event.startswith("save")]
    state.step, bad = 3, 99
    events.clear()
    config = TrainConfig(steps=10, save_every=100)
    assert not loop.train(None, None, None, config, tmp_path, None, {})
    assert events[-6:] == ["take 7", "read 6", "log 6", "read 7", "log 7", "save 7"]


def test_the_training_data_is_not_validated_on(monkeypatch, tiny_directory, tiny_data, tmp_path):
    message = error_of(
        monkeypatch, "train", *flags(tiny_directory, tiny_data, tmp_path / "out"), f"--eval_data={tiny_data}"
    )
    assert "is the training data" in message


def test_tensorboard_gets_what_the_log_has(run):
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("loss", "kl", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gb"):
        points = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert points == {
            record["step"] * CONFIG.batch_size: pytest.approx(record[name], rel=1e-6) for record in log_of(run)
        }, name


TWO_MATRICES = Architecture(
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
    )
)
"""StarCoder 2, whose MLP has no gate."""


@pytest.mark.parametrize("family", [LlamaConfig, Starcoder2Config])
def test_model_flops_are_those_that_pytorch_counts(family, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES._things, "starcoder2", TWO_MATRICES)
    model, tokens = tiny_model(family, tie_word_embeddings=False, use_bias=False), 24
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    matrices = flops.matrix_elements(model)
    assert counted[torch.ops.aten.mm] == 2 * matrices * tokens
    # Eager attention computes the whole square of scores, of which we count the causal half.
    assert counted[torch.ops.aten.bmm] == 2 * (flops.forward(model.config, matrices, tokens) - 2 * matrices * tokens)


def test_the_trained_student_exports_and_reloads_bit_for_bit(run, tmp_path):
    export.export(student_folder.find(run / "final"), tmp_path / "export", DEFAULT_EXPORT_FORMAT)
    ids = torch.arange(2, 50)[None]
    in_memory = simulated.load(str(run / "final"), torch.float32)
    reloaded = simulated.load(str(tmp_path / "export"), torch.float32)
    assert torch.equal(in_memory(ids).logits, reloaded(ids).logits)


def test_the_gpu_configuration_computes_in_bf16_and_survives_a_kill(run, tiny_directory, tiny_data, tmp_path):
    """Same JSON as on GPUs, here on two CPU ranks, compiled: bf16 compute, fp32 master weights."""
    needs_compiler()
    ds_config = ROOT / "ds_configs" / "zero3.json"
    whole = losses_killed_or_not(tiny_directory, tiny_data, tmp_path, ds_config, ds_config.name, compiled=True)
    weights = load_file(tmp_path / "killed" / "final" / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    for bf16, fp32 in zip(whole, losses(run), strict=True):
        assert bf16[0] == pytest.approx(fp32[0], rel=0.02)


@pytest.mark.slow  # builds DeepSpeed's Adam for the host: minutes, once
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("zero3_offload_optimizer.json", "teacher_zero3.json"),
        ("zero3_offload.json", "teacher_zero3_offload.json"),
    ],
)
def test_every_way_of_running_learns_the_same_and_survives_a_kill(
    student, teacher, run, tiny_directory, tiny_data, tmp_path
):
    whole = losses_killed_or_not(tiny_directory, tiny_data, tmp_path, ROOT / "ds_configs" / student, teacher)
    for bf16, fp32 in zip(whole, losses(run), strict=True):
        assert bf16[0] == pytest.approx(fp32[0], rel=0.02)


@pytest.mark.slow  # builds DeepSpeed's asynchronous reads and writes
def test_the_optimizer_on_nvme_learns_the_same_and_survives_a_kill(tiny_directory, tiny_data, tmp_path):
    """With a model that is large enough: DeepSpeed takes nothing below 1 MiB to the disk."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's asynchronous reads and writes need libaio-dev")
    ds_config = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    ds_config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path)
    (tmp_path / "nvme.json").write_text(json.dumps(ds_config))
    too_small = start_training(2, *flags(tiny_directory, tiny_data, tmp_path / "small", tmp_path / "nvme.json"))
    assert "must have 1 MiB or more" in too_small.communicate(timeout=300)[0]
    assert too_small.returncode == 2
    model = tmp_path / "model"
    tiny_model(hidden_size=128, intermediate_size=512, num_hidden_layers=4).save_pretrained(model)
    models.load_tokenizer(str(tiny_directory)).save_pretrained(model)
    whole = losses_killed_or_not(model, tiny_data, tmp_path, tmp_path / "nvme.json", "teacher_zero3_offload.json")
    finish(start_training(2, *flags(model, tiny_data, tmp_path / "host", ROOT / "ds_configs" / "zero3_offload.json")))
    for on_nvme, on_host in zip(whole, losses(tmp_path / "host"), strict=True):
        assert on_nvme == pytest.approx(on_host, rel=1e-6)


def losses_killed_or_not(
    model: Path, data: Path, folder: Path, student: Path, teacher: str, compiled: bool = False
) -> list:
    """The losses of a run, which must be those of a run that was killed after its first checkpoint, too."""
    whole, killed = folder / "whole", folder / "killed"
    more = [f"--teacher_deepspeed={ROOT / 'ds_configs' / teacher}", "--save_every=3"]
    said = finish(start_training(2, *flags(model, data, whole, student), *more, compiled=compiled))
    process = start_training(2, *flags(model, data, killed, student), *more, compiled=compiled)
    while process.poll() is None and not latest(killed):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    said += finish(start_training(2, *flags(model, data, killed, student), *more, compiled=compiled))
    assert "torch.compile" not in said  # it warns where it does not work
    assert losses(killed) == losses(whole)
    return losses(whole)


def test_a_student_begins_where_smoothquant_ended(tiny_directory, tiny_data, tmp_path):
    """The first step's KL is that of the post-training model on the same samples, and training lowers it. The folder
    of the model is odd, as real ones are: that changes nothing that is computed, nor keeps final/ from being saved."""
    model, smooth, output = tmp_path / "model", tmp_path / "smooth", tmp_path / "out"
    odd(shutil.copytree(tiny_directory, model))
    quantize = [f"--model={model}", f"--data={tiny_data}", f"--output={smooth}", "--w_bits=3"]
    run_python("quantize", "--method=smoothquant", *quantize)
    finish(start_training(2, *flags(model, tiny_data, output), f"--student={smooth}"))
    teacher, student = models.load(str(tiny_directory), torch.float32), simulated.load(str(smooth), torch.float32)
    data = TrainingData(tiny_data, models.load_tokenizer(str(tiny_directory)), CONFIG.seed)
    expected = []
    for number in (0, 1):
        ids = data.sample(number).input_ids
        with torch.no_grad():
            log_p, log_q = (model(ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
        expected.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    kl = [record["kl"] for record in log_of(output)]
    assert kl[0] == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert sum(kl[6:]) < sum(kl[:6])
    final = output / "final"
    assert (final / "generation_config.json").read_bytes() == (model / "generation_config.json").read_bytes()
    assert (final / "model.safetensors").stat().st_mode == (final / "config.json").stat().st_mode
    assert torch.isfinite(qat.load(str(final))(torch.arange(2, 20)[None]).logits).all()


def test_a_student_of_another_model_is_refused(monkeypatch, tiny_directory, tiny_data, run, tmp_path):
    other = tmp_path / "other"
    tiny_model(intermediate_size=128).save_pretrained(other)
    shutil.copytree(
        tiny_directory, other, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*", "config*")
    )
    command = flags(other, tiny_data, tmp_path / "out")
    assert "was not made from" in error_of(monkeypatch, "train", *command, f"--student={run / 'final'}")
    assert "is not a student" in error_of(monkeypatch, "train", *command, f"--student={tiny_directory}")
    assert "is a checkpoint" in error_of(monkeypatch, "train", *command, f"--student={run / 'checkpoints'}")


def test_a_finished_run_is_left_alone(run, tiny_directory, tiny_data):
    before = (run / "final" / "model.safetensors").stat().st_mtime_ns
    finish(start_training(2, *flags(tiny_directory, tiny_data, run)))
    assert (run / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_is_not_gone_on_with_under_other_settings(run, tiny_directory, tiny_data, monkeypatch):
    message = error_of(monkeypatch, "train", *flags(tiny_directory, tiny_data, run), "--lr=5e-4", "--a_bits=6")
    assert "a_bits was 8, now 6, lr was 0.001, now 0.0005" in message


def test_only_so_many_checkpoints_are_kept(run):
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-000010", f"step-{STEPS:06d}"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{STEPS:06d}"
