"""Dialogues, each a list of messages: read from a file, and turned into text and tokens by a model's chat template."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from qat.runtime.errors import UserError
from qat.runtime.files import utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Message = dict[str, str]
"""One turn: its ``role`` (system, user or assistant) and its ``content``."""

_TODAY = datetime(2024, 7, 26)
"""The date given to templates that state one, so that the same command gives the same tokens on any day. It is the
default of Llama 3's template."""


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def read(file: Path) -> list[list[Message]]:
    """Return the dialogues of a file: ``.jsonl``, each line an object with "messages" or with a "prompt", or ``.txt``,
    each line a prompt; blank lines are skipped.

    Raises UserError, which names the line, for anything else.
    """
    if file.suffix not in (".jsonl", ".txt") or not file.is_file():
        raise UserError(
            f"{file} is not a .jsonl or .txt file: give a .jsonl file of dialogues, or a .txt file with a prompt per "
            "line."
        )
    found = []
    with utf8(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            messages = [message("user", line.strip())] if file.suffix == ".txt" else _messages(line)
            if not messages:
                raise UserError(
                    f'{file}, line {number}, is not a dialogue: give an object with a "prompt", or with "messages", '
                    'each with a "role" and a "content".'
                )
            found.append(messages)
    if not found:
        raise UserError(f"{file} contains no dialogues: give at least one.")
    return found


def rendered(tokenizer: Tokenizer, messages: list[Message], answering: bool) -> str:
    """Return ``messages`` rendered by the tokenizer's chat template; if ``answering``, up to the place where
    the model's answer begins.

    Raises UserError if there is no template, or if it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template, which dialogues need: give an instruct model.")
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answering, strftime_now=_TODAY.strftime
            )
        )
    except (TemplateError, ValueError) as error:  # ValueError: there are no messages
        raise UserError(f"The tokenizer's chat template refuses the messages: {error}.") from error


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of text that a chat template made, which contains BOS if it wants one."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def with_answers(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Return the token ids of a dialogue, and of each whether the model has to write it: the tokens of the answers, and
    after each the one that ends it.

    Questions and answers are tokenized apart, as when a model answers. Raises UserError if the template changes what
    was said before.
    """
    ids: list[int] = []
    written: list[bool] = []
    text = ""
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        question = rendered(tokenizer, messages[:number], answering=True)
        answer = rendered(tokenizer, messages[: number + 1], answering=False)
        content = turn["content"].strip()
        begin = answer.find(content, len(question))
        if not (question.startswith(text) and answer.startswith(question)) or begin < 0:
            raise UserError(
                "The tokenizer's chat template changes earlier turns when later ones follow, so the tokens of an "
                "answer cannot be located: give dialogues of one question and one answer."
            )
        end = begin + len(content)
        pieces = [encoded(tokenizer, piece) for piece in (question[len(text) :], answer[len(question) : end])]
        after = encoded(tokenizer, answer[end:])
        ids += [*pieces[0], *pieces[1], *after]
        written += [False] * len(pieces[0]) + [True] * (len(pieces[1]) + bool(after)) + [False] * (len(after) - 1)
        text = answer
    return ids, written


def _messages(line: str) -> list[Message]:
    """Return the messages of a line of a ``.jsonl`` file; none if it is no dialogue."""
    try:
        row = json.loads(line)
    except ValueError:
        return []
    if not isinstance(row, dict):
        return []
    if isinstance(row.get("prompt"), str):
        return [message("user", row["prompt"])]
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return []
    found = [message(turn.get("role"), turn.get("content")) for turn in turns]
    return found if all(isinstance(value, str) for turn in found for value in turn.values()) else []
