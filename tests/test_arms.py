"""Every quantizer and every distillation variant trains: 20 real ZeRO-3 steps on two CPU ranks, and its loss falls."""

import re

import pytest
import torch
from commands import ROOT, error_of, finish, run_python, run_ranks, start, start_training
from compiler import needs_compiler
from safetensors.torch import load_file
from tiny import tiny_model
from training import log_of, losses

from qat.data.sequences import Row, Sample, TrainingData
from qat.infer import simulated
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.store import models
from qat.store.sidecars import STEPS_FILE
from qat.train.config import TrainConfig
from qat.train.teacher_cache import TeacherCache

JSON = f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"
ARMS = {
    "asymmetric": [
        "--w_quantizer=minmax_asymmetric",
        "--a_quantizer=minmax_asymmetric",
        "--kv_quantizer=minmax_asymmetric",
    ],
    "groups": ["--w_group_size=16", "--kv_rotation=hadamard"],
    "statsq": ["--w_quantizer=statsq"],
    "statsq and lsq": ["--w_quantizer=statsq", "--a_quantizer=lsq"],
    "lsq": ["--a_quantizer=lsq", "--kv_granularity=token", "--kv_site=pre_rope"],
    "label": ["--loss=label"],
    "hidden": ["--loss=logits+hidden"],
    "attention": ["--loss=logits+attention", "--kv_rotation=hadamard"],
    "attention of an unquantized cache": ["--loss=logits+attention", "--kv_bits=16"],
}


def flags(model, data, output) -> list[str]:
    return [
        f"--model={model}",
        f"--data={data}",
        f"--output={output}",
        JSON,
        "--steps=20",
        "--lr=1e-3",
        "--w_bits=3",
        "--batch_size=2",
    ]


def falls(run) -> bool:
    loss = [record["loss"] for record in log_of(run)]
    assert len(loss) == 20
    return sum(loss[14:]) < sum(loss[:6])  # six steps are one pass over the data


@pytest.mark.parametrize("arm", ARMS)
def test_arm_trains(arm, tiny_directory, tiny_data, tmp_path):
    said = finish(start_training(2, *flags(tiny_directory, tiny_data, tmp_path / "run"), *ARMS[arm]))
    assert falls(tmp_path / "run")
    place = None if arm == "label" else "sharded" if "hidden" in arm or "attention" in arm else "replicated"
    assert re.findall(r"The teacher is (\w+)", said) == [place] * (place is not None), "as planned"
    assert all(("kl" in record) == (arm != "label") for record in log_of(tmp_path / "run")), "the teacher's, or none"


def test_learned_steps_are_saved_and_loaded(tiny_directory, tiny_data, tmp_path):
    run = tmp_path / "run"
    finish(
        start_training(1, *flags(tiny_directory, tiny_data, run)[:-3], "--steps=3", "--lr=1e-2", "--a_quantizer=lsq")
    )
    steps = load_file(run / "final" / STEPS_FILE)
    assert len(steps) == 2 * 7
    values = torch.cat(list(steps.values()))
    assert (values > 0).all()
    assert len(values.unique()) == len(values), "each layer starts from its own input and learns"
    model = simulated.load(str(run / "final"), torch.float32)
    assert model(torch.arange(2, 30)[None]).logits.isfinite().all()
    (run / "final" / STEPS_FILE).unlink()
    with pytest.raises(models.UserError, match=STEPS_FILE):
        simulated.load(str(run / "final"), torch.float32)


@pytest.fixture(scope="module")
def live(tiny_directory, tiny_data, tmp_path_factory):
    """A run with a teacher."""
    output = tmp_path_factory.mktemp("live") / "run"
    finish(start_training(2, *flags(tiny_directory, tiny_data, output)))
    return output


@pytest.mark.parametrize("top_k", [0, 300, 8])
def test_a_cached_teacher(top_k, live, tiny_directory, tiny_data, tmp_path):
    """With the final hidden states, or all of the vocabulary, it says what the teacher says; with less, less."""
    cache = ["--model", tiny_directory, "--data", tiny_data, "--output", tmp_path / "cache", JSON, f"--top_k={top_k}"]
    run_ranks("cache_teacher", *cache)
    finish(
        start_training(2, *flags(tiny_directory, tiny_data, tmp_path / "run"), f"--teacher_cache={tmp_path / 'cache'}")
    )
    assert falls(tmp_path / "run")
    first, first_live = log_of(tmp_path / "run")[0]["kl"], log_of(live)[0]["kl"]
    if top_k == 0:  # the same numbers, so the same run
        for cached, alive in zip(losses(tmp_path / "run"), losses(live), strict=True):
            assert cached == pytest.approx(alive, rel=1e-5)
    elif top_k == 300:  # rounded to fp16
        assert first == pytest.approx(first_live, rel=2e-3)
    else:  # the rest counts as one token: what the student confuses within it is not seen
        assert 0 < first < first_live


def test_a_whole_cache_is_left_alone(tiny_directory, tiny_data, tmp_path):
    cache = ["--model", tiny_directory, "--data", tiny_data, "--output", tmp_path, JSON, "--top_k=4"]
    run_ranks("cache_teacher", *cache)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("targets-*.safetensors")}
    assert before
    run_ranks("cache_teacher", *cache)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("targets-*.safetensors")} == before


def test_a_teacher_that_is_refused_claims_no_cache(tokenizer, tiny_data, tmp_path):
    model, damaged = tiny_model(), tmp_path / "model"
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(damaged)
    tokenizer.save_pretrained(damaged)
    run = start(1, "cache_teacher", "--model", damaged, "--data", tiny_data, "--output", tmp_path / "cache", JSON)
    said, _ = run.communicate(timeout=300)
    assert "not finite, in model.norm.weight" in said
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_cache_of_several_files_is_gone_on_with(tiny_directory, tokenizer, tmp_path):
    """270 sequences: a whole file of the first rank's, a short one of the second's."""
    sizes = ["--sequences=270", "--max_length=8", "--batch_size=30", "--sequences_per_shard=135"]
    run_python("generate", f"--model={tiny_directory}", f"--output={tmp_path / 'data'}", *sizes)
    flags = ["--model", tiny_directory, "--data", tmp_path / "data", "--output", tmp_path / "cache", JSON, "--top_k=0"]
    run_ranks("cache_teacher", *flags)
    first, second = sorted((tmp_path / "cache").glob("targets-*.safetensors"))
    before, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()  # as a kill leaves it
    run_ranks("cache_teacher", *flags)
    assert (first.read_bytes(), second.stat().st_mtime_ns) == (before, kept)
    cache, data = TeacherCache(tmp_path / "cache"), TrainingData(tmp_path / "data", tokenizer, 0)
    teacher = models.load(str(tiny_directory), torch.float32)
    for number in (0, 1, 255, 256, 269):
        sample = data.sequence(number)
        with torch.no_grad():
            torch.testing.assert_close(cache(Row.of(sample)).hidden, predicting(teacher, sample.input_ids))
    with pytest.raises(models.UserError, match="has another length"):
        cache(Row.of(Sample(3, torch.zeros(1, 30, dtype=torch.long))))


def test_a_cache_of_other_data_is_refused(monkeypatch, tiny_directory, tiny_data, tmp_path):
    data = TrainingData(tiny_data, models.load_tokenizer(str(tiny_directory)), TrainConfig().seed)
    TeacherCache(tmp_path).record({"teacher": "another", "data": data.fingerprint, "top_k": 4})
    run = flags(tiny_directory, tiny_data, tmp_path / "run")
    assert "teacher was 'another'" in error_of(monkeypatch, "train", *run, f"--teacher_cache={tmp_path}")
    assert "no teacher cache" in error_of(monkeypatch, "train", *run, f"--teacher_cache={tmp_path / 'none'}")
    begun = {"teacher": models.weights_fingerprint(str(tiny_directory)), "data": data.fingerprint}
    TeacherCache(tmp_path / "begun").record(begun)
    assert "incomplete" in error_of(monkeypatch, "train", *run, f"--teacher_cache={tmp_path / 'begun'}")
    cache = [f"--model={tiny_directory}", f"--data={tiny_data}", f"--output={tmp_path / 'out'}"]
    assert "the 300 tokens of the voc" in error_of(monkeypatch, "cache_teacher", *cache, "--top_k=301")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["--a_quantizer=statsq"], "a_quantizer='statsq' is invalid: choose minmax or minmax_asymmetric or"),
        (["--loss=mse"], "loss='mse' is invalid: choose logits or label or"),
        (["--a_quantizer=lsq", "--loss=label"], "initializes its learned step sizes from the teacher's activations"),
        (["--loss=label", "--teacher_cache=anywhere"], "loss=label needs no teacher, so --teacher_cache"),
        (["--loss=logits+hidden", "--teacher_cache=anywhere"], "needs more of the teacher than the predictions"),
        (["--steps=0", "--batch_size=16"], "has 12 sequences, fewer than batch_size=16: generate more"),
    ],
)
def test_impossible_arms_are_refused(settings, named, monkeypatch, tiny_directory, tiny_data, tmp_path):
    run = flags(tiny_directory, tiny_data, tmp_path / "run")
    assert named in error_of(monkeypatch, "train", *run, *settings)


def test_groups_that_do_not_divide_the_layers_are_refused():
    from qat.quant.prepare import prepare

    with pytest.raises(models.UserError, match="w_group_size=48 does not divide"):
        prepare(tiny_model(), QuantConfig(w_group_size=48))


def test_compiled_training_equals_eager(tiny_directory, tiny_data, tmp_path):
    """The quantizers give the same bits; the loss is summed in another order."""
    needs_compiler()
    runs = {}
    for compiled in (True, False):
        output = tmp_path / f"compiled-{compiled}"
        finish(start_training(1, *flags(tiny_directory, tiny_data, output)[:-3], "--steps=4", compiled=compiled))
        runs[compiled] = [record["loss"] for record in log_of(output)]
    assert runs[True] == pytest.approx(runs[False], rel=1e-5)
