"""A cell of a table, from the teacher's text to its JSON, killed on its way."""

import json
import time

import pytest
from conftest import ROOT, finish, kill, start, start_command, tiny_model, tiny_tokenizer
from test_launch import error_of

from launch.reproduce import Reproduction, _Runner, queue, read_recipe
from qat.runtime.errors import UserError


def flags(model, folder) -> list[str]:
    cells = "--cells=full_precision_16-16-16,rtn_4-8-4,qat_4-8-4"
    return [f"--model={model}", f"--output={folder}/results", f"--work={folder}/work", "--tables=main", cells]


def test_cells_that_there_are_not(monkeypatch, tmp_path):
    places = [f"--output={tmp_path / 'results'}", f"--work={tmp_path / 'work'}"]
    message = error_of(monkeypatch, "reproduce", "--tables=main", "--cells=qat_4-9-4", *places)
    assert "cells=qat_4-9-4 is the name of no cell of main: give a pattern that is, say full_precision" in message
    assert not list(tmp_path.iterdir())


def test_killed_and_started_again(tiny_directory, tmp_path):
    command = ["python", ROOT / "launch" / "reproduce.py", *flags(tiny_directory, tmp_path)]
    run = tmp_path / "work" / "cells" / "qat_4-8-4"
    first = start_command(*command, "--minutes=10")
    while first.poll() is None and not (run / "log.jsonl").exists():
        time.sleep(0.1)
    assert first.poll() is None, first.communicate()[0]
    kill(first)
    again = start_command(*command)
    output, _ = again.communicate(timeout=500)
    assert again.returncode == 0, output
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
