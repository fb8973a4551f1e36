"""Memory that writing sequences will need: the formula, which docs/generation.md explains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from datagen.attention import TRITON_SIZES
from datagen.cuda_graphs import COLUMNS
from datagen.generate import GenerateConfig
from datagen.sampling import Truncation
from qat.quant.architecture import head_dim, input_embedding, is_tied

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CHOOSING, _CHOOSING_TRUNCATED = 9, 43
"""Bytes that ``sampling.choose`` holds at most for each logit, measured; sorting the vocabulary (top_p) takes the
most."""

_PREDICTION = 6
"""Bytes of a kept prediction: a token id, and its log-probability in fp16."""


def needs(config: PretrainedConfig, settings: GenerateConfig, device: str) -> Mapping[str, float]:
    """Return the bytes that ``config``'s model and its slots take on each of the ranks that hold the model together.

    Args:
        device: type of the ranks' devices: cuda, which computes in bf16, or cpu, in fp32
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    width = 2 if device == "cuda" else 4
    ranks, slots = settings.tensor_parallel, min(settings.batch_size, settings.sequences_per_shard, settings.sequences)
    weights = sum(parameter.numel() for parameter in model.parameters())
    embedding = input_embedding(model).get_parameter("weight").numel()
    whole = 0 if is_tied(model) else embedding  # of those on each rank: only a tied embedding is divided
    if device == "cpu":  # a copy of the products' weights in oneDNN's layout
        weights += sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    cached = 2 * config.num_key_value_heads * head_dim(config) * config.num_hidden_layers  # cached numbers per token
    # Each CUDA graph keeps its own logits. With our attention one serves all lengths.
    many = device == "cuda" and ranks == 1 and head_dim(config) not in TRITON_SIZES
    graphs = -(-settings.max_length // COLUMNS) if many else 1
    kept = min(settings.sequences_per_shard, settings.sequences) * (settings.max_length - 1) * settings.teacher_cache
    choosing = _CHOOSING if settings.truncation == Truncation() else _CHOOSING_TRUNCATED
    return {
        "KV cache": width * slots * settings.max_length * cached / ranks,
        "weights": width * (weights - whole) / ranks + width * whole,
        # Of a shard, until it is written; on the host, which for a GPU is other memory.
        **({"teacher's predictions": _PREDICTION * kept} if kept and device == "cpu" else {}),
        "logits and sampling": slots * config.vocab_size * (width + 4 * graphs + choosing),
    }
