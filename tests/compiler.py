"""torch.compile: it takes longer than any test, so that the tests run without it, but for those that want it."""

import os
import shutil

import pytest

from qat.quant import fused

really_compiles = fused.compiles


def switch_off() -> None:
    fused.compiles = lambda device: False


def needs_compiler() -> None:
    """Skip a test where there is no C++ compiler; with one, torch.compile must work, or all would run eagerly."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler")
    assert really_compiles("cpu")
