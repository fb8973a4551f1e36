"""Functions that are compiled where they can be, and run eagerly where they cannot."""

import compiler
import pytest
import torch

from qat.quant import fused


@pytest.fixture
def known(monkeypatch):
    """Set the names of the options that this torch has."""

    def have(*names: str) -> None:
        monkeypatch.setattr(torch._inductor, "list_options", lambda: list(names))
        fused.options.cache_clear()

    yield have
    fused.options.cache_clear()


def test_a_torch_without_exact_division_compiles_nothing_for_gpus(known, caplog):
    really_compiles = compiler.really_compiles.__wrapped__
    known("emulate_precision_casts")
    assert not really_compiles("cuda")
    assert "no option for exact division" in caplog.text
    known("emulate_divison_rounding")
    assert fused.options() == {"emulate_divison_rounding": True}
    caplog.clear()
    if not torch.cuda.is_available():
        assert not really_compiles("cuda")  # for want of a GPU
        assert "exact division" not in caplog.text


def test_a_torch_that_drops_a_rounding_compiles_nothing(monkeypatch, caplog):
    """As torch 2.11 does on CPUs: scales in fp16 were not rounded there, and compiled functions gave other codes."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: lambda x: x / (x + 1) * 3)
    assert not compiler.really_compiles.__wrapped__("cpu")
    assert "does not round where eager mode does" in caplog.text
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    assert compiler.really_compiles.__wrapped__("cpu")


def test_this_torch_divides_exactly_and_keeps_roundings():
    names = fused.options().keys()
    assert fused._CASTS in names
    assert names & set(fused._DIVISION)


def test_a_function_that_cannot_be_compiled_runs_eagerly_and_the_others_compiled(monkeypatch, caplog):
    """As torch 2.11 could not compile one of ours: the trial, with another function, had passed."""
    compiler.needs_compiler()
    monkeypatch.setattr(fused, "compiles", lambda device: True)

    def bad(x):
        return x @ x if torch.compiler.is_compiling() else x + 1

    bad, good = fused.fused(bad), fused.fused(lambda x: x * 2)
    x = torch.ones(4, 3)
    for _ in range(2):
        assert torch.equal(bad(x), x + 1)
        assert torch.equal(good(x), x * 2)
    assert caplog.text.count("torch.compile fails for bad") == 1
