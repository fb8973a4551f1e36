"""Fixtures that many tests use, and what holds for all of them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Also on a host with GPUs the tests are of CPU code, but for those that need a GPU. To be said before CUDA looks.
if os.environ.get("QAT_TEST_GPU") != "1":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run as Python, see test_kernels.py
# Before torch reads it: one core for each of the processes, of which two ranks, or two workers, run at a time.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("commands", "compiler")

import compiler
from commands import ROOT, generate_flags, run_python
from tiny import tiny_model, tiny_tokenizer

from qat.store.models import load_tokenizer

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
compiler.switch_off()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model(tie_word_embeddings=False).save_pretrained(directory, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tiny_directory):
    return load_tokenizer(str(tiny_directory))


@pytest.fixture(scope="session")
def tiny_data(tiny_directory, tmp_path_factory) -> Path:
    """Sequences that the tiny model wrote."""
    directory = tmp_path_factory.mktemp("data") / "shards"
    run_python("generate", *generate_flags(tiny_directory, directory))
    return directory


@pytest.fixture(scope="session")
def vllm() -> Path:
    """The environment's bin folder."""
    if find_spec("vllm"):
        return Path(sys.executable).parent
    directory = Path(os.environ.get("QAT_VLLM_VENV", ROOT / ".venv-vllm"))
    subprocess.run([ROOT / "tests" / "vllm_venv.sh", directory], check=True)
    return directory / "bin"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that take longest first, or one worker would end minutes after the other."""
    longest = ["test_reproduce.py", "test_train.py", "test_codes.py", "test_step.py", "test_learned_scales.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
