"""Floating-point operations of a training step, for model FLOP utilisation and for planning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat.quant.architecture import head_dim, output_layer, quantizable_linears

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def matrix_elements(model: PreTrainedModel) -> int:
    """Return the number of weights that every token is multiplied with: the linear layers and the output layer, not the
    embedding. The weights themselves may be sharded."""
    linears = [*quantizable_linears(model).values(), output_layer(model)]
    return sum(linear.in_features * linear.out_features for linear in linears)


def forward(config: PretrainedConfig, matrices: int, tokens: int) -> float:
    """Return the operations of one forward pass over a sequence: 2 for each of ``matrix_elements`` and token, and
    causal attention's two products."""
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * head_dim(config) * tokens**2
    return 2.0 * matrices * tokens + attention


def distillation(config: PretrainedConfig, matrices: int, tokens: int, teacher: bool) -> float:
    """Return the operations of training on one sequence: the student's forward and twice that for backward, and the
    teacher's forward. Recomputation by gradient checkpointing is not counted: it is no progress."""
    return (3 + teacher) * forward(config, matrices, tokens)
