"""Talk to a trained student, or an integer export of it, as it is deployed: packed weights, integer KV cache.

python launch/chat.py --model DIR
"""

import sys
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, TextStreamer

import qat
from launch import cli
from qat import models
from qat.errors import UserError
from qat.packed import memory


@dataclass(frozen=True)
class Chat:
    """What to talk to, and how it answers.

    Args:
        model: an integer export, or the final/ of a training run
        prompt: one message; by default each line of the standard input is one
        max_new_tokens: longest answer
        temperature: 0 for the likeliest token each time; above, sampled
        seed: of the sampling
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
    model = qat.load(name)
    print(_describe(model), file=sys.stderr)
    torch.manual_seed(settings.seed)
    if settings.prompt:
        _answer(model, tokenizer, [_message("user", settings.prompt)], settings)
        return
    history: list[dict[str, str]] = []
    while line := _read():
        history.append(_message("user", line))
        history.append(_message("assistant", _answer(model, tokenizer, history, settings)))


def _answer(model: PreTrainedModel, tokenizer: models.Tokenizer, history: list[dict[str, str]], settings: Chat) -> str:
    """Print the model's next turn as it comes, and return it. A model that knows no turns continues the last one."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(history[-1]["content"], return_tensors="pt")
    inputs = inputs.to(model.device)
    prompt = inputs.input_ids.shape[1]
    models.check_length(model.config, prompt + settings.max_new_tokens, "the conversation with max_new_tokens")
    sampled = {"temperature": settings.temperature} if settings.temperature else {}
    ids = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=settings.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        do_sample=bool(sampled),
        **sampled,
    )
    return str(tokenizer.decode(ids[0, prompt:], skip_special_tokens=True))


def _describe(model: PreTrainedModel) -> str:
    held = memory(model)
    return (
        f"{held.weights / 1e6:.1f} MB of weights, {held.cache_per_token / 1e3:.2f} MB of KV cache per 1000 tokens; "
        "an empty line ends"
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _read() -> str:
    """The next line; empty at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    cli.run(main)
