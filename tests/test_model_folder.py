"""A model folder: whatever transformers computes from it, every command computes; what is not whole, none touches."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import error_of, generate_flags
from faults import WEIGHTS, change_weights, edit, odd
from make_fixtures import FIXTURES
from safetensors.torch import load_file, save_file
from tiny import ids, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

import qat
from qat.export import export
from qat.export.formats import FAKE, GGUF
from qat.infer import simulated
from qat.ptq import writer
from qat.ptq.rtn import RTN
from qat.ptq.stream import Stream
from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.store import models, student_folder
from qat.store.compressed_tensors import INT_QUANTIZED, PACK_QUANTIZED
from qat.store.model_folder import ModelFolder
from qat.store.sidecars import GRIDS_FILE, STEPS_FILE
from qat.store.weight_files import BIN, BIN_INDEX, INDEX, stored_tensors, weight_files, weights_size

FULL = QuantConfig(16, 16, 16)
RECORD = {"method": "none"}


def own_head(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=True)


def without_head(weights: dict) -> dict:
    """As AutoModel saves it."""
    return {name.removeprefix("model."): weight for name, weight in weights.items() if name != "lm_head.weight"}


def stale_index(folder: Path) -> None:
    """The index of another save, whose file is there too: transformers reads model.safetensors."""
    shutil.copy(folder / WEIGHTS, folder / "old.safetensors")
    change_weights(folder, lambda weights: {name: weight * 2 for name, weight in weights.items()}, "old.safetensors")
    weight_map = dict.fromkeys(load_file(folder / WEIGHTS), "old.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def two_names(weights: dict) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def under_the_other_name(weights: dict) -> None:
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


def named_in_the_config(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")


def in_bin(folder: Path) -> None:
    """PyTorch's own format, as LLaMA-1 came: two weights of one memory."""
    weights = load_file(folder / WEIGHTS)
    embedding = weights["model.embed_tokens.weight"]
    joint = torch.cat([weights["lm_head.weight"], embedding])
    weights |= {"lm_head.weight": joint[: len(embedding)], "model.embed_tokens.weight": joint[len(embedding) :]}
    torch.save(weights, folder / BIN)
    (folder / WEIGHTS).unlink()


def in_bins(folder: Path) -> None:
    """In two files, one of them in the format before PyTorch 1.6."""
    names = list(weights := load_file(folder / WEIGHTS))
    parts = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
    for file, held in parts.items():
        old = {"_use_new_zipfile_serialization": file != "pytorch_model-1.bin"}
        torch.save({name: weights[name] for name in held}, folder / file, **old)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def beside_bin(folder: Path) -> None:
    """Another model's: transformers reads model.safetensors."""
    torch.save({name: weight * 2 for name, weight in load_file(folder / WEIGHTS).items()}, folder / BIN)


TIED = {"tie_word_embeddings": True}
SOUND = {
    "odd": (odd, {}),
    "own head": (own_head, {}),
    "head equal to the embedding": (lambda folder: change_weights(folder, two_names), TIED),
    "head for the embedding": (lambda folder: change_weights(folder, under_the_other_name), TIED),
    "saved without head": (lambda folder: change_weights(folder, without_head), TIED),
    "stale index": (stale_index, {}),
    "named in the config": (named_in_the_config, {}),
    "null quantization": (lambda folder: edit(folder / "config.json", quantization_config=None), {}),
    "PyTorch's format": (in_bin, {}),
    "PyTorch's format in two files": (in_bins, {}),
    "PyTorch's format beside": (beside_bin, {}),
    "half precision": (lambda folder: change_weights(folder, lambda w: {n: t.half() for n, t in w.items()}), {}),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("trait", SOUND)
def test_every_way_computes_what_transformers_computes(trait, tmp_path):
    """Loaded, written by a post-training method that changes nothing, packed, exported."""
    change, config = SOUND[trait]
    model = tmp_path / "model"
    tiny_model(**({"tie_word_embeddings": False} | config)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    change(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = ids(reference)
    expected = reference(tokens).logits
    assert models.resolve_full_precision(str(model)) == str(model)
    assert torch.equal(models.load(str(model), torch.float32)(tokens).logits, expected)
    found = ModelFolder.read(model)
    for name, write in (
        ("rtn", lambda output: RTN(model, None).write(output, FULL, [])),
        ("layers", lambda output: writer.write(Stream(model, FULL, [tokens]), output, unchanged)),
    ):
        with writer.appearing(found, tmp_path / name, FULL, RECORD) as output, torch.no_grad():
            write(output)
        assert torch.equal(simulated.load(str(tmp_path / name), torch.float32)(tokens).logits, expected), name
        assert torch.equal(qat.load(str(tmp_path / name))(tokens).logits, expected), name
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        assert torch.equal(ours(tokens).logits, expected), name
    export.export(student_folder.find(tmp_path / "rtn"), tmp_path / "export", FAKE)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(exported(tokens).logits, expected)


@pytest.mark.parametrize("trait", ["own head", "head equal to the embedding"])
@pytest.mark.parametrize("form", [PACK_QUANTIZED, FAKE])
def test_an_export_says_whether_its_head_is_its_own(trait, form, tmp_path):
    """By config.json vLLM and transformers read one; transformers reads the same model from it."""
    change, config = SOUND[trait]
    model = tmp_path / "model"
    tiny_model(**({"tie_word_embeddings": False} | config)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    change(model)
    QuantConfig(8, 16, 16).save(model)
    export.export(student_folder.find(model), tmp_path / "export", form)
    says = json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"]
    assert says == ("lm_head.weight" not in stored_tensors(tmp_path / "export")) == (trait != "own head")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32, attn_implementation="sdpa")
    ours = simulated.load(str(model), torch.float32)
    torch.testing.assert_close(theirs(ids(ours)).logits, ours(ids(ours)).logits, atol=1e-3, rtol=1e-3)


def unchanged(stream, weights):
    return weights, {}, ""


def no_head(weights: dict) -> None:
    del weights["lm_head.weight"]


def not_a_number(weights: dict) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][5] = torch.nan


def no_layer(weights: dict) -> dict:
    return {name: weight for name, weight in weights.items() if ".layers.1." not in name}


def another_process_s(weights: dict) -> dict:
    return {f"module.{name}": weight for name, weight in weights.items()}


def cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def twice(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "more.safetensors")
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    weight_map = dict.fromkeys(names, "one.safetensors") | {names[0]: "more.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bin_cut_short(folder: Path) -> None:
    in_bin(folder)
    os.truncate(folder / BIN, 5000)


class Planted:
    def __reduce__(self):
        return print, ("run",)


def with_code(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS) | {"planted": Planted()}, folder / BIN)
    (folder / WEIGHTS).unlink()


def no_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")


UNSOUND = {
    "no head": (lambda f: change_weights(f, no_head), "it lacks lm_head.weight. Copy"),
    "no layer": (lambda f: change_weights(f, no_layer), "it lacks model.layers.1.input_layernorm.weight and 8 more"),
    "prefix": (lambda f: change_weights(f, another_process_s), "holds module.lm_head.weight and 20 more"),
    "bias": (
        lambda f: change_weights(f, lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)})),
        "does not describe model.layers.0.mlp.up_proj.bias",
    ),
    "shape": (
        lambda f: edit(f / "config.json", vocab_size=302),
        "embed_tokens.weight is [300, 64], and should be [302, 64]",
    ),
    "codes": (
        lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.int8)})),
        "stores lm_head.weight as I8",
    ),
    "cut short": (cut_short, "is damaged"),
    "PyTorch's format cut short": (bin_cut_short, "pytorch_model.bin is damaged"),
    "code": (with_code, "would run code (print)"),
    "twice": (twice, "twice, in more.safetensors and in one.safetensors"),
    "no index": (no_index, "has no weights (model.safetensors or model.safetensors.index.json or pytorch_model.bin or"),
    "field": (lambda f: edit(f / "config.json", vocab_size="many"), "'vocab_size' expected int, got str"),
    "padding": (lambda f: edit(f / "config.json", pad_token_id=300), "describes no model: Padding_idx must be within"),
    "not finite": (
        lambda f: change_weights(f, not_a_number),
        "not finite, in model.layers.1.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("damage", UNSOUND)
def test_no_command_takes_a_model_that_is_not_whole(damage, folder, tiny_data, tmp_path, monkeypatch):
    """One sentence, before anything is written. Whether numbers are finite is known when they are read."""
    change, said = UNSOUND[damage]
    change(folder)
    output = tmp_path / "output"
    shards = [f"--model={folder}", f"--data={tiny_data}", f"--output={output}"]
    commands = {
        "evaluate": [f"--model={folder}", f"--text={Path(__file__)}", "--window=32", "--windows=1"],
        "generate": generate_flags(folder, tmp_path / "shards"),
        "quantize": [*shards[::2], "--method=rtn"],
    }
    if damage != "not finite":
        commands |= {"train": shards, "cache_teacher": shards}
    if damage in ("field", "padding"):
        commands |= {"plan": [f"--model={folder}"]}
    for script, flags in commands.items():
        assert said in error_of(monkeypatch, script, *flags), script
        assert not output.exists()
        assert not (tmp_path / "shards").exists()
    with pytest.raises(UserError, match=re.escape(said)):
        models.load(str(folder), torch.float32)


def test_numbers_that_are_not_finite_are_found_where_they_are_read(folder, tiny_data, tmp_path, monkeypatch):
    """By whatever reads a layer, or copies it, without a forward pass of its own."""
    change, said = UNSOUND["not finite"]
    change(folder)
    output = tmp_path / "output"
    flags = [f"--model={folder}", f"--data={tiny_data}", f"--output={output}"]
    for method in ("gptq", "smoothquant"):
        assert said in error_of(monkeypatch, "quantize", *flags, f"--method={method}"), method
        assert not output.exists()
        shutil.rmtree(tmp_path / "output.partial")  # the first layer is sound, and would be gone on with
    QuantConfig().save(folder)
    export = [f"--checkpoint={folder}", f"--output={output}", "--verify=false"]
    for form in (PACK_QUANTIZED, INT_QUANTIZED, FAKE, GGUF):
        assert said in error_of(monkeypatch, "export", *export, f"--format={form}"), form
        assert not output.exists()


@pytest.mark.parametrize("form", [PACK_QUANTIZED, INT_QUANTIZED])
def test_a_quantized_folder_that_is_not_ours_is_what_transformers_makes_of_it(form, tmp_path):
    """In a layout that we write too, as llm-compressor's folders are: without quant_config.json."""
    folder = Path(shutil.copytree(FIXTURES / "v1" / f"export-{form}", tmp_path / "model"))
    (folder / CONFIG_FILE).unlink()
    tokens = torch.arange(40, 52)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert models.resolve(str(folder)) == str(folder)
    torch.testing.assert_close(simulated.load(str(folder), torch.float32)(tokens).logits, expected)
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    change_weights(folder, lambda weights: {name: weight for name, weight in weights.items() if name != scale})
    for read in (lambda: models.resolve(str(folder)), lambda: models.load(str(folder), torch.float32)):
        with pytest.raises(UserError, match=f"it lacks {scale}"):
            read()


def test_transformers_reads_the_same_files(folder):
    """The rule is written here once more: when transformers changes it, this says so."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    sound = shutil.copytree(folder, folder.with_name("sound"))
    for change in (lambda _: None, beside_bin, stale_index, named_in_the_config, in_bins, in_bin):
        shutil.rmtree(folder)
        shutil.copytree(sound, folder)
        change(folder)
        named = json.loads((folder / "config.json").read_text()).get("transformers_weights")
        theirs, _ = _get_resolved_checkpoint_files(
            str(folder), variant=None, gguf_file=None, use_safetensors=None, user_agent={}, is_remote_code=False,
            transformers_explicit_filename=named,
        )  # fmt: skip
        theirs = [theirs] if isinstance(theirs, str) else theirs
        assert [str(file) for file in weight_files(folder)] == theirs
        assert weights_size(folder) == sum(Path(file).stat().st_size for file in theirs)


def test_what_lies_beside_the_weights_is_accounted_for_too(folder, tmp_path):
    """Steps of activations, grids of GPTQ: without one of them, other numbers would take its place."""
    QuantConfig(a_quantizer="lsq").save(folder)
    save_file({"model.layers.0.mlp.up_proj.input_step": torch.ones(1)}, folder / STEPS_FILE)
    with pytest.raises(UserError, match=rf"{STEPS_FILE} lacks model.layers.0.mlp.down_proj"):
        simulated.load(str(folder), torch.float32)
    QuantConfig().save(folder)
    (folder / "ptq.json").write_text('{"method": "gptq"}')
    with pytest.raises(UserError, match=rf"{GRIDS_FILE} lacks model.layers.0.mlp.down_proj"):
        simulated.load(str(folder), torch.float32)


def test_a_student_without_its_settings_is_no_full_precision_model(folder, tmp_path):
    qat.save(prepare(models.load(str(folder), torch.float32), QuantConfig()), tmp_path / "final", source=folder)
    with writer.appearing(ModelFolder.read(folder), tmp_path / "rtn", QuantConfig(), RECORD) as output:
        RTN(folder, None).write(output, QuantConfig(), [])
    for student in (tmp_path / "final", tmp_path / "rtn"):
        export.export(student_folder.find(student), export_ := tmp_path / f"{student.name}-export", FAKE)
        assert models.resolve(str(export_)) == str(export_)  # its values are rounded: a model like any other
        (student / CONFIG_FILE).unlink()
        for read in (models.resolve, models.resolve_full_precision, lambda name: simulated.load(name, torch.float32)):
            with pytest.raises(UserError, match=f"{CONFIG_FILE}, which says how it is quantized, is missing"):
                read(str(student))


def test_a_student_has_the_tokenizer_of_its_teacher(folder, tiny_data, tmp_path, monkeypatch):
    """What it ends with is the student's own."""
    student = shutil.copytree(folder, tmp_path / "student")
    QuantConfig().save(student)
    tiny_tokenizer("quite another text, of which other tokens are made " * 9).save_pretrained(student)
    flags = [f"--model={folder}", f"--student={student}", f"--data={tiny_data}", f"--output={tmp_path / 'output'}"]
    message = error_of(monkeypatch, "train", *flags, "--batch_size=2")
    assert f"{folder} and the student {student} have different tokenizers" in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whoever_the_umask_lets_reads_the_weights(umask, folder, tmp_path):
    before = os.umask(umask)
    try:
        with writer.appearing(ModelFolder.read(folder), tmp_path / "out", FULL, RECORD) as output:
            writer.write(Stream(folder, FULL, []), output, unchanged)
        export.export(student_folder.find(tmp_path / "out"), tmp_path / "export", FAKE)
    finally:
        os.umask(before)
    files = [*(tmp_path / "out").iterdir(), *(tmp_path / "export").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_generation_equals_the_full_forward_pass_whatever_the_folder_says_of_caches(folder):
    QuantConfig().save(folder)
    tokens = ids(qat.load(str(folder)))[:, :6]
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = simulated.load(str(folder), torch.float32).generate(tokens, use_cache=False, **how)

    def check(**more) -> None:
        assert torch.equal(qat.load(str(folder)).generate(tokens, **how, **more), expected)

    edit(folder / "generation_config.json", use_cache=False, cache_implementation="static")
    check()
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", use_cache=False)
    check()
    check(use_cache=False)
    check(generation_config=GenerationConfig(use_cache=False))


def test_a_dtype_has_one_name_in_what_is_written(folder):
    """Hub models of before 2025 have "torch_dtype", which some engines read."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    written = json.loads(ModelFolder.read(folder).companions()["config.json"])
    assert (written["dtype"], "torch_dtype" in written) == (config["torch_dtype"], False)


def test_a_student_s_record_is_not_taken_over(folder, tmp_path):
    """What was made by a post-training method, and trained on, is no longer its output."""
    (folder / "ptq.json").write_text('{"method": "gptq"}')
    QuantConfig().save(folder)
    assert not {"ptq.json", CONFIG_FILE, INDEX} & ModelFolder.read(folder).companions().keys()
