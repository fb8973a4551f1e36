"""The public API: what ``import qat`` costs and offers, and the examples, as they stand."""

import re
import runpy
import subprocess
import sys

import pytest
import torch
from commands import ROOT
from tiny import TEXT, tiny_model
from transformers import AutoModelForCausalLM

import qat
from qat.infer import simulated
from qat.runtime.errors import UserError
from qat.store import models


def test_importing_the_package_imports_nothing_else():
    code = "import sys, qat; qat.__version__; print(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True).stdout == "False\n"


@pytest.mark.parametrize("name", qat.__all__)
def test_every_public_name_is_there_and_explained(name):
    assert name in dir(qat)
    assert getattr(qat, name).__doc__


def test_the_readmes_first_lines_run(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(snippet.replace("meta-llama/Llama-2-7b-hf", str(tiny_directory)), {})
    assert (tmp_path / "student" / "quant_config.json").is_file()


def run_example(name, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name))


def test_a_loop_of_ones_own(tiny_directory, tmp_path, monkeypatch, capsys):
    output = tmp_path / "student"
    run_example("own_loop.py", tiny_directory, output, "--steps=16", "--lr=1e-3", monkeypatch=monkeypatch)
    assert "step 16: KL to the teacher" in capsys.readouterr().out
    teacher, trained = tiny_model(tie_word_embeddings=False), simulated.load(str(output), torch.float32)
    torch.manual_seed(1)
    tokens = teacher.generate(torch.tensor([[5]]), do_sample=True, min_length=200, max_length=200, pad_token_id=0)
    untrained = qat.prepare(tiny_model(tie_word_embeddings=False), simulated.read(output)[0])
    targets = qat.TeacherTargets.of(teacher, tokens)
    with torch.no_grad():
        before, after = (qat.Distiller(student)(tokens, targets)[1] for student in (untrained, trained))
    assert after < before
    trained = simulated.load(str(output), torch.float32)
    assert torch.equal(qat.load(str(output))(tokens).logits, trained(tokens).logits)


def test_the_trainer_of_hugging_face(tiny_directory, tmp_path, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    run_example(
        "hf_trainer.py", tiny_directory, tmp_path / "text", tmp_path / "out", "--steps=3", monkeypatch=monkeypatch
    )
    trained = simulated.load(str(tmp_path / "out"), torch.float32).lm_head.weight
    assert not torch.equal(trained, AutoModelForCausalLM.from_pretrained(tiny_directory).lm_head.weight)


def test_a_student_is_saved_beside_its_name_on_the_hub(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_download", lambda name: str(tiny_directory))
    student = qat.prepare(tiny_model(tie_word_embeddings=False), qat.QuantConfig())
    qat.save(student, tmp_path / "student", source="owner/model")
    assert qat.load(tmp_path / "student")


def test_what_is_not_prepared_or_is_so_already_is_refused(tiny_directory, tmp_path):
    model = tiny_model()
    with pytest.raises(UserError, match="not quantized"):
        qat.save(model, tmp_path / "student", source=tiny_directory)
    qat.prepare(model, qat.QuantConfig())
    with pytest.raises(UserError, match="already prepared"):
        qat.prepare(model, qat.QuantConfig())


def test_what_would_train_something_else_in_silence_is_refused():
    """A second row, autocast's dtypes, and the fp16 that older models come in."""
    teacher, student = tiny_model(), qat.Distiller(qat.prepare(tiny_model(), qat.QuantConfig()))
    ids = torch.randint(2, 300, (2, 12))
    with pytest.raises(UserError, match=r"2 rows: give one sequence \[1, tokens\]"):
        qat.TeacherTargets.of(teacher, ids)
    targets = qat.TeacherTargets.of(teacher, ids[:1])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="Autocast would change"):
        student(ids[:1], targets)
    with pytest.raises(UserError, match="in fp16, whose range is too small"):
        qat.Distiller(tiny_model().half())


def test_a_distiller_takes_gradient_checkpointing_as_a_model_does():
    teacher, ids = tiny_model(), torch.randint(2, 300, (1, 12))
    gradients = []
    for checkpointing in (False, True):
        distiller = qat.Distiller(qat.prepare(tiny_model(), qat.QuantConfig())).train()
        if checkpointing:
            distiller.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        distiller(ids, qat.TeacherTargets.of(teacher, ids))[0].backward()
        gradients.append(distiller.student.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


def test_a_model_that_was_frozen_for_inference_alone_is_not_saved(tiny_directory, tmp_path):
    student = qat.prepare(tiny_model(tie_word_embeddings=False), qat.QuantConfig())
    qat.freeze(student, keep_values=False)
    with pytest.raises(UserError, match="frozen without its values"):
        qat.save(student, tmp_path / "student", source=tiny_directory)
    assert not (tmp_path / "student").exists()
