"""Forward passes to the final hidden states, which the loss and perplexity multiply by the output layer themselves."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.quant.kv_cache import AttentionRecord, attend


def run(
    model: PreTrainedModel,
    input_ids: Tensor,
    record: AttentionRecord | None = None,
    all_layers: bool = False,
    lengths: tuple[int, ...] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run ``model`` over one sequence [1, tokens], or over several that are packed into one row.

    Each of several attends to itself alone, from position 0 on: the result is that of one after the other.

    Args:
        record: to be filled
        all_layers: whether to return the hidden states of every layer
        lengths: tokens of each sequence; none for a single one

    Returns:
        the final hidden states [tokens - 1 of each sequence, hidden] that predict a token of it, and, if
        ``all_layers``, the hidden states [1, tokens, hidden] of every layer
    """
    asked: dict[str, Any] = {}
    if record is not None or len(lengths) > 1:
        attend(model)  # only qat's attention records, and keeps packed sequences apart
    if record is not None:
        asked["attention_record"] = record
    if len(lengths) > 1:
        positions = torch.cat([torch.arange(length, device=input_ids.device) for length in lengths])
        # transformers passes a mask of four dimensions on as it is; without one it would make one of tokens x tokens.
        no_mask = torch.empty(1, 1, 1, 1, device=input_ids.device)
        asked |= {"position_ids": positions[None], "attention_mask": no_mask, "sequence_lengths": lengths}
    output = model.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=all_layers, **asked)
    final = output.last_hidden_state[0]
    ends = [sequence[:-1] for sequence in final.split(lengths or len(final))]
    return ends[0] if len(ends) == 1 else torch.cat(ends), output.hidden_states if all_layers else ()


def predicting(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Run ``model`` over one sequence; return the final hidden states of ``run``."""
    return run(model, input_ids)[0]
