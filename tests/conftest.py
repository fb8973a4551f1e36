"""A tiny random LLaMA with a tokenizer that puts BOS first, as LLaMA's does, and a way to start real runs."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

# Also on a host with GPUs the tests are of CPU code, but for those that need a GPU. To be said before CUDA looks.
if os.environ.get("QAT_TEST_GPU") != "1":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run as Python, see test_kernels.py
# Before torch reads it: one core for each of the processes, of which two ranks, or two workers, run at a time.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch
from forked import Command
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qat.quant import fused
from qat.store.models import load_tokenizer

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

really_compiles = fused.compiles
fused.compiles = lambda device: False  # compiling takes longer than any test; those that want it do it themselves

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "LICENSE").read_text()
NOTHING_KEPT = {
    f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
}
"""What a DeepSpeed JSON says so that no weight stays gathered."""
CONFIG = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A chat template whose turns end with </s>."""


def needs_compiler() -> None:
    """Skip a test where there is no C++ compiler; with one, torch.compile must work, or all would run eagerly."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler")
    assert really_compiles("cpu")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The limit on the size of a file stands for the disk's: writing fails after ``room`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_model(config_class=LlamaConfig, **changes):
    """A random model in eval mode. Weights larger than at usual initialisation make its predictions sharp."""
    torch.manual_seed(0)
    config = config_class(**(CONFIG | {"initializer_range": 0.15} | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def tiny_tokenizer(text: str = TEXT, tokens: int = CONFIG["vocab_size"]) -> PreTrainedTokenizerFast:
    """Of ``tokens`` tokens: with fewer than there are bytes, it knows only the characters of ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if tokens > 256 else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def talking(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


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


def generate_flags(model: Path, output: Path) -> list[str]:
    sizes = ["--sequences=12", "--max_length=24", "--batch_size=3", "--sequences_per_shard=4"]
    return [f"--model={model}", f"--output={output}", *sizes]


def environment(compiled: bool = False) -> dict[str, str]:
    """Of the processes that tests start."""
    fixed = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | fixed | ({} if compiled else {"TORCHDYNAMO_DISABLE": "1"})


def start(
    ranks: int,
    script: str,
    *flags: object,
    compiled: bool = False,
    output: IO | None = None,
    errors: IO | None = None,
    cwd: Path = ROOT,
) -> Command:
    """``launch/<script>.py`` on CPU ranks, or, with none, as plain python runs it; see forked.py."""
    file = ROOT / "launch" / f"{script}.py"
    return Command(file, list(map(str, flags)), ranks, environment(compiled), cwd, output, errors)


def start_training(ranks: int, *flags: str, script: str = "train", **more: Any) -> Command:
    return start(ranks, script, *flags, **more)


def run_ranks(script: str, *flags: object, cwd: Path = ROOT) -> str:
    """An entry point on two ranks, to its end; its output."""
    return finish(start(2, script, *flags, cwd=cwd))


def run_python(script: str, *flags: str, cwd: Path = ROOT) -> SimpleNamespace:
    """An entry point as plain python runs it, to its end; its ``stdout`` and ``stderr``."""
    with tempfile.NamedTemporaryFile("r") as errors:
        process = start(0, script, *flags, cwd=cwd, errors=errors)
        process.wait(300)
        said = SimpleNamespace(stdout=process.said, stderr=errors.read())
    assert process.returncode == 0, said.stdout + said.stderr
    return said


def start_command(program: str, *arguments: object, cwd: Path = ROOT) -> subprocess.Popen:
    """A command line as users type it, without the forks' head start, in a process group of its own.

    Args:
        program: of the environment's bin/
    """
    command = [Path(sys.executable).parent / program, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def finish(process: Command | subprocess.Popen) -> str:
    """Wait for the run; its output, which is also the message if it failed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill(process: Command | subprocess.Popen) -> None:
    """SIGKILL to the launcher and all its ranks: nothing gets a chance to clean up."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files that take longest first, or one worker would end minutes after the other."""
    longest = ["test_reproduce.py", "test_train.py", "test_codes.py", "test_step.py", "test_learned_scales.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
