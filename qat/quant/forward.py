"""Forward passes to the final hidden states, which the loss and perplexity multiply by the output layer themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.quant.kv_cache import AttentionRecord, attend
from qat.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    if len(input_ids) != 1:
        raise UserError(
            f"input_ids has {len(input_ids)} rows: give one sequence [1, tokens], or several packed into one row."
        )
    lengths = lengths or (input_ids.shape[1],)
    attend(model)  # only qat's attention records, and keeps packed sequences apart
    positions = torch.cat([torch.arange(length, device=input_ids.device) for length in lengths])
    # transformers passes a mask of four dimensions on as it is, and qat's attention needs none. Without one, it would
    # ask the device whether the positions are those of several sequences, and make one of tokens x tokens if so.
    no_mask = torch.empty(1, 1, 1, 1, device=input_ids.device)
    asked: dict[str, Any] = {} if record is None else {"attention_record": record}
    output = model.base_model(
        input_ids=input_ids,
        position_ids=positions[None],
        attention_mask=no_mask,
        sequence_lengths=lengths,
        use_cache=False,
        output_hidden_states=all_layers,
        **asked,
    )
    final = output.last_hidden_state[0]
    ends = [sequence[:-1] for sequence in final.split(lengths)]
    return ends[0] if len(ends) == 1 else torch.cat(ends), output.hidden_states if all_layers else ()


def predicting(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Run ``model`` over one sequence [1, tokens]; return the final hidden states [tokens - 1, hidden] of ``run``."""
    return run(model, input_ids)[0]
