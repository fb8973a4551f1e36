"""A cell of a table, from the teacher's text to its JSON, killed on its way."""

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from commands import ROOT, error_of, finish, kill, start, start_command
from faults import full_disk
from tiny import tiny_model, tiny_tokenizer

from launch.reproduce import Budget, Cell, Job, Reproduction, _Runner, queue, read_recipe
from launch.stages import Stages
from qat.evaluate import llama_cpp
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError


def flags(model, folder) -> list[str]:
    cells = "--cells=full_precision_16-16-16,rtn_4-8-4,qat_4-8-4"
    return [f"--model={model}", f"--output={folder}/results", f"--work={folder}/work", "--tables=main", cells]


def test_cells_that_there_are_not(monkeypatch, tmp_path):
    places = [f"--output={tmp_path / 'results'}", f"--work={tmp_path / 'work'}"]
    message = error_of(monkeypatch, "reproduce", "--tables=main", "--cells=qat_4-9-4", *places)
    assert "cells=qat_4-9-4 matches no cell of main: give a pattern that does, say full_precision" in message
    assert not list(tmp_path.iterdir())


def test_without_llama_cpp_nothing_is_begun(tiny_directory, monkeypatch, tmp_path):
    monkeypatch.setattr(llama_cpp, "VERSION", "0")
    llama_cpp.library.cache_clear()
    places = [f"--model={tiny_directory}", f"--output={tmp_path / 'results'}", f"--work={tmp_path / 'work'}"]
    assert "is installed, but version 0" in error_of(monkeypatch, "reproduce", "--tables=served", *places)
    llama_cpp.library.cache_clear()


def test_killed_and_started_again(tiny_directory, tmp_path):
    run = tmp_path / "work" / "cells" / "qat_4-8-4"
    command = ["python", ROOT / "launch" / "reproduce.py", *flags(tiny_directory, tmp_path)]
    first = start_command(*command, "--cells=qat_4-8-4", "--minutes=10")
    while first.poll() is None and not (run / "log.jsonl").exists():
        time.sleep(0.1)
    assert first.poll() is None, first.communicate()[0]
    kill(first)
    again = start(0, "reproduce", *flags(tiny_directory, tmp_path))
    again.wait(500)
    assert again.returncode == 0, again.said
    results = tmp_path / "results"
    rows = json.loads((results / "main.json").read_text())
    assert [row["name"] for row in rows] == ["full_precision_16-16-16", "rtn_4-8-4", "qat_4-8-4"]
    assert rows[0]["kl"]["howto"] < 1e-6 < rows[2]["kl"]["howto"] < rows[1]["kl"]["howto"]
    assert rows[2]["budget"]["trained"]["tokens"] > 1000
    assert not (run / "final").exists()
    assert "| LLM-QAT | 4-8-4 |" in (results / "README.md").read_text()
    files = {file: file.stat().st_mtime_ns for file in (results / "cells").iterdir()}
    output = finish(start(0, "reproduce", *flags(tiny_directory, tmp_path)))
    assert output.splitlines()[-1] == f"{results}: all 3 jobs were done; README.md there has the tables"
    assert {file: file.stat().st_mtime_ns for file in (results / "cells").iterdir()} == files
    tiny_model().save_pretrained(tmp_path / "other")
    output, _ = start(0, "reproduce", *flags(tmp_path / "other", tmp_path)).communicate(timeout=100)
    assert "holds results of another model" in output


def test_what_llama_cpp_serves_is_a_table(tmp_path):
    """RTN is written as a student first."""
    model = tmp_path / "model"
    tiny_model(head_dim=64, hidden_size=256, intermediate_size=256).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    results, cells = tmp_path / "results", "--cells=rtn_4-8-16_w_quantizer*"
    where = [f"--model={model}", f"--output={results}", f"--work={tmp_path / 'work'}", "--tables=served", cells]
    finish(start(0, "reproduce", *where))
    rows = json.loads((results / "served.json").read_text())
    assert [row["cache"] for row in rows] == ["f16", "q8_0", "q8_0/q4_0", "q4_0"]
    assert all(row["kl"].keys() == {"encyclopedia", "howto"} for row in rows)
    assert all(row["tokens_per_second"] > 0 < row["file_MB"] for row in rows)
    assert rows[0]["cache_costs"] == 0 < rows[3]["cache_costs_stderr"]
    page = (results / "README.md").read_text()
    assert "| RTN | 4-8-16 | w_quantizer=ggml_q4_0, a_quantizer=ggml_q8_0, lm_head.w_bits=8, lm_head.w_quant" in page
    assert "1 of 13 models." in page
    assert (results / "served.png").is_file()


def test_a_users_or_damaged_file_among_the_cells_is_not_counted(tiny_directory, tmp_path):
    cells, model = tmp_path / "results" / "cells", str(tiny_directory)
    cells.mkdir(parents=True)
    (tmp_path / "work").mkdir()
    for number, text in enumerate(["", "[1]", "{}", '{"settings": 3}', '{"settings": {"note": 1}}', "\udc80"]):
        (cells / f"notes-{number}.json").write_bytes(text.encode(errors="surrogateescape"))
    reproduction = Reproduction(model=model, output=tmp_path / "results", work=tmp_path / "work")
    runner = _Runner(reproduction, None)
    job, *_ = queue({"main": read_recipe(ROOT / "launch" / "recipes" / "reproduce" / "main.yaml")}, "rtn_4-8-4")
    for content, done in (("{", False), (json.dumps({"settings": runner.settings(job)}), True)):
        runner.path(job).write_text(content)
        assert runner.is_done(job) == done
    runner.path(job).write_text(json.dumps({"settings": runner.settings(job) | {"model": "another"}}))
    with pytest.raises(UserError, match="holds results of another model"):
        _Runner(reproduction, None)


def test_what_cannot_be_written_is_one_sentence(runner, tmp_path):
    job = Job(0, point(10))
    for write in (
        runner._claim,
        lambda: runner._claim_cell(job, tmp_path / "work" / "cells" / job.name),
        lambda: runner._corpus(replace(job.cell, data="howto")),
        lambda: runner.collect({}),
    ):
        with full_disk(2), pytest.raises(UserError, match="cannot be written to"):
            write()


def point(steps: int) -> Cell:
    """A point of a curve, a fifth of whose steps are its own."""
    return Cell("qat", QuantConfig(w_bits=3), Budget(steps, 32, 1e-3, 2, steps // 5, 60, "howto", 64, 2))


class Written(Stages):
    """Stages that only note their commands, and leave what the next ones look for."""

    def __init__(self, path, environment, deadline=None):
        super().__init__(path, environment, deadline)
        self.commands: list[dict[str, str]] = []

    def run(self, name, *parts) -> None:
        words = [str(word) for part in parts for word in part]
        flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
        flags |= {word[2:]: after for word, after in pairwise(words) if word[:2] == "--" != after[:2]}
        self.commands.append({"stage": name, **flags})
        output = Path(flags["output"])
        output.mkdir(parents=True, exist_ok=True)
        if name == "train":
            (output / "final").mkdir()
            (output / "checkpoints" / f"step-{int(flags['steps']):06d}").mkdir(parents=True)


@pytest.fixture
def runner(tiny_directory, tmp_path):
    (tmp_path / "work").mkdir()
    return _Runner(Reproduction(model=str(tiny_directory), output=tmp_path / "results", work=tmp_path / "work"), None)


def test_points_of_a_curve_share_the_steps_of_their_trunk(runner, tmp_path):
    stages = Written(tmp_path / "stages.json", {})
    for steps in (10, 20, 15):
        runner._train(point(steps), tmp_path / str(steps), stages)
    trained = [command for command in stages.commands if command["stage"] == "train"]
    assert [(own["steps"], own["min_lr_ratio"], own["decay_steps"]) for own in trained] == [
        ("8", "1.0", "0"), ("10", "0.0", "2"), ("16", "1.0", "0"), ("20", "0.0", "4"), ("12", "1.0", "0"),
        ("15", "0.0", "3"),
    ]  # fmt: skip
    begun = [Path(own["continue_from"]).name if "continue_from" in own else None for own in trained]
    assert begun == [None, *("step-000008", "step-000008", "step-000016", "step-000008", "step-000012")]
    assert len({own["data"] for own in trained}) == 1
    assert point(10).name != point(20).name


def test_a_rotated_cell_learns_from_the_original(runner, tiny_directory, tmp_path):
    stages = Written(tmp_path / "stages.json", {})
    quant = QuantConfig(4, 4, 4, kv_rotation="hadamard")
    for cell in (
        Cell("qat", quant, Budget(), rotation="learned", student="gptq"),
        Cell("qat", quant, Budget(), rotation="hadamard"),
    ):
        runner._train(cell, tmp_path / cell.rotation, stages)
    made = [command for command in stages.commands if command["stage"] != "generate"]
    assert [command["stage"] for command in made] == ["rotate", "quantize", "train", "rotate", "train"]
    learned, quantized, begun, drawn, other = made
    assert (learned["a_bits"], drawn["kind"]) == ("4", "hadamard")
    assert quantized["model"] == learned["output"]
    assert (begun["model"], begun["student"]) == (str(tiny_directory), quantized["output"])
    assert (other["model"], other["student"]) == (str(tiny_directory), drawn["output"])


@pytest.mark.slow
def test_cells_beyond_the_paper_by_the_real_commands(runner, tmp_path):
    """A point of a curve, and 4-4-4 with rotations that are learned, GPTQ's weights and scales that learn."""
    small = Budget(4, 32, 1e-3, 2, text="howto", window=64, windows=2)
    rotated = Cell("qat", QuantConfig(4, 4, 4), small, rotation="learned", student="gptq", train="all")
    for cell in (point(10), point(15), rotated):
        job = Job(0, cell, None)
        runner.run(job, keep_model=False)
        assert runner.is_done(job)
    made = [json.loads(runner.path(Job(0, point(steps), None)).read_text()) for steps in (10, 15)]
    tokens = [cell["budget"]["trained"]["tokens"] for cell in made]
    assert 1.4 * tokens[0] < tokens[1] < 1.6 * tokens[0], "the trunk's tokens count too"
    assert len(made[1]["budget"]["trained"]["kl"]) == 3
