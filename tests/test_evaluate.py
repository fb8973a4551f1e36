import math

import pytest
import torch
from conftest import tiny_model

from qat.errors import UserError
from qat.evaluate import ENCYCLOPEDIA, perplexity, text_windows


def test_perplexity_is_that_of_the_models_own_loss():
    model = tiny_model()
    windows = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    measured = perplexity(model, windows)
    loss = model(windows, labels=windows).loss.item()
    assert measured.nll == pytest.approx(loss, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert measured.tokens == 3 * 39


def test_windows_are_the_text_in_order(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two three four five six seven eight nine ten " * 5)
    windows = text_windows(str(file), tokenizer, window=8, most=0)
    ids = tokenizer(file.read_text() + "\n\n", add_special_tokens=False).input_ids
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert len(ids) - windows.numel() < 8
    assert torch.equal(text_windows(str(file), tokenizer, 8, most=2), windows[:2])


def test_the_built_in_prose_is_prose(tokenizer):
    text = tokenizer.decode(text_windows(ENCYCLOPEDIA, tokenizer, 512, 8).flatten())
    assert text.count(" the ") > 20
    assert not any(markup in text for markup in ("[[", "{{", "<ref", "thumb|"))


def test_missing_and_short_texts_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no text at"):
        text_windows("nowhere.txt", tokenizer, 8, 0)
    short = tmp_path / "short.txt"
    short.write_text("one")
    with pytest.raises(UserError, match="less than one window"):
        text_windows(str(short), tokenizer, 100, 0)
