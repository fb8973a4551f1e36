"""Short runs of launch/train.py: their settings, and what they leave behind."""

import json
from pathlib import Path

from commands import ROOT

from qat.train.config import TrainConfig

STEPS = 12  # two passes over the 12 sequences
CONFIG = TrainConfig(steps=STEPS, lr=1e-3, warmup_steps=2, batch_size=2)
NOTHING_KEPT = {
    f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
}
"""What a DeepSpeed JSON says so that no weight stays gathered."""


def flags(model: Path, data: Path, output: Path, ds_config: str | Path = "zero3_cpu.json") -> list[str]:
    places = [f"--model={model}", f"--data={data}", f"--output={output}"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / ds_config}"
    return [
        *places,
        json_file,
        f"--steps={STEPS}",
        "--lr=1e-3",
        "--warmup_steps=2",
        "--batch_size=2",
        "--w_bits=3",
        "--save_every=5",
    ]


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float, float]]:
    return [(record["loss"], record["kl"], record["grad_norm"]) for record in log_of(run)]


def latest(output: Path) -> str:
    pointer = output / "checkpoints" / "latest"
    return pointer.read_text() if pointer.exists() else ""
