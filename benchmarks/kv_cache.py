"""What the integer KV cache saves, and what it costs: one generated text, cached in floats and in integers.

python benchmarks/kv_cache.py --model smollm2-135m-instruct
"""

import time
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from launch import cli
from qat import models
from qat.integer_cache import IntegerCache
from qat.prepare import QuantConfig, prepare


@dataclass(frozen=True)
class CacheBenchmark:
    """What is measured.

    Args:
        model: a full-precision model
        tokens: how many are generated, greedily, after the first
        json: file for the figures
    """

    model: str = models.EMBEDDED
    tokens: int = 512
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, CacheBenchmark)
    name = models.resolve_full_precision(config.model)
    figures = {}
    print(f"{common.machine()}; {config.model}, {config.tokens} tokens")
    for bits in (16, 8, 4):
        quant = QuantConfig(16, 16, bits, kv_rotation="none" if bits == 16 else "hadamard")
        model = prepare(models.load(name, models.inference_dtype()), quant)
        models.place(model)
        cache = DynamicCache() if bits == 16 else IntegerCache(model)
        seconds = generate(model, cache, config.tokens)
        held = nbytes(cache) / config.tokens * 1000
        label = str(model.dtype).removeprefix("torch.") if bits == 16 else f"{bits} bits"
        print(f"{label:10} {held / 2**20:7.2f} MiB per 1000 tokens   {config.tokens / seconds:6.1f} tokens/s")
        figures[f"bytes_per_token_kv{bits}"] = held / 1000
        figures[f"tokens_per_second_kv{bits}"] = config.tokens / seconds
    common.write(config.json, figures)


@torch.inference_mode()
def generate(model: PreTrainedModel, cache: Cache, tokens: int) -> float:
    """Seconds for ``tokens`` greedy tokens into ``cache``."""
    began = time.perf_counter()
    token = torch.full((1, 1), 260, device=model.device)
    for _ in range(tokens):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return time.perf_counter() - began


def nbytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    cli.run(main)
