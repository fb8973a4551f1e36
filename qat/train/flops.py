"""Floating-point operations of a training step, for model FLOP utilisation and for planning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quant.architecture import head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def matrix_elements(config: PretrainedConfig) -> int:
    """Return the number of weights that every token is multiplied with: the linear layers and the output layer, not the
    embedding."""
    head = head_dim(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = config.hidden_size * (2 * queries + 2 * keys) + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def forward(config: PretrainedConfig, tokens: int) -> float:
    """Return the operations of one forward pass over a sequence: 2 per weight and token, and causal attention's two
    products."""
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * head_dim(config) * tokens**2
    return 2.0 * matrix_elements(config) * tokens + attention


def distillation(config: PretrainedConfig, tokens: int, teacher: bool) -> float:
    """Return the operations of training on one sequence: the student's forward and twice that for backward, and the
    teacher's forward. Recomputation by gradient checkpointing is not counted: it is no progress."""
    return (3 + teacher) * forward(config, tokens)
