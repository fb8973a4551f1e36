"""Forward passes to the final hidden states, which the loss and perplexity multiply by the output layer themselves."""

from torch import Tensor
from transformers import PreTrainedModel

from qat.quant.kv_cache import AttentionRecord


def run(
    model: PreTrainedModel, input_ids: Tensor, record: AttentionRecord | None = None, all_layers: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run ``model`` over one sequence [1, tokens].

    Returns the final hidden states [tokens - 1, hidden] that predict a token of it, and, if ``all_layers``, the
    hidden states [1, tokens, hidden] of every layer. ``record`` is filled if the model attends by qat.quant.kv_cache.
    """
    asked = {} if record is None else {"attention_record": record}
    output = model.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=all_layers, **asked)
    return output.last_hidden_state[0, :-1], output.hidden_states if all_layers else ()


def predicting(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Run ``model`` over one sequence; return the final hidden states of ``run``."""
    return run(model, input_ids)[0]
