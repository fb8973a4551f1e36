"""Writes one of every kind of file that this version writes, and the numbers that they give, into a new folder.

python tests/make_fixtures.py tests/fixtures/vN

v1 was written at commit c94a77f. Coming versions must still read it (see test_old_files.py), so it is made once: a
version that writes other files adds a folder of its own. The model is as small as GGUF's blocks allow. Written again by
the same version, the files differ only in times.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import compiler
import torch
from commands import ROOT, run_python, run_ranks
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from qat.evaluate.perplexity import perplexity
from qat.export.formats import FAKE, GGUF
from qat.infer import simulated
from qat.store import gguf_files, student_folder
from qat.store.compressed_tensors import INTEGERS, PACKED

FIXTURES = ROOT / "tests" / "fixtures" / "v1"

TOKENS = 128
STEPS, STOPPED = 8, 4
WINDOWS = torch.randint(2, TOKENS, (2, 24), generator=torch.Generator().manual_seed(0))
"""What the models are asked."""

SHAPE = {"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 64}
GENERATE = ("--sequences=12", "--max_length=24", "--batch_size=3", "--sequences_per_shard=6")
GPTQ = ("--method=gptq", "--w_group_size=32", "--kv_rotation=hadamard")
SMOOTHQUANT = ("--method=smoothquant", "--w_bits=8", "--kv_bits=8")
EXPORTS = (PACKED, INTEGERS, FAKE, GGUF)
"""The formats that hold the run's integers."""
EVALUATE = ("--text=text.txt", "--window=32", "--windows=3")


def train_flags(folder: Path, steps: int = STEPS) -> list[str]:
    """Of a run on the fixtures' model and data in ``folder``, but for its --output."""
    places = [f"--model={folder / 'model'}", f"--data={folder / 'data'}", "--lr=1e-3", "--batch_size=2"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"
    return [*places, json_file, f"--steps={steps}", f"--save_every={STOPPED}", "--w_bits=3"]


def main() -> None:
    output = Path(sys.argv[1]).resolve()
    if output.exists():
        sys.exit(f"{output} exists already: give a new folder.")
    compiler.switch_off()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # the files name each other by relative paths
        write(Path(name))
        (Path(name) / "expected.json").write_text(json.dumps(expected(), indent=1) + "\n")
        shutil.copytree(name, output, ignore=shutil.ignore_patterns("lock", "tensorboard", "*.png"))


def write(here: Path) -> None:
    """All files, into ``here``, the working directory."""
    for name, tied in (("model", False), ("tied", True)):
        tiny_model(**SHAPE, tie_word_embeddings=tied).save_pretrained(name)
        tiny_tokenizer(tokens=TOKENS).save_pretrained(name)
    (here / "text.txt").write_text((ROOT / "LICENSE").read_text()[:600])
    run_python("generate", "--model=model", "--output=data", *GENERATE, cwd=here)
    run_ranks("train", *train_flags(Path()), "--output=finished", cwd=here)
    stop_in_the_middle(Path("finished"), Path("stopped"))
    shutil.rmtree("finished/checkpoints")
    run_ranks("train", *train_flags(Path(), steps=1), "--a_quantizer=lsq", "--output=lsq", cwd=here)
    shutil.rmtree("lsq/checkpoints")
    for method in (GPTQ, SMOOTHQUANT):
        name = method[0].removeprefix("--method=")
        model = "tied" if method is SMOOTHQUANT else "model"
        run_python("quantize", *method, f"--model={model}", "--data=data", f"--output={name}", cwd=here)
    for top_k in (8, 0):
        flags = ["--model=model", "--data=data", f"--top_k={top_k}", f"--output=cache-{top_k}"]
        run_ranks("cache_teacher", *flags, f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}", cwd=here)
    for form in EXPORTS:
        flags = ["--checkpoint=finished/final", f"--output=export-{form}", f"--format={form}", "--text=text.txt"]
        run_python("export", *flags, cwd=here)
    flags = ["--model=finished/final", "--teacher=model", *EVALUATE, "--output=evaluation.json"]
    run_python("evaluate", *flags, cwd=here)


def stop_in_the_middle(run: Path, stopped: Path) -> None:
    """``stopped`` is what the run's folder was just after the step ``STOPPED``."""
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("final", f"step-{STEPS:06d}"))
    (stopped / "checkpoints" / "latest").write_text(f"step-{STOPPED:06d}")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (stopped / "log.jsonl").write_text("".join(lines[:STOPPED]))


def expected() -> dict[str, object]:
    """What the files give: the losses of all steps of the run, and each model's perplexity and some of its logits."""
    losses = [json.loads(line)["loss"] for line in Path("finished/log.jsonl").read_text().splitlines()]
    return {"losses": losses, "models": {name: numbers(read(Path())) for name, read in MODELS.items()}}


@torch.no_grad()
def numbers(model: PreTrainedModel) -> dict[str, object]:
    """A model's perplexity, and its logits of 8 tokens at 2 positions of each of two windows."""
    return {"perplexity": perplexity(model, WINDOWS).perplexity, "logits": model(WINDOWS).logits[:, -2:, :8].tolist()}


def _read_checkpoint(folder: Path) -> PreTrainedModel:
    student = student_folder.find(folder / "stopped" / "checkpoints", str(folder / "model"))
    return simulated.simulate(student.directory, student.weights(), student.dtype, student.quant, torch.float32)


def _reader(name: str) -> Callable[[Path], PreTrainedModel]:
    return lambda folder: simulated.load(str(folder / name), torch.float32)


QUANTIZED = ("finished/final", "lsq/final", "gptq", "smoothquant", f"export-{PACKED}", f"export-{INTEGERS}")
MODELS = {
    **{name: _reader(name) for name in ("model", "tied", f"export-{FAKE}", *QUANTIZED)},
    f"export-{GGUF}": lambda folder: gguf_files.load(folder / f"export-{GGUF}"),
    "stopped": _read_checkpoint,
}
"""What reads each of the models in the folder of the fixtures."""


if __name__ == "__main__":
    main()
