"""Files that llama.cpp serves, of any origin: measured alike, and quantized as its own program does."""

import importlib.metadata
import json

import gguf
import numpy as np
import pytest
import torch
from commands import ROOT
from gguf import GGMLQuantizationType as Type
from students import write_student
from tiny import TEXT, tiny_model, tiny_tokenizer

from launch import evaluate
from qat.evaluate import llama_cpp, llama_quantize
from qat.evaluate.llama_cpp import Engine, Vocabulary
from qat.export import export
from qat.export.formats import GGUF
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError
from qat.store import gguf_files, student_folder
from qat.store.compressed_tensors import INT_QUANTIZED

CACHES = ("f16", "q8_0/q4_0")
HOW = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a student and its export."""
    folder = tmp_path_factory.mktemp("served")
    tiny_model(**HOW).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    student = write_student(folder / "final", QuantConfig(4, 8, 16), **HOW)
    export.export(student, folder / "export", GGUF)
    export.export(student, folder / "integers", INT_QUANTIZED)
    return folder


def measured(monkeypatch, folder, *flags) -> dict:
    folder.joinpath("found.json").unlink(missing_ok=True)
    flags += (f"--teacher={folder / 'teacher'}", f"--text={ROOT / 'LICENSE'}", "--window=64", "--windows=3")
    flags += (f"--output={folder / 'found.json'}", "--engine=llama.cpp")
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    evaluate.main()
    return json.loads(folder.joinpath("found.json").read_text())


def test_a_student_its_export_and_its_file_are_measured_alike(folder, monkeypatch):
    where = [folder / "final", folder / "export", folder / "export" / gguf_files.FILE]
    found = [measured(monkeypatch, folder, f"--model={path}", f"--cache={','.join(CACHES)}") for path in where]
    text = ROOT / "LICENSE"
    assert [*found[0]["texts"]] == [f"{text}, {cache} cache" for cache in CACHES]
    for other in found[1:]:
        assert other["texts"] == found[0]["texts"]
        assert other["served"]["file_MB"] == found[0]["served"]["file_MB"]
        assert other["served"]["tokens_per_second"].keys() == set(CACHES)
    exact, rounded = found[0]["texts"].values()
    assert exact["nll"] != rounded["nll"], "the cache is another"


def test_a_full_precision_model_is_itself_in_llama_cpp_and_fewer_bits_are_farther(folder, monkeypatch):
    kl, sizes = {}, {}
    for method in ("as_is", *llama_quantize.KINDS):
        found = measured(monkeypatch, folder, f"--model={folder / 'teacher'}", f"--method={method}")
        (score,) = found["texts"].values()
        kl[method], sizes[method] = score["kl"], found["served"]["file_MB"]
    assert kl["as_is"] < 1e-4
    assert kl["q4_0"] > kl["q4_k_m"] > 10 * kl["as_is"]
    assert sizes["q4_0"] < sizes["q4_k_m"] < sizes["as_is"] / 3


@pytest.mark.parametrize("kind", llama_quantize.KINDS)
def test_each_tensor_has_the_type_and_the_bytes_of_llama_cpp(kind, folder, tmp_path):
    """Layers 0 and 7 of 8 and every third between, 3 and 6, have more bits; what 256 does not divide, a type of 32."""
    model = tiny_model(**HOW | {"num_hidden_layers": 8, "intermediate_size": 96})
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    gguf_files.write(student_folder.full_precision(str(tmp_path)), tmp_path)
    llama_quantize.quantize_file(tmp_path / gguf_files.FILE, tmp_path / "small.gguf", kind)
    source, made = (gguf.GGUFReader(tmp_path / name) for name in (gguf_files.FILE, "small.gguf"))
    types = {tensor.name: tensor.tensor_type for tensor in made.tensors}
    usual = Type.Q4_0 if kind == "q4_0" else Type.Q4_K
    assert types["token_embd.weight"] == Type.Q6_K
    assert types["blk.3.attn_q.weight"] == usual
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == Type.F32
    more = [layer for layer in range(8) if types[f"blk.{layer}.attn_v.weight"] == Type.Q6_K]
    assert more == ([] if kind == "q4_0" else [0, 3, 6, 7])
    narrow = [types[f"blk.{layer}.ffn_down.weight"] for layer in (0, 1)]
    assert narrow == ([Type.Q4_0] * 2 if kind == "q4_0" else [Type.Q8_0, Type.Q5_0])
    by_name = {tensor.name: tensor.data for tensor in source.tensors}
    for tensor in made.tensors:
        if tensor.tensor_type in (Type.Q4_0, Type.Q5_0, Type.Q8_0):
            assert np.array_equal(tensor.data, gguf.quants.quantize(by_name[tensor.name], tensor.tensor_type))
    kept = {key: field.contents() for key, field in source.fields.items() if key != "general.file_type"}
    assert all(made.fields[key].contents() == value for key, value in kept.items() if not key.startswith("GGUF."))
    with Engine(tmp_path / "small.gguf", 8) as engine:
        assert engine.logits(torch.arange(20, 28)).isfinite().all()


@pytest.mark.parametrize("kind", llama_quantize.KINDS)
def test_widths_that_no_block_divides_are_refused(kind, tmp_path):
    tiny_model(**HOW | {"intermediate_size": 80}).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    gguf_files.write(student_folder.full_precision(str(tmp_path)), tmp_path)
    with pytest.raises(UserError, match=r"ffn_down\.weight is 80 wide, .* leave --method out"):
        llama_quantize.quantize_file(tmp_path / gguf_files.FILE, tmp_path / "small.gguf", kind)


def test_without_llama_cpp_nothing_is_begun(folder, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(llama_cpp.importlib.metadata, "version", missing)
    monkeypatch.setattr(evaluate, "_subject", pytest.fail)
    llama_cpp.library.cache_clear()
    with pytest.raises(UserError, match=r"not installed here: pip install xllamacpp=="):
        measured(monkeypatch, folder, f"--model={folder / 'final'}")
    llama_cpp.library.cache_clear()


def test_llama_cpps_tokens_are_the_tokenizers(folder):
    vocabulary, tokenizer = Vocabulary(folder / "export" / gguf_files.FILE), tiny_tokenizer()
    assert vocabulary.size == 300
    assert vocabulary(TEXT).input_ids == tokenizer(TEXT, add_special_tokens=False).input_ids
    assert vocabulary("").input_ids == []


def test_a_teacher_that_reads_otherwise_is_refused(folder, monkeypatch, tmp_path):
    tiny_model(**HOW).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer("another text, of which other tokens are made " * 9).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"tokenize .*LICENSE differently: give the model that the file was made from"):
        measured(monkeypatch, tmp_path, f"--model={folder / 'export'}")
    tiny_model(**HOW | {"vocab_size": 400}).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"vocabulary of 400 tokens, .* of 300"):
        measured(monkeypatch, tmp_path, f"--model={folder / 'export'}")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model=final", "--cache=q4_2"], "cache=q4_2 has the type 'q4_2'"),
        (["--model=final", "--cache=f16,q8_0/q4"], r"the type .q4., .* choose f32, f16"),
        (["--model=export", "--method=q4_0"], "is a GGUF file: leave --method out"),
        (["--model=export", "--text=dialogues"], "dialogues .* cannot be measured: leave it out"),
        (["--model=final", "--method=rtn"], "leave out --tasks and --method rtn"),
        (["--model=final", "--method=q4_0"], "is quantized already"),
        (["--model=teacher", "--cache=f16", "--engine=torch"], "give --engine llama.cpp"),
        (["--model=export/model.gguf", "--engine=torch"], r"model\.gguf is a GGUF file: give --engine llama\.cpp"),
        (["--model=teacher", "--method=q4_0", "--w_bits=3"], "do not apply to teacher, .* as llama.cpp's q4_0: leave"),
        (["--model=integers"], "integers is an integer export: give the student"),
        (["--model=teacher", "--method=q4_k_m", "--engine=torch"], "give --engine llama.cpp"),
    ],
)
def test_refusals(flags, named, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--engine=llama.cpp", "--windows=1", "--window=64", *flags])
    with pytest.raises(UserError, match=named):
        evaluate.main()
