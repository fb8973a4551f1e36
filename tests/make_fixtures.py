"""Writes small files of the kinds that this version writes, and the numbers that they give, into a new folder.

python tests/make_fixtures.py v2

v1 was written at commit c94a77f, v2 at the commit that added it: what came after v1, in today's formats. Coming
versions must still read both (see test_old_files.py), so each is made once: a version that writes other files adds a
folder of its own. The model is as small as GGUF's blocks allow. Written again by the same version, the files differ
only in times.
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
from tiny import TEMPLATE, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from qat.evaluate.perplexity import perplexity
from qat.export.formats import FAKE, GGUF
from qat.infer import simulated
from qat.store import gguf_files, student_folder
from qat.store.compressed_tensors import FLOAT_QUANTIZED, INT_QUANTIZED, NVFP4, PACK_QUANTIZED

FIXTURES = ROOT / "tests" / "fixtures"

TOKENS = 128
STEPS, STOPPED = 8, 4
WINDOWS = torch.randint(2, TOKENS, (2, 24), generator=torch.Generator().manual_seed(0))
"""What the models are asked."""

SHAPE = {"vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 64}
GENERATE = ("--sequences=12", "--max_length=24", "--batch_size=3", "--sequences_per_shard=6")
GPTQ = ("--method=gptq", "--w_group_size=32", "--kv_rotation=hadamard")
SMOOTHQUANT = ("--method=smoothquant", "--w_bits=8", "--kv_bits=8")
EXPORTS = (PACK_QUANTIZED, INT_QUANTIZED, FAKE, GGUF)
"""The formats that hold the run's integers."""
EVALUATED = ("--model=finished/final", "--teacher=model", "--text=text.txt", "--window=32", "--windows=3")
TAUGHT = (
    *("--sequences=12", "--max_length=24", "--batch_size=4"),
    *("--strategy=chat", "--chat_share=0.5", "--teacher_cache=8"),
)
RTN = ("--method=rtn", "--model=model")
OVERRIDES = {"model.embed_tokens": {"w_bits": 8}, "lm_head": {"w_bits": 8, "a_bits": 8}, "*.down_proj": {"w_bits": 8}}
BLOCKS = (
    *("--w_quantizer=ggml_q4_0", "--a_quantizer=ggml_q8_0", "--kv_bits=16"),
    '--overrides={"lm_head": {"w_bits": 4, "a_bits": 8}}',
)
_MEASURED = ("--kv_quantizer=fp8", "--kv_bits=8", "--data=data")
FLOATS = {
    NVFP4: ("--w_quantizer=nvfp4", "--a_quantizer=nvfp4", "--w_bits=4", "--a_bits=4", *_MEASURED),
    FLOAT_QUANTIZED: ("--w_quantizer=fp8", "--a_quantizer=fp8_tensor", "--w_bits=8", "--a_bits=8", *_MEASURED),
}
"""What is exported in each format of floats."""


def train_flags(version: str, folder: Path, steps: int = STEPS) -> list[str]:
    """Of the run of ``version`` on its model and data in ``folder``, but for its --output."""
    return {"v1": _v1_flags, "v2": _v2_flags}[version](folder, steps)


def _v1_flags(folder: Path, steps: int) -> list[str]:
    places = [f"--model={folder / 'model'}", f"--data={folder / 'data'}", "--lr=1e-3", "--batch_size=2"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"
    return [*places, json_file, f"--steps={steps}", f"--save_every={STOPPED}", "--w_bits=3"]


def _v2_flags(folder: Path, steps: int) -> list[str]:
    """In bf16, of a rotated student, with what the teacher predicted when it wrote."""
    data = folder / "data"
    places = [f"--model={folder / 'model'}", f"--student={folder / 'rotated'}", f"--data={data}"]
    settings = ["--w_group_size=32", "--w_scale_dtype=bfloat16", "--kv_format=vllm_int8", "--kv_bits=8"]
    return [
        *(*places, f"--teacher_cache={data / 'teacher_cache'}", f"--deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"),
        *(*settings, f"--overrides={json.dumps(OVERRIDES)}"),
        *("--lr=1e-3", "--batch_size=4", "--micro_batch_size=2", f"--steps={steps}", f"--save_every={STOPPED}"),
    ]


def main() -> None:
    version = sys.argv[1]
    output = FIXTURES / version
    if output.exists():
        sys.exit(f"{output} exists already: give another version.")
    compiler.switch_off()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # the files name each other by relative paths
        {"v1": write_v1, "v2": write_v2}[version](Path(name))
        (Path(name) / "expected.json").write_text(json.dumps(expected(version), indent=1) + "\n")
        shutil.copytree(name, output, ignore=shutil.ignore_patterns("lock", "tensorboard", "*.png"))


def write_v1(here: Path) -> None:
    """All files, into ``here``, the working directory."""
    for name, tied in (("model", False), ("tied", True)):
        tiny_model(**SHAPE, tie_word_embeddings=tied).save_pretrained(name)
        tiny_tokenizer(tokens=TOKENS).save_pretrained(name)
    (here / "text.txt").write_text((ROOT / "LICENSE").read_text()[:600])
    run_python("generate", "--model=model", "--output=data", *GENERATE, cwd=here)
    run_ranks("train", *train_flags("v1", Path()), "--output=finished", cwd=here)
    stop_in_the_middle(Path("finished"), Path("stopped"))
    shutil.rmtree("finished/checkpoints")
    run_ranks("train", *train_flags("v1", Path(), steps=1), "--a_quantizer=lsq", "--output=lsq", cwd=here)
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
    run_python("evaluate", *EVALUATED, "--output=evaluation.json", cwd=here)


def write_v2(here: Path) -> None:
    """All files, into ``here``, the working directory."""
    tiny_model(**SHAPE | {"intermediate_size": 32, "num_hidden_layers": 1}).save_pretrained("model")
    tokenizer = tiny_tokenizer(tokens=TOKENS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("model")
    (here / "text.txt").write_text((ROOT / "LICENSE").read_text()[:600])
    run_python("generate", "--model=model", "--output=data", *TAUGHT, cwd=here)
    run_python("rotate", "--model=model", "--output=rotated", "--untie=true", cwd=here)
    run_ranks("train", *train_flags("v2", Path()), "--output=finished", cwd=here)
    stop_in_the_middle(Path("finished"), Path("stopped"))
    shutil.rmtree("finished/checkpoints")
    run_python("quantize", *RTN, *BLOCKS, "--output=blocks", cwd=here)
    for form, flags in FLOATS.items():
        run_python("quantize", *RTN, *flags, f"--output=ptq-{form}", cwd=here)
    exports = {PACK_QUANTIZED: "finished/final", GGUF: "blocks"} | {form: f"ptq-{form}" for form in FLOATS}
    for form, student in exports.items():
        flags = [f"--checkpoint={student}", f"--output=export-{form}", f"--format={form}", "--text=text.txt"]
        run_python("export", *flags, cwd=here)
    for student in ("blocks", f"ptq-{FLOAT_QUANTIZED}"):  # of which the exports are enough
        shutil.rmtree(student)
    run_python("evaluate", *EVALUATED, "--output=evaluation.json", cwd=here)


def stop_in_the_middle(run: Path, stopped: Path) -> None:
    """``stopped`` is what the run's folder was just after the step ``STOPPED``."""
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("final", f"step-{STEPS:06d}"))
    (stopped / "checkpoints" / "latest").write_text(f"step-{STOPPED:06d}")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (stopped / "log.jsonl").write_text("".join(lines[:STOPPED]))


def expected(version: str) -> dict[str, object]:
    """What the files give: the losses of all steps of the run, and each model's perplexity and some of its logits."""
    losses = [json.loads(line)["loss"] for line in Path("finished/log.jsonl").read_text().splitlines()]
    return {"losses": losses, "models": {name: numbers(read(Path())) for name, read in MODELS[version].items()}}


@torch.no_grad()
def numbers(model: PreTrainedModel) -> dict[str, object]:
    """A model's perplexity, and its logits of 8 tokens at 2 positions of each of two windows."""
    return {"perplexity": perplexity(model, WINDOWS).perplexity, "logits": model(WINDOWS).logits[:, -2:, :8].tolist()}


def _read_checkpoint(folder: Path) -> PreTrainedModel:
    began_with = folder / "rotated" if (folder / "rotated").exists() else folder / "model"
    student = student_folder.find(folder / "stopped" / "checkpoints", str(began_with))
    return simulated.simulate(student.directory, student.weights(), student.dtype, student.quant, torch.float32)


def _reader(name: str) -> Callable[[Path], PreTrainedModel]:
    return lambda folder: simulated.load(str(folder / name), torch.float32)


QUANTIZED = {
    "v1": ("finished/final", "lsq/final", "gptq", "smoothquant", f"export-{PACK_QUANTIZED}", f"export-{INT_QUANTIZED}"),
    "v2": ("finished/final", f"ptq-{NVFP4}", *(f"export-{form}" for form in (PACK_QUANTIZED, *FLOATS))),
}
FULL = {"v1": ("model", "tied", f"export-{FAKE}"), "v2": ("model", "rotated")}
MODELS = {
    version: {
        **{name: _reader(name) for name in FULL[version] + QUANTIZED[version]},
        f"export-{GGUF}": lambda folder: gguf_files.load(folder / f"export-{GGUF}"),
        "stopped": _read_checkpoint,
    }
    for version in ("v1", "v2")
}
"""What reads each of the models in the folder of the fixtures."""


if __name__ == "__main__":
    main()
