"""Generation: CUDA graphs = eager, tokens per second, and how near the machine's limit."""

from functools import partial

import torch
from generation import hf_generate
from transformers import PreTrainedModel

from datagen import cuda_graphs, plan, sampling
from datagen.decoder import Decoder
from datagen.generate import GenerateConfig
from gpu_checks.bench import Bench, device_seconds, product_rate, profiled, read_rate, seconds
from qat.runtime import memory


def decoding(bench: Bench) -> tuple[dict, dict]:
    """7B with random weights: logits of graphs and eager steps; speed at two places; Hugging Face's generate."""
    s = bench.shapes
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = bench.model(s.written_layers)
    figures = _ours(bench, model)
    settings = GenerateConfig(sequences=s.slots, max_length=s.max_length, batch_size=s.slots)
    planned = memory.planned_peak({"process": 0.0, **plan.needs(model.config, settings, bench.device.type)})
    figures |= {
        "peak_GB": memory.peak() / 1e9,
        "planned_GB": planned / 1e9,
        "peak_over_planned": memory.peak() / planned,
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    new = 24
    alone = new / seconds(lambda: hf_generate(model, 1, new), 1)
    figures["hf_batch1_tokens_per_second"] = alone
    figures["over_hf_batch1"] = figures["early"]["tokens_per_second"] / alone
    return figures, {
        "graphs = eager": figures["graphs_off_by"] < 0.05,
        "replayed": figures["replay_off_by"] == 0,
        "own attention": figures["own_attention"] == (bench.device.type == "cuda"),
        "as torch's": figures["attention_off_by"] < 0.05,
    }


def _ours(bench: Bench, model: PreTrainedModel) -> dict:
    s = bench.shapes
    decoder = Decoder(model, s.slots, s.max_length)
    figures: dict = {
        **_graphs(bench, decoder),
        "weights_GB": sum(p.nbytes for p in model.parameters()) / 1e9,
        "cache_GB": sum(2 * layer.attention.keys.nbytes for layer in decoder.layers) / 1e9,
    }
    for name, place in {"early": s.max_length // 8 - 1, "late": s.max_length - 24}.items():
        step = seconds(_step(bench, decoder, place), 20)
        figures[name] = {
            "position": place,
            "tokens_per_second": s.slots / step,
            "roofline_fraction": _roofline(bench, model, place) / step,
            "eager_over_graph": device_seconds(partial(_eager, decoder, place)) / step,
            **profiled(_step(bench, decoder, place), 8),
        }
    return figures | _mixed(bench, decoder)


def _mixed(bench: Bench, decoder: Decoder) -> dict:
    """Tokens per second with slots at all positions, as while a shard is written: by our attention, which reads each
    slot as far as it has come, and by torch's; and how far their logits are apart."""
    position = torch.arange(decoder.slots) * decoder.max_length // decoder.slots
    own = [layer.attention.triton for layer in decoder.layers]
    rates, logits = {}, []
    for name, kernels in (("ours", own), ("torch's", [None] * len(own))):
        for layer, kernel in zip(decoder.layers, kernels, strict=True):
            layer.attention.triton = kernel
        decoder.graphs = decoder._new_graphs()
        step = _step(bench, decoder, position)
        logits.append(step().logits.clone())
        rates[name] = decoder.slots / seconds(step, 20)
    off = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
    return {"own_attention": own[0] is not None, "attention_off_by": off, "mixed_tokens_per_second": rates}


def _graphs(bench: Bench, decoder: Decoder) -> dict:
    """Logits of graphs beside those of eager steps of the same text, and beside their own when replayed; and the share
    of slots whose likeliest token is the same. cuBLAS may take other algorithms while a graph is captured, so the two
    agree as far as bf16 does; a replay is the same bits."""
    if decoder.graphs is None:
        return {"graphs_off_by": 0.0, "replay_off_by": 0.0, "same_tokens": 1.0}
    worst = again = 0.0
    same = []
    for place in (0, 1, 5, 130):
        tokens = bench.ids(decoder.slots, place)[0]
        position = torch.full_like(tokens, place)
        graph, replayed = (decoder.step(tokens, position).logits.clone() for _ in range(2))
        columns = cuda_graphs.rounded_up(place + 1, decoder.max_length)
        with torch.inference_mode():
            eager = decoder.logits(tokens.to(decoder.device), position.to(decoder.device), columns)
        worst = max(worst, ((graph - eager).norm() / eager.norm()).item())
        again = max(again, (graph - replayed).abs().max().item())
        same.append((graph.argmax(-1) == eager.argmax(-1)).double().mean().item())
    return {"graphs_off_by": worst, "replay_off_by": again, "same_tokens": sum(same) / len(same)}


def _step(bench: Bench, decoder: Decoder, place: int | torch.Tensor):
    """A step as ``write_sequences`` takes it."""
    tokens = bench.ids(decoder.slots)[0]
    position, greedy = torch.zeros_like(tokens) + place, torch.zeros_like(tokens, dtype=torch.bool)
    draw = sampling.uniform(0, tokens, position)
    return lambda: decoder.step(tokens, position, greedy, draw)


def _eager(decoder: Decoder, place: int) -> None:
    tokens = torch.ones(decoder.slots, dtype=torch.long, device=decoder.device)
    with torch.inference_mode():
        decoder.logits(tokens, tokens * place, place + 1)


def _roofline(bench: Bench, model: PreTrainedModel, place: int) -> float:
    """Seconds of a step that reads all weights and the keys and values up to ``place`` once, at the speed of a large
    read, or computes at the speed of a large product."""
    s = bench.shapes
    side = 8192 if bench.device.type == "cuda" else 256
    reading, computing = read_rate(bench), product_rate(bench, side, side, side)
    weights = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    cache = 2 * s.slots * (place + 1) * s.hidden * s.written_layers * bench.dtype.itemsize
    return max(2 * weights * s.slots / computing, weights * bench.dtype.itemsize / reading) + cache / reading
