"""The same sequences by vLLM: a greedy stage, then a sampled stage. vLLM is an optional dependency.

vLLM draws its own random numbers (one seed per sequence), so its tokens differ from those of our engine; and its floats
depend on how it batches, so a shard that is made again may differ in a token.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from datagen import sampling
from datagen.generate import Beginnings, GenerateConfig, Vocabulary
from qat.data.shards import Sequence
from qat.quant.architecture import head_dim
from qat.runtime.errors import UserError

_SPARE = 256
"""Tokens: vLLM allocates its cache in blocks."""


class VllmEngine:
    """A model in vLLM, on ``config.tensor_parallel`` GPUs."""

    def __init__(self, model: str, dtype: torch.dtype, config: GenerateConfig):
        """Raise UserError if vLLM is not installed."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"engine=vllm needs vLLM ({error}): install it in an environment of its own, or use engine=torch."
            ) from error
        memory = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": _cache_bytes(model, dtype, config)}
        self.llm = LLM(
            model=str(Path(model).resolve()),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=config.max_length,
            max_num_seqs=config.batch_size,
            tensor_parallel_size=config.tensor_parallel,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled
            seed=config.seed,
            **memory,
        )

    def write_sequences(
        self, vocabulary: Vocabulary, config: GenerateConfig, indices: range, progress: Callable[[int, int], None]
    ) -> list[Sequence]:
        """Write the sequences numbered ``indices``, in order. ``progress`` is called at their end: see
        datagen.generate."""
        begin = Beginnings.of(vocabulary, config, indices)
        ids = [list(given) for given in begin.prefix]
        surprisal = [0.0] * len(ids)
        limits = [min(k, config.max_length - len(given)) for k, given in zip(begin.greedy, ids, strict=True)]
        for place, chosen, _ in self._complete(ids, limits, vocabulary, [{"temperature": 0.0}] * len(ids)):
            ids[place] += chosen
        seeds = sampling.seeds(config.seed, torch.arange(indices.start, indices.stop))
        options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "logprobs": 0}
        limits = [
            0 if len(row) > len(given) and row[-1] in vocabulary.stop else config.max_length - len(row)
            for row, given in zip(ids, begin.prefix, strict=True)
        ]
        for place, chosen, output in self._complete(ids, limits, vocabulary, [options | {"seed": s} for s in seeds]):
            ids[place] += chosen
            surprisal[place] = -output.cumulative_logprob
        written = sum(len(row) - 1 for row in ids)
        progress(written, len(ids) * (config.max_length - 1) - written)
        ended = [
            row[-1] in vocabulary.stop and len(row) > len(given) for row, given in zip(ids, begin.prefix, strict=True)
        ]
        return [begin.sequence(place, *end) for place, end in enumerate(zip(ids, surprisal, ended, strict=True))]

    def _complete(
        self, prompts: list[list[int]], limits: list[int], vocabulary: Vocabulary, options: list[dict]
    ) -> Iterator[tuple[int, list[int], Any]]:
        """Yield (place, tokens, vLLM's output) of the prompts whose limit is above 0."""
        from vllm import SamplingParams

        places = [place for place, limit in enumerate(limits) if limit > 0]
        parameters: list[Any] = [
            SamplingParams(
                max_tokens=limits[place], stop_token_ids=vocabulary.stop, ignore_eos=True, detokenize=False,
                **options[place],
            )
            for place in places
        ]  # fmt: skip
        inputs: list[Any] = [{"prompt_token_ids": prompts[place]} for place in places]
        for place, result in zip(places, self.llm.generate(inputs, parameters), strict=True):
            yield place, list(result.outputs[0].token_ids), result.outputs[0]


def _cache_bytes(model: str, dtype: torch.dtype, config: GenerateConfig) -> int:
    """Return the bytes that the keys and values of a full batch need: on CPUs vLLM would take nearly all of the host's
    memory."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(model)
    row = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_dim(shape) * dtype.itemsize
    return config.batch_size * (config.max_length + _SPARE) * row
