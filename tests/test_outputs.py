"""Outputs that cannot be written: one sentence, and with room the same command goes on."""

import errno
import os
import sys
from importlib import import_module

import pytest
import torch
from commands import ROOT, error_of
from faults import full_disk

import qat
from qat.quant.config import QuantConfig
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.store import models, rotate, student_folder


def succeed(monkeypatch, script: str, *flags) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    import_module(f"launch.{script}").main()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_on_a_full_disk(method, tiny_directory, tiny_data, tmp_path, monkeypatch, capsys):
    flags = [f"--model={tiny_directory}", f"--method={method}", f"--output={tmp_path / 'out'}"]
    flags += [f"--data={tiny_data}"] if method == "gptq" else []
    with full_disk(20_000):
        message = error_of(monkeypatch, "quantize", *flags)
    assert "cannot be written to" in message
    assert "make room" in message
    assert not list(tmp_path.iterdir())
    succeed(monkeypatch, "quantize", *flags)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["pack-quantized", "gguf"])
def test_export_on_a_full_disk(form, tiny_directory, tmp_path, monkeypatch, capsys):
    student = tmp_path / "student"
    succeed(monkeypatch, "quantize", f"--model={tiny_directory}", f"--output={student}")
    text = ["--verify=false"] if form == "gguf" else [f"--text={ROOT / 'LICENSE'}"]
    flags = [f"--checkpoint={student}", f"--output={tmp_path / 'out'}", f"--format={form}", *text]
    with full_disk(20_000):
        assert "cannot be written to" in error_of(monkeypatch, "export", *flags)
    assert not (tmp_path / "out").exists()
    succeed(monkeypatch, "export", *flags)
    assert (tmp_path / "out").exists()


def test_a_final_folder_on_a_full_disk(tiny_directory, tmp_path):
    """As a run writes it at its end, after its last checkpoint."""
    student = prepare(models.load(str(tiny_directory), torch.float32), QuantConfig())
    with full_disk(20_000), pytest.raises(UserError, match=r"cannot be written to .* make room"):
        qat.save(student, tmp_path / "final", source=tiny_directory)
    assert not list(tmp_path.iterdir())
    qat.save(student, tmp_path / "final", source=tiny_directory)
    assert torch.equal(
        dict(student_folder.find(tmp_path / "final").weights())["model.norm.weight"], student.model.norm.weight
    )


def test_rotate_on_a_full_disk(tiny_directory, tmp_path, monkeypatch, capsys):
    """There is room for the weights, and for nothing more."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flags = [f"--model={tiny_directory}", f"--output={tmp_path / 'rotated'}"]
    with monkeypatch.context() as patch:
        patch.setattr(rotate, "write_atomically", full)
        assert "cannot be written to (No space left" in error_of(patch, "rotate", *flags)
    assert not list(tmp_path.iterdir())
    succeed(monkeypatch, "rotate", *flags)


def test_evaluate_says_what_it_measured_where_it_cannot_be_written(tiny_directory, tmp_path, monkeypatch, capsys):
    flags = [f"--model={tiny_directory}", f"--text={ROOT / 'LICENSE'}", "--window=64", "--windows=2"]
    output = tmp_path / "results.json"
    with full_disk(100):
        assert "cannot be written to" in error_of(monkeypatch, "evaluate", *flags, f"--output={output}")
    (measured,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity"))
    assert not list(tmp_path.iterdir())
    succeed(monkeypatch, "evaluate", *flags, f"--output={output}")
    assert capsys.readouterr().out.splitlines() == [measured, f"Results written to {output}"]


def test_evaluate_measures_nothing_where_no_file_can_be(tiny_directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    flags = [f"--model={tiny_directory}", f"--text={ROOT / 'LICENSE'}", "--window=64", "--windows=2"]
    message = error_of(monkeypatch, "evaluate", *flags, f"--output={tmp_path / 'file' / 'results.json'}")
    assert "cannot be written to" in message
    assert "perplexity" not in capsys.readouterr().out
