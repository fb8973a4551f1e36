"""Tokens per second of generation: ours, HF generate at batch 1 (the released way) and at our batch size, transformers'
continuous batching, and vLLM; beside what the machine could do. And ours, while the teacher's predictions are kept.

python benchmarks/generation.py; all start from one token, sample from the full softmax, in the model's inference dtype
(fp32 on a CPU), and never stop before the last token. vLLM takes part where --vllm names the Python that has it.

The roofline is the time that a step would take if its weight products ran at the speed of the fastest large matrix
product measured here, or the weights were read at the speed of the fastest large read, whichever is longer, plus the
time to read at that speed the keys and values that the step attends to.
"""

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from transformers import PreTrainedModel

from datagen.decoder import Decoder
from datagen.generate import GenerateConfig, Vocabulary, write_sequences
from datagen.sampling import uniform
from launch import cli
from qat.quant import products
from qat.runtime import machine
from qat.store import models, smollm2
from qat.train.teacher_cache import Observed

_KEPT = 64
"""Most likely tokens of each position that are kept, where predictions are (``--teacher_cache``)."""

_STOP_ONE_IN, _LONGEST = 16, 128
"""Slot refill is measured with every 16th token id ending a sequence, and after so many tokens: a geometric spread."""


@dataclass(frozen=True)
class GenerationBenchmark:
    """What is measured.

    Args:
        model: a full-precision model
        batch_size: sequences decoded at one time
        length: tokens of each sequence, the first one included
        repeats: runs of each, of which the median counts
        vllm: a Python interpreter that can import vLLM
        json: file for the figures
    """

    model: str = smollm2.EMBEDDED
    batch_size: int = 64
    length: int = 128
    repeats: int = 3
    vllm: Path | None = None
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, GenerationBenchmark)
    name = models.resolve_full_precision(config.model)
    dtype = machine.inference_dtype()
    print(f"{common.machine()}; {config.model}, {dtype}, batch {config.batch_size}, {config.length} tokens")
    model = models.load_here(name, dtype)
    new = config.length - 1
    batch = GenerateConfig(
        sequences=config.batch_size, max_length=config.length, strategy="sample", batch_size=config.batch_size
    )
    vocabulary = Vocabulary(start=list(range(1000, 1000 + config.batch_size)), prefix=[], stop=[])

    # tokens in one call, and the call
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "ours": (
            config.batch_size * new,
            lambda: write_sequences(model, vocabulary, batch, range(config.batch_size)),
        ),
        "ours, predictions kept": (
            config.batch_size * new,
            lambda: write_sequences(
                model,
                vocabulary,
                batch,
                range(config.batch_size),
                watch=Observed(config.batch_size, config.length, _KEPT).keep,
            ),
        ),
        "HF generate, batch 1": (new, lambda: hf_generate(model, 1, new)),
        "HF generate, same batch": (config.batch_size * new, lambda: hf_generate(model, config.batch_size, new)),
        "HF continuous batching": (config.batch_size * new, lambda: hf_continuous(model, config.batch_size, new)),
    }
    try:
        hf_continuous(model, 2, 4)
    except Exception as error:
        print(f"transformers' continuous batching does not run here: {type(error).__name__}: {error}")
        del ways["HF continuous batching"]
    seconds = common.median_seconds({way: call for way, (_, call) in ways.items()}, config.repeats)
    rates = {way: tokens / seconds[way] for way, (tokens, _) in ways.items()}
    if config.vllm:
        rates["vLLM"] = vllm_rate(config, name, dtype)
    rates["roofline"] = roofline(model, config.batch_size, config.length)
    for way, rate in rates.items():
        print(f"{way:24} {rate:8.1f} tokens/s")

    many = range(config.batch_size * 4)
    spread = Vocabulary(start=vocabulary.start, prefix=[], stop=list(range(0, model.config.vocab_size, _STOP_ONE_IN)))
    batch = dataclasses.replace(batch, sequences=len(many), max_length=_LONGEST)
    refill = {
        "refill": lambda: write_sequences(model, spread, batch, many),
        "static": lambda: write_statically(model, spread, batch, many),
    }
    of_refill = common.median_seconds(refill, 1)
    figures = {
        "tokens_per_second": rates["ours"],
        "with_predictions_kept": rates["ours, predictions kept"] / rates["ours"],
        "vs_hf_batch1": rates["ours"] / rates["HF generate, batch 1"],
        "vs_hf_same_batch": rates["ours"] / rates["HF generate, same batch"],
        "refill_vs_static": of_refill["static"] / of_refill["refill"],
        "roofline_fraction": rates["ours"] / rates["roofline"],
    }
    if "HF continuous batching" in rates:
        figures["vs_hf_continuous_batching"] = rates["ours"] / rates["HF continuous batching"]
    if "vLLM" in rates:
        figures["vs_vllm"] = rates["ours"] / rates["vLLM"]
    common.write(config.json, figures)


def hf_generate(model: PreTrainedModel, batch: int, new: int) -> None:
    prompts = torch.arange(1000, 1000 + batch, device=model.device)[:, None]
    model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
    )  # fmt: skip


def hf_continuous(model: PreTrainedModel, batch: int, new: int) -> None:
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    implementation = model.config._attn_implementation
    try:
        outputs = model.generate_batch(
            [[token] for token in range(1000, 1000 + batch)],
            generation_config=GenerationConfig(
                do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=2 * batch, max_batch_tokens=batch),
            progress_bar=False,
        )
        counts = [len(output.generated_tokens) for output in outputs.values()]
        if counts != [new] * batch:
            raise RuntimeError(f"it made {sum(counts)} tokens of {batch * new}")
    finally:
        model.set_attn_implementation(implementation)


def write_statically(model: PreTrainedModel, vocabulary: Vocabulary, config: GenerateConfig, indices: range) -> None:
    """The same sequences in batches of their own, each of which goes on until its longest one has ended."""
    stop = torch.tensor(vocabulary.stop)
    for first in range(indices.start, indices.stop, config.batch_size):
        numbers = torch.arange(first, first + config.batch_size)
        tokens = torch.tensor(vocabulary.start)[: len(numbers)]
        decoder = Decoder(model, len(numbers), config.max_length)
        position = torch.zeros_like(numbers)
        ended = torch.zeros_like(numbers, dtype=torch.bool)
        while not ended.all() and position[0] < config.max_length - 1:
            draw = uniform(config.seed, numbers, position + 1)
            tokens = decoder.step(tokens, position, torch.zeros_like(ended), draw).tokens
            position += 1
            ended |= torch.isin(tokens, stop)


def roofline(model: PreTrainedModel, batch: int, length: int) -> float:
    """Tokens per second at the measured peak: see above."""
    flops, bandwidth = peak_flops(model.device, model.dtype), peak_bandwidth(model.device)
    print(f"measured peak: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    head = model.lm_head.weight
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2) + head.numel()
    attention = model.model.layers[0].self_attn
    row = 2 * len(attention.k_proj.weight) * len(model.model.layers) * head.itemsize  # of one token, K and V
    products_of_step = max(2 * batch * weights / flops, weights * head.itemsize / bandwidth)
    attended = batch * sum(range(1, length))
    return batch * (length - 1) / ((length - 1) * products_of_step + attended * row / bandwidth)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / best_seconds(lambda: products.matmul(a, a))


def peak_bandwidth(device: torch.device) -> float:
    x = torch.randn(2**28, device=device)
    return x.nbytes / best_seconds(lambda: x.sum())


def best_seconds(call: Callable[[], object], repeats: int = 10) -> float:
    return min(common.median_seconds({"": call}, 1)[""] for _ in range(repeats))


def vllm_rate(config: GenerationBenchmark, name: str, dtype: torch.dtype) -> float:
    """In a process of its own: vLLM wants an environment of its own."""
    script = Path(__file__).with_name("generation_vllm.py")
    settings = {
        "model": str(Path(name).resolve()), "dtype": str(dtype).removeprefix("torch."), "batch": config.batch_size,
        "length": config.length, "repeats": config.repeats,
    }  # fmt: skip
    began = time.perf_counter()
    run = subprocess.run([str(config.vllm), str(script), json.dumps(settings)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"vLLM failed:\n{run.stderr[-4000:]}")
    print(f"vLLM, with its start: {time.perf_counter() - began:.0f} s")
    result = next(line for line in run.stdout.splitlines() if line.startswith("{"))  # vLLM prints of its own around it
    return json.loads(result)["tokens_per_second"]


if __name__ == "__main__":
    cli.run(main)
