"""LLM-QAT on DeepSpeed: the library. ``qat.load`` runs what it made."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(directory: str) -> "PreTrainedModel":
    """The student or integer export at ``directory`` as it is deployed; see qat.infer.packed.load."""
    from qat.infer import packed  # here, so that importing a part of the package does not import all of it

    return packed.load(directory)
