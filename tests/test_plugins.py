"""One of each kind from outside, all in one model, by the commands themselves: none of their processes knows the
plug-ins but by ``--plugin``. Two ranks train, are killed and resume; the student is evaluated and exported, and so is
what a post-training method of the same house makes."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from commands import ROOT, finish, kill, run_python, start_command, start_training
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from training import flags, losses
from transformers import Olmo2Config

import qat
from qat.export.formats import EXPORT_FORMATS
from qat.infer import simulated
from qat.ptq import METHODS
from qat.quant.architecture import ARCHITECTURES
from qat.quant.kv_formats import KV_FORMATS
from qat.quant.quantizers import QUANTIZERS
from qat.store.sidecars import STEPS_FILE

OTHERS = [f"plugin_{kind}" for kind in ("architecture", "kv_format", "clipping", "export")]
PLUGINS = f"--plugin={','.join(['plugin_quantizer', *OTHERS])}"
TESTS, TEXT = ROOT / "tests", f"--text={ROOT / 'LICENSE'}"
CACHE = "--kv_format=companded"
OWN = ["--a_quantizer=learned_range", "--loss=squared", CACHE, PLUGINS]
TOKENS = torch.arange(2, 22).view(2, 10)


@pytest.fixture(autouse=True)
def plug_ins(monkeypatch) -> None:
    """The plug-ins in this process too, which reads what the commands have written; until the test ends."""
    import_module("plugin_quantizer")  # stays, for the tests that have its classes
    for table in (ARCHITECTURES, KV_FORMATS, METHODS, EXPORT_FORMATS):
        monkeypatch.setattr(table, "_things", dict(table))
    for name in OTHERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
        import_module(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("olmo2")
    tiny_model(Olmo2Config, tie_word_embeddings=False).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained(model, tiny_data, tmp_path_factory) -> Path:
    """Two runs: one as it is, one that was killed and started again."""
    folder = tmp_path_factory.mktemp("own")
    finish(start_training(2, *flags(model, tiny_data, folder / "whole"), *OWN, cwd=TESTS))
    again = [*flags(model, tiny_data, folder / "killed"), *OWN]
    process = start_training(2, *again, cwd=TESTS)
    while process.poll() is None and not (folder / "killed" / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    assert not (folder / "killed" / "final").exists()
    finish(start_training(2, *again, cwd=TESTS))
    return folder


def test_killed_and_resumed_equals_uninterrupted(trained):
    assert losses(trained / "killed") == losses(trained / "whole")
    steps = [load_file(trained / name / "final" / STEPS_FILE) for name in ("whole", "killed")]
    assert all(step.shape == (2,) and torch.equal(step, steps[1][name]) for name, step in steps[0].items())


def test_it_learns_its_range(trained):
    student = simulated.load(str(trained / "whole" / "final"), torch.float32)
    for name, step in load_file(trained / "whole" / "final" / STEPS_FILE).items():
        assert torch.equal(student.get_parameter(name), step)
    assert losses(trained / "whole")[-1][0] < losses(trained / "whole")[0][0]


def test_evaluated_exported_and_loaded(trained, tmp_path):
    """What is loaded generates, from the bytes of its cache, what the simulation generates without one."""
    student = trained / "whole" / "final"
    assert perplexity(student, tmp_path) > 1
    said = run_python("export", f"--checkpoint={student}", f"--output={tmp_path / 'out'}", TEXT, PLUGINS, cwd=TESTS)
    assert "learned_range" in said.stdout
    assert "KV cache: trained as companded" in said.stdout
    generates_the_same(tmp_path / "out", student)


def test_a_post_training_method_in_a_format_of_ones_own(model, tmp_path):
    made, exported = tmp_path / "clipped", tmp_path / "exported"
    settings = ["--method=clipping", "--least_ratio=0.7", "--w_bits=3", CACHE, PLUGINS]
    run_python("quantize", f"--model={model}", f"--output={made}", *settings, cwd=TESTS)
    generates_the_same(made, made)
    assert perplexity(made, tmp_path) > 1
    export = [f"--checkpoint={made}", f"--output={exported}", "--format=npz", TEXT, PLUGINS]
    assert "Verified: read back" in finish(start_command("python", ROOT / "launch/export.py", *export, cwd=TESTS))
    assert (exported / "weights.npz").is_file()


def perplexity(student: Path, folder: Path) -> float:
    """By the command."""
    sizes = ["--window=32", "--windows=4", f"--output={folder}/result.json"]
    run_python("evaluate", f"--model={student}", TEXT, *sizes, PLUGINS, cwd=TESTS)
    (score,) = json.loads((folder / "result.json").read_text())["texts"].values()
    return score["perplexity"]


def generates_the_same(folder: Path, student: Path) -> None:
    loaded, simulation = qat.load(str(folder)), simulated.load(str(student), torch.float32)
    assert torch.equal(loaded(TOKENS).logits, simulation(TOKENS).logits)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(TOKENS)}
    assert torch.equal(loaded.generate(TOKENS, **asked), simulation.generate(TOKENS, use_cache=False, **asked))


def test_without_its_plugin_it_is_refused_in_a_sentence(trained, monkeypatch):
    monkeypatch.delitem(QUANTIZERS._things, "learned_range")
    with pytest.raises(qat.UserError, match=r"a_quantizer='learned_range' is invalid: choose minmax or .*--plugin"):
        qat.QuantConfig.load(trained / "whole" / "final")


def test_a_kv_format_without_an_engine_determines_its_settings_too():
    with pytest.raises(qat.UserError, match="kv_bits=8 is invalid with kv_format=companded: give kv_bits=4"):
        qat.QuantConfig(kv_bits=8, kv_format="companded")
    with pytest.raises(qat.UserError, match="kv_rotation=hadamard is invalid with kv_format=companded"):
        qat.QuantConfig(kv_rotation="hadamard", kv_format="companded")
