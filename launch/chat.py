"""Talk to a trained student, or an integer export of it, as it is deployed: packed weights and KV cache.

python launch/chat.py --model DIR
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import qat
from launch import cli
from qat.infer.packed import memory
from qat.runtime.errors import UserError
from qat.runtime.machine import take_gpu
from qat.store import dialogues, models
from qat.store.dialogues import Message, message

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Chat:
    """The model to talk to, and how it answers.

    Args:
        model: an integer export, or the final/ of a training run
        prompt: a single message; by default each line of standard input is a message
        max_new_tokens: longest answer
        temperature: sampling temperature; 0 for the most likely token each time
        seed: seed for sampling
    """

    model: str
    prompt: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise UserError("max_new_tokens must be 1 or more, and temperature 0 or more.")


def main() -> None:
    (settings,) = cli.parse(__doc__, Chat)
    name = models.resolve(settings.model)
    tokenizer = models.load_tokenizer(name)
    take_gpu()
    model = qat.load(name)
    print(_describe(model), file=sys.stderr)
    torch.manual_seed(settings.seed)
    if settings.prompt:
        _answer(model, tokenizer, [message("user", settings.prompt)], settings)
        return
    history: list[Message] = []
    for line in _lines():
        try:
            history = _answer(model, tokenizer, [*history, message("user", line)], settings)
        except UserError as error:  # the message is rejected, and the chat continues without it
            print(f"not answered: {error}", file=sys.stderr, flush=True)


def _answer(model: "PreTrainedModel", tokenizer: "Tokenizer", history: list[Message], settings: Chat) -> list[Message]:
    """Print the model's next turn as it is generated, and return the conversation with it. A model without a chat
    template continues the last turn."""
    from transformers import TextStreamer

    inputs, history = _fitting(model, tokenizer, history, settings.max_new_tokens)
    inputs = inputs.to(model.device)
    sampled = {"temperature": settings.temperature} if settings.temperature else {}
    ids = model.generate(  # type: ignore[operator]
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=settings.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        do_sample=bool(sampled),
        **sampled,
    )
    answer = str(tokenizer.decode(ids[0, inputs.shape[1] :], skip_special_tokens=True))
    return [*history, message("assistant", answer)]


def _fitting(
    model: "PreTrainedModel", tokenizer: "Tokenizer", history: list[Message], max_new_tokens: int
) -> tuple[Tensor, list[Message]]:
    """Return the token ids [1, tokens] of the conversation, and the conversation, without its oldest turns if the model
    has no room for them.

    Raises UserError if the last message alone is too long, or has tokens that the model does not know.
    """
    longest, turns = model.config.max_position_embeddings, len(history)
    while (tokens := (ids := _encoded(tokenizer, history)).shape[1]) + max_new_tokens > longest:
        if len(history) == 1:
            raise UserError(
                f"The message is {tokens} tokens long, and the answer may have max_new_tokens={max_new_tokens}; the "
                f"model has {longest} positions for both: shorten the message, or lower max_new_tokens."
            )
        history = history[2:]  # a question and its answer
    if len(history) < turns:
        print(f"context full: dropped the first {turns - len(history)} turns", file=sys.stderr, flush=True)
    models.check_ids(model.config, int(ids.max()), "The message")
    return ids, history


def _encoded(tokenizer: "Tokenizer", history: list[Message]) -> Tensor:
    """Return token ids [1, tokens] by the tokenizer's chat template; without one, those of the last message."""
    if not tokenizer.chat_template:
        return tokenizer(history[-1]["content"], return_tensors="pt", verbose=False).input_ids
    return torch.tensor([dialogues.encoded(tokenizer, dialogues.rendered(tokenizer, history, answering=True))])


def _describe(model: "PreTrainedModel") -> str:
    held = memory(model)
    return (
        f"{held.weights / 1e6:.1f} MB of weights, {held.cache_per_token / 1e3:.2f} MB of KV cache per 1000 tokens; "
        "an empty line ends"
    )


def _lines() -> Iterator[str]:
    """Yield the lines of the standard input, up to an empty one."""
    for number in count(1):
        try:
            # Decoded line by line: Python itself decodes ahead, or, in the C locale, lets everything through.
            line = (input("> ") if sys.stdin.isatty() else sys.stdin.buffer.readline().decode()).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(
                f"The standard input, line {number}, is not UTF-8 text ({error.reason}): convert it."
            ) from error
        if not line:
            return
        yield line


if __name__ == "__main__":
    cli.run(main)
