"""A tokenizer with more tokens than the model has embeddings: text without them is like any other, text with them is
refused by every command before anything is written."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
from commands import error_of, train_flags
from tiny import CONFIG, TEXT, tiny_model, tiny_tokenizer

from datagen.generate import Vocabulary
from launch import chat
from qat.data.shards import Sequence, ShardFolder
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError
from qat.store import models

BEYOND = CONFIG["vocab_size"]
"""The id of the token that was added."""


@pytest.fixture
def model(tmp_path) -> Path:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<foo>"])
    assert tokenizer.convert_tokens_to_ids("<foo>") == BEYOND
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(model, tmp_path) -> Path:
    """Shards of an earlier version, which wrote such a token."""
    folder = ShardFolder(tmp_path / "data")
    tokenizer = models.tokenizer_fingerprint(models.load_tokenizer(str(model)))
    folder.begin({"sequences": 8, "sequences_per_shard": 8, "max_length": 8, "tokenizer": tokenizer})
    folder.write(0, [Sequence([0, 5, BEYOND, 6, 7, 8, 9, 10], 5, 0, "length", None)] * 8)
    return folder.directory


def test_every_command_refuses_text_with_tokens_that_the_model_does_not_know(model, data, tmp_path, monkeypatch):
    text, output = tmp_path / "text.txt", tmp_path / "output"
    text.write_text("a <foo> in a text that is long enough " * 20)
    corpus = [f"--corpus={text}", "--sequences=4", "--max_length=32", "--sequences_per_shard=4"]
    commands = {
        "generate": [f"--model={model}", f"--output={output}", *corpus],
        "evaluate": [f"--model={model}", f"--text={text}", "--window=32"],
        "train": train_flags(model, data, output),
        "cache_teacher": train_flags(model, data, output),
        "quantize": [f"--model={model}", f"--data={data}", f"--output={output}", "--method=gptq"],
    }
    for script, flags in commands.items():
        assert f"contains token id {BEYOND}" in error_of(monkeypatch, script, *flags), script
        assert not output.exists()
    QuantConfig().save(model)
    flags = [f"--checkpoint={model}", f"--output={output}", f"--text={text}"]
    assert f"contains token id {BEYOND}" in error_of(monkeypatch, "export", *flags)
    monkeypatch.setattr(sys, "argv", ["chat.py", f"--model={model}", "--prompt=a <foo>", "--max_new_tokens=4"])
    with pytest.raises(UserError, match=f"contains token id {BEYOND}"):
        chat.main()


def test_text_without_them_is_like_any_other(model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = ["--sequences=4", "--max_length=32", "--sequences_per_shard=4"]
    flags = [f"--model={model}", f"--output={tmp_path / 'data'}", f"--corpus={tmp_path / 'text.txt'}", *sizes]
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    assert import_module("launch.generate").main() == 0
    assert len(ShardFolder(tmp_path / "data").sequences()) == 4


def test_no_sequence_begins_with_a_token_that_the_model_does_not_know(tmp_path):
    """Also where it was not added, but is one of the tokenizer's own."""
    tiny_model(vocab_size=290).save_pretrained(tmp_path)
    start = Vocabulary.of(tiny_tokenizer(), str(tmp_path)).start
    assert start == list(range(2, 290))
