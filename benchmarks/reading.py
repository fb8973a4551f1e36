"""Memory of the ranks while a checkpoint of several GB is read: each may hold its part, and never the whole.

python benchmarks/reading.py

Writes a checkpoint of random weights, lets two CPU ranks read it as the training does, and reports the most that each
has held. Resident memory includes pages of the file itself, which ranks share and the kernel takes back when it needs
them; what the process had allocated at most is reported beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import common
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from launch import cli
from launch.stages import CPU_ONLY, free_port
from qat.runtime import memory
from qat.store import models
from qat.store.weight_files import weights_size
from qat.train import deepspeed_internals, deepspeed_json, engines
from qat.train.config import TrainConfig


@dataclass(frozen=True)
class ReadingBenchmark:
    """What is measured.

    Args:
        layers: decoder blocks of LLaMA-7B's proportions and half its width, 51 million parameters each
        deepspeed: how to run
        json: file for the figures
        worker: set for the ranks that this command starts: the folder of the model
    """

    layers: int = 14
    deepspeed: Path = Path("ds_configs/zero3_cpu.json")
    json: Path | None = None
    worker: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, ReadingBenchmark)
    if config.worker:
        rank(config, config.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(config, model)
        size = weights_size(model)
        launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, "--master_port", free_port()]
        command = [*launcher, __file__, f"--deepspeed={config.deepspeed}", f"--worker={model}"]
        subprocess.run([str(part) for part in command], check=True, env=os.environ | CPU_ONLY)
        ranks = json.loads((model / "ranks.json").read_text())
    figures = {"checkpoint_gb": size / 1e9}
    for number, figures_of_rank in enumerate(ranks):
        figures |= {f"rank{number}_{name}_gb": size / 1e9 for name, size in figures_of_rank.items()}
    common.write(config.json, figures)


def write_model(config: ReadingBenchmark, directory: Path) -> None:
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=config.layers,
        num_attention_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size="500MB")


def rank(config: ReadingBenchmark, model: Path) -> None:
    ds_config = deepspeed_json.resolve(config.deepspeed, TrainConfig(batch_size=2).ds_settings(2))
    engines.init_distributed()
    before = anonymous_memory()
    with PeakAllocated() as allocated, deepspeed_internals.partitioned_reading(ds_config):
        student = models.load(str(model), torch.float32, deepspeed_internals.own_part)
    own = sum(deepspeed_internals.own_part(parameter).numel() for parameter in student.parameters())
    assert own * 4 < 0.51 * weights_size(model)
    own_figures = {
        "part": own * 4,
        "allocated_before": before,
        "peak_allocated": allocated.peak,
        "allocated_after": anonymous_memory(),
        "peak_resident": memory.peak(),
    }
    figures: list = [None, None]
    dist.all_gather_object(figures, own_figures)
    if dist.get_rank() == 0:
        (model / "ranks.json").write_text(json.dumps(figures))


class PeakAllocated:
    """Within it, another thread looks every few milliseconds at what is allocated."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakAllocated":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """Bytes resident that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    cli.run(main)
