"""What the integer KV cache saves, and what it costs: one generated text, cached in floats and in integers.

python benchmarks/kv_cache.py --model smollm2-135m-instruct
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from launch import cli
from qat.infer.integer_cache import IntegerCache
from qat.quant.config import QuantConfig
from qat.quant.prepare import prepare
from qat.runtime import machine
from qat.store import models, smollm2


@dataclass(frozen=True)
class CacheBenchmark:
    """What is measured.

    Args:
        model: a full-precision model
        tokens: how many are generated, greedily, after the first
        repeats: runs of each, of which the median counts
        json: file for the figures
    """

    model: str = smollm2.EMBEDDED
    tokens: int = 512
    repeats: int = 3
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, CacheBenchmark)
    name = models.resolve_full_precision(config.model)
    print(f"{common.machine()}; {config.model}, {config.tokens} tokens")
    held: dict[int, int] = {}
    ways: dict[str, Callable[[], None]] = {}
    for bits in (16, 8, 4):
        quant = QuantConfig(16, 16, bits, kv_rotation="none" if bits == 16 else "hadamard")
        model = prepare(models.load(name, machine.inference_dtype()), quant)
        machine.place(model)

        def run(model: PreTrainedModel = model, bits: int = bits) -> None:
            cache = DynamicCache() if bits == 16 else IntegerCache(model)
            generate(model, cache, config.tokens)
            held[bits] = nbytes(cache)

        ways[str(bits)] = run
    seconds = common.median_seconds(ways, config.repeats)
    figures = {}
    for bits, size in held.items():
        per_token, rate = size / config.tokens, config.tokens / seconds[str(bits)]
        label = str(machine.inference_dtype()).removeprefix("torch.") if bits == 16 else f"{bits} bits"
        print(f"{label:10} {per_token * 1000 / 2**20:7.2f} MiB per 1000 tokens   {rate:6.1f} tokens/s")
        figures[f"bytes_per_token_kv{bits}"] = per_token
        figures[f"tokens_per_second_kv{bits}"] = rate
    common.write(config.json, figures)


@torch.inference_mode()
def generate(model: PreTrainedModel, cache: Cache, tokens: int) -> None:
    """``tokens`` greedy tokens into ``cache``."""
    token = torch.full((1, 1), 260, device=model.device)
    for _ in range(tokens):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)


def nbytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    cli.run(main)
