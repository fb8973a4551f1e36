"""What is served: sizes, perplexities and speed of exports beside the full-precision model, in vLLM and in qat.load.

Run it in an environment with vLLM (tests/vllm_venv.sh):

python benchmarks/serving.py --full runs/models/smollm2-135m-instruct --exports [export/484,export/888]
"""

import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor
from transformers import PreTrainedModel

import qat
from launch import cli
from qat.evaluate import heldout, vllm
from qat.evaluate.perplexity import TextScore, perplexity, text_windows
from qat.infer import simulated
from qat.infer.packed import memory
from qat.quant.config import CONFIG_FILE
from qat.quant.number_format import FULL_PRECISION
from qat.store import models, weight_files


@dataclass(frozen=True)
class Serving:
    """What is measured.

    Args:
        full: the full-precision model
        exports: integer exports of students of it
        dtypes: that vLLM computes in
        windows: of held-out prose, for perplexity
        window: tokens of each
        batch: sequences that are generated at a time, beside one alone
        new_tokens: that are generated for each
        json: file for the figures
    """

    full: str
    exports: list[Path] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    windows: int = 4
    window: int = 512
    batch: int = 16
    new_tokens: int = 32
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, Serving)
    windows = text_windows(
        heldout.paragraphs(heldout.ENCYCLOPEDIA), models.load_tokenizer(config.full), config.window, config.windows
    )
    figures: dict[str, float] = {}
    print(common.machine())
    for name in (config.full, *map(str, config.exports)):
        for measure in (_disk, _ours, *(_in_vllm(dtype) for dtype in config.dtypes)):
            for what, value in measure(name, windows, config).items():
                figures[f"{Path(name).name}/{what}"] = value
    common.write(config.json, figures)


def _disk(name: str, windows: Tensor, config: Serving) -> dict[str, float]:
    return {"disk_MB": weight_files.weights_size(Path(name)) / 1e6}


def _ours(name: str, windows: Tensor, config: Serving) -> dict[str, float]:
    """Perplexity of the simulation, with and without its KV cache, and size and speed of the packed model."""
    model = simulated.load(name, torch.float32)
    found = {"perplexity": perplexity(model, windows).perplexity}
    del model
    if not (Path(name) / CONFIG_FILE).is_file():
        held = memory(models.load(name, torch.bfloat16))
        return found | {
            "weights_MB_bf16": held.weights / 1e6,
            "cache_MB_per_1k_tokens_bf16": held.cache_per_token / 1e3,
        }
    quant, dtype, weights = simulated.read(Path(name))
    without = simulated.simulate(Path(name), weights, dtype, replace(quant, kv_bits=FULL_PRECISION), torch.float32)
    found["perplexity_kv16"] = perplexity(without, windows).perplexity
    del without
    model = qat.load(name)
    held = memory(model)
    found |= {"weights_MB": held.weights / 1e6, "cache_MB_per_1k_tokens": held.cache_per_token / 1e3}
    found["qat_load_tokens_per_second"] = _generation_rate(model, windows[:1, :8], config.new_tokens)
    del model
    gc.collect()
    return found


def _generation_rate(model: PreTrainedModel, prompt: Tensor, new: int) -> float:
    """Tokens per second of one sequence."""
    prompt = prompt.to(model.device)
    settings = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "min_new_tokens": new}

    def generate() -> None:
        model.generate(prompt, max_new_tokens=new, **settings)  # type: ignore[operator]

    return new / common.median_seconds({"": generate}, repeats=1)[""]


def _in_vllm(dtype: str) -> Any:
    def measure(name: str, windows: Tensor, config: Serving) -> dict[str, float]:
        """In a process of its own: vLLM gives its memory back when that ends."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_serve, name, windows, config, dtype).result()

    return measure


def _serve(name: str, windows: Tensor, config: Serving, dtype: str) -> dict[str, float]:
    llm = vllm.engine(name, config.window + 1, dtype)
    score = TextScore.of(vllm.score_windows(llm, windows))
    found = {f"vllm_{dtype}_perplexity": score.perplexity}
    for batch in (1, config.batch):
        prompts = [{"prompt_token_ids": windows[i % len(windows), i : i + 8].tolist()} for i in range(batch)]
        settings = vllm.greedy(config.new_tokens)
        llm.generate(prompts, vllm.greedy(2), use_tqdm=False)
        began = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - began
        found[f"vllm_{dtype}_tokens_per_second_batch{batch}"] = batch * config.new_tokens / seconds
    llm.llm_engine.engine_core.shutdown()  # this process would wait for the engine's at its end, and forever
    return found


if __name__ == "__main__":
    cli.run(main)
