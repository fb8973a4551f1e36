"""What comes in through the doors: whatever lies in a folder, a command computes what transformers computes from the
same files, or says in one sentence what is wrong."""

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import qat
from datagen import decoder
from datagen.generate import Vocabulary
from launch import plan, train
from qat.data.sequences import Row, Sample
from qat.export import export
from qat.export.formats import FAKE
from qat.infer import simulated
from qat.ptq import METHODS, writer
from qat.ptq.stream import Stream
from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.number_format import quantize
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError
from qat.store import gguf_files, models, rotate, student_folder
from qat.store.compressed_tensors import PACK_QUANTIZED
from qat.store.model_folder import BASE_MODEL, ModelFolder, read_config
from qat.store.sidecars import GRIDS_FILE, STEPS_FILE, save_grids, save_steps
from qat.store.weight_files import BIN, BIN_INDEX, INDEX
from qat.train import deepspeed_json, run
from qat.train.distill import TeacherTargets
from qat.train.teacher_cache import TeacherCache, entry_of

WEIGHTS = "model.safetensors"
FULL = QuantConfig(16, 16, 16)
IDS = torch.arange(40, 52)[None]
Damage = tuple[str, ...]

SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}


def bounded(examples: int):
    """The same examples each time; more of them for the slow run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- what is done to a folder


VALUES = st.sampled_from([None, True, -1, 0, 1, 3, 2**40, 0.5, 1e-30, "x", "", "4", "gelu", [], [1], {}, {"a": 1}])
FIELDS = [
    *sorted(set(inspect.signature(LlamaConfig).parameters) - {"kwargs", "num_hidden_layers"}),
    *("is_causal", "is_encoder_decoder", "layer_types", "model_type", "quantization_config", "rope_scaling"),
    *("sliding_window", "transformers_weights"),
]
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", *ROPE_INIT_FUNCTIONS, "axial", None])},
    optional={
        "rope_theta": st.sampled_from([10000.0, 0, "x"]),
        "factor": st.sampled_from([2.0, 0.5, None, "x"]),
        "original_max_position_embeddings": st.sampled_from([128, 8, None]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.just(4.0),
        "short_factor": st.sampled_from([[1.0] * 8, [1.0]]),
        "long_factor": st.just([2.0] * 8),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
        "attention_factor": st.just(2.0),
    },
)
NAMES = st.sampled_from(
    ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
DTYPES = st.sampled_from(["bfloat16", "float16", "float64", "int8", "bool"])
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS, BIN]
OF_BYTES = ["cut", "flip", "insert", "zeros", "delete", "directory"]
DAMAGES = st.one_of(
    st.tuples(st.just("config"), st.sampled_from(FIELDS), VALUES),
    st.tuples(st.just("config"), st.just("rope_parameters"), ROPES),
    st.tuples(st.just("generation"), st.sampled_from(["eos_token_id", "pad_token_id", "cache_implementation"]), VALUES),
    st.tuples(st.just("bytes"), st.sampled_from(FILES), st.sampled_from(OF_BYTES), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("weights"), st.sampled_from(["drop", "prefix", "twice", "wider", "turn"]), NAMES, st.booleans()),
    st.tuples(st.just("dtype"), NAMES | st.just(""), DTYPES, st.booleans()),
    st.tuples(st.just("files"), st.sampled_from(["index", "no index", "missing", "stray", "metadata"]), st.booleans()),
)


def write_weights(folder: Path, weights: dict, pickled: bool) -> None:
    (folder / WEIGHTS).unlink()
    if pickled:
        torch.save(weights, folder / BIN)
    else:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)


def set_field(file: Path, field: str, value) -> None:
    content = json.loads(file.read_text()) | {field: value}
    if field == "rope_scaling":
        del content["rope_parameters"]
    file.write_text(json.dumps(content))


def damage_bytes(file: Path, how: str, where: float) -> None:
    content = file.read_bytes()
    place = int(where * len(content))
    file.unlink()
    if how == "directory":
        file.mkdir()
    elif how != "delete":
        byte = bytes([content[place] ^ 4])
        changed = {"cut": b"", "flip": byte + content[place + 1 :], "insert": byte + content[place:]}
        file.write_bytes(content[:place] + changed.get(how, bytes(20) + content[place + 20 :]))


def damage_weights(weights: dict, how: str, name: str) -> dict:
    weight = weights[name]
    return {
        "drop": lambda: {other: w for other, w in weights.items() if other != name},
        "prefix": lambda: {f"module.{other}": w for other, w in weights.items()},
        "twice": lambda: weights | {f"module.{name}": weight.clone()},
        "wider": lambda: weights | {name: torch.cat([weight, weight[:1]])},
        "turn": lambda: weights | {name: weight.t().clone()},
    }[how]()


def lay_out(folder: Path, weights: dict, how: str, pickled: bool) -> None:
    """In two files, with an index or what is left of one."""
    (folder / WEIGHTS).unlink()
    suffix, index = (".bin", BIN_INDEX) if pickled else (".safetensors", INDEX)
    names = list(weights)
    weight_map = {name: f"part-{number > 5}{suffix}" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        held = {name: weights[name].clone() for name in names if weight_map[name] == file}
        (torch.save if pickled else save_file)(held, folder / file)
    if how == "missing":
        (folder / f"part-True{suffix}").unlink()
    if how == "stray":
        weight_map[names[0]] = 7
    if how != "no index":
        metadata = None if how == "metadata" else {}
        (folder / index).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def inflict(folder: Path, damage: Damage) -> None:
    kind, *how = damage
    if kind in ("config", "generation"):
        set_field(folder / ("config.json" if kind == "config" else "generation_config.json"), *how)
    elif kind == "bytes":
        if how[0] == BIN:
            write_weights(folder, load_file(folder / WEIGHTS), pickled=True)
        damage_bytes(folder / how[0], *how[1:])
    elif kind == "weights":
        write_weights(folder, damage_weights(load_file(folder / WEIGHTS), *how[:2]), how[2])
    elif kind == "dtype":
        weights, dtype = load_file(folder / WEIGHTS), getattr(torch, how[1])
        changed = [how[0]] if how[0] else list(weights)
        write_weights(folder, weights | {name: weights[name].to(dtype) for name in changed}, how[2])
    else:
        lay_out(folder, load_file(folder / WEIGHTS), *how)


# ---- how each command reads


def checked(folder: Path) -> Path:
    """What all of them begin with."""
    directory = models.resolve_full_precision(str(folder))
    config = read_config(directory)
    models.check_length(config, IDS.shape[1], "text")
    models.check_ids(config, int(IDS.max()), "text")
    return Path(directory)


def logits(model) -> torch.Tensor:
    return model(IDS).logits


def evaluate(folder: Path) -> torch.Tensor:
    return logits(simulated.load(str(checked(folder)), torch.float32))


def generate(folder: Path) -> torch.Tensor:
    length = IDS.shape[1]
    decoder.check(read_config(str(checked(folder))), length)
    Vocabulary.of(models.load_tokenizer(str(folder)), str(folder))
    slot = decoder.Decoder(models.load(str(folder), torch.float32), 1, length)
    return torch.stack([slot.step(IDS[0, i : i + 1], torch.tensor([i])).logits.clone() for i in range(length)], 1)


def quantized(folder: Path) -> torch.Tensor:
    found, output = ModelFolder.read(checked(folder)), folder.with_name("quantized")
    with writer.appearing(found, output, FULL, {}) as partial:
        writer.write(Stream(folder, FULL, [IDS]), partial, lambda stream, weights: (weights, {}, ""))
    return logits(simulated.load(str(output), torch.float32))


def trained(folder: Path) -> torch.Tensor:
    found = ModelFolder.read(checked(folder))
    prepare(found.skeleton(), QuantConfig())
    found.companions()
    model = models.load(str(folder), torch.float32)
    models.renew_rope(model)
    return logits(model)


def exported(folder: Path) -> torch.Tensor:
    found, student, output = ModelFolder.read(checked(folder)), folder.with_name("rtn"), folder.with_name("export")
    with writer.appearing(found, student, FULL, {}) as partial:
        METHODS["rtn"](folder, None).write(partial, FULL, [])
    export.export(student_folder.find(student), output, FAKE)
    return logits(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, attn_implementation="sdpa"))


def chat(folder: Path) -> torch.Tensor:
    folder = Path(shutil.copytree(checked(folder), folder.with_name("student")))
    FULL.save(folder)
    model = qat.load(str(folder))
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False)
    return logits(model)


def planned(folder: Path) -> None:
    way = deepspeed_json.read(ROOT / "ds_configs" / "zero3.json")
    plan.plan.training(plan.config_of(str(folder)), way, way, plan.Machine(), 128)


def rotated(folder: Path) -> torch.Tensor | None:
    found, output = ModelFolder.read(checked(folder)), folder.with_name("rotated")
    rotation, matrices = rotate.rotation_for(found.config, "none", False), rotate.draw(found.config, "random", 0)
    rotate.write(found, output, rotation, matrices, {BASE_MODEL: str(folder)})
    answer = logits(simulated.load(str(output), torch.float32))
    is_exact = all(place.dtype in ("F32", "F64") for place in found.places.values())
    return answer if is_exact else None  # rounded to the dtype of the file


def cached(folder: Path) -> torch.Tensor:
    """As launch/cache_teacher.py does, without DeepSpeed."""
    checked(folder)
    models.load_tokenizer(str(folder))
    sample, cache = Sample(0, torch.cat([IDS, IDS[:, :1]], 1)), TeacherCache(folder.with_name("cache"))
    targets = TeacherTargets.of(models.load(str(folder), torch.float32), sample.input_ids)
    cache.record({"top_k": 0})
    cache.write_head(targets.head)
    cache.write(0, [entry_of(targets, 0)])
    return torch.cat([*cache(Row.of(sample)).logits(IDS.shape[1])])[None]


def served(folder: Path) -> torch.Tensor:
    """As GGUF."""
    output, full = folder.with_name("gguf"), student_folder.full_precision(str(checked(folder)))
    gguf_files.check(full)
    if gguf_files.max_positions(full_config := read_config(str(folder))) < IDS.shape[1]:
        models.check_length(full_config, IDS.shape[1], "text")
    output.mkdir()
    gguf_files.write(full, output)
    return logits(gguf_files.load(output))


DOORS: dict[str, Callable[[Path], torch.Tensor | None]] = {
    door.__name__: door
    for door in (evaluate, generate, quantized, trained, exported, planned, chat, rotated, cached, served)
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("doors") / "model"
    tiny_model(tie_word_embeddings=False, **SIZES).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def refusal(read: Callable[[Path], object], folder: Path) -> str:
    """The sentence in which ``read`` says what is wrong, empty if it says nothing; any other exception is a fault."""
    try:
        read(folder)
    except UserError as error:
        return str(error) if "\n" not in str(error) else pytest.fail(str(error))
    return ""


MORE_THAN_TRANSFORMERS = (
    r"generation_config\.json (cannot be read|has eos_token_id)",
    r"[Tt]okenizer of .* (cannot be read|splits text)|tokenizer\.json is damaged",
    r"stores .* is expected: give the full-precision model",
    r"has (dtype|is_causal|is_encoder_decoder|max_position_embeddings)=",  # dtype: transformers was told one
    r"is quantized already",
    r"is longer than the \d+ positions|contains token id",
    r"where llama\.cpp|not mapped to (GGUF|llama\.cpp)",
    r"rotates all positions differently",
    r"RoPE's angles are not finite",  # of which torch's attention on CPUs makes zeros
    r"module 'torch' has no attribute",  # dtype, which it was told
)
"""Why a door may refuse a model that transformers computes: it needs more of the folder than the logits do."""


def by_transformers(folder: Path) -> torch.Tensor | None:
    """What it computes from files that are whole to it; None if it cannot."""
    try:
        model, account = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
        found = logits(model)
    except Exception:
        return None
    is_whole = not any(account[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    return found if is_whole else None


def files_of(folder: Path) -> dict[str, bytes | None]:
    return {file.name: None if file.is_dir() else file.read_bytes() for file in folder.iterdir()}


def check_doors(model: Path, damage: Damage, doors: list[str]) -> None:
    where = model.parent / "damaged"
    shutil.rmtree(where, ignore_errors=True)
    folder = Path(shutil.copytree(model, where / "model"))
    inflict(folder, damage)
    before, answers, said = files_of(folder), {}, {}
    with torch.no_grad():
        for name in doors:
            said[name] = refusal(lambda folder, name=name: answers.update({name: DOORS[name](folder)}), folder)
            assert files_of(folder) == before, f"{name} changes what it reads"
            assert not [*where.glob("*.partial")], f"{name} leaves what is not whole"
        found = {name: answer for name, answer in answers.items() if answer is not None}
        expected = by_transformers(folder) if found or any(said.values()) else None
    for name, answer in found.items():
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-3, equal_nan=True, msg=lambda m, n=name: n + m)
    if expected is not None and expected.isfinite().all():
        for name, sentence in said.items():
            excused = not sentence or any(re.search(reason, sentence) for reason in MORE_THAN_TRANSFORMERS)
            assert excused, f"{name} refuses what transformers computes: {sentence}"


@bounded(25)
@example(("config", "dtype", "x"), "evaluate")
@example(("config", "is_causal", "x"), "generate")
@example(("config", "is_encoder_decoder", 1), "chat")
@example(("config", "quantization_config", 1), "planned")
@example(("config", "sliding_window", 0.5), "generate")
@example(("config", "transformers_weights", 0), "trained")
@example(("config", "rope_parameters", {"rope_type": "dynamic"}), "planned")
@example(("config", "rope_parameters", {"rope_type": "default", "rope_theta": 0}), "generate")
@example(("bytes", "generation_config.json", "cut", 0.0), "chat")
@example(("generation", "eos_token_id", []), "chat")
@example(("config", "max_position_embeddings", -1), "evaluate")
@example(("config", "dtype", True), "planned")
@example(("config", "dtype", "int64"), "planned")
@example(("config", "max_position_embeddings", 2**40), "served")
@example(("bytes", "tokenizer_config.json", "directory", 0.0), "trained")
@example(("files", "metadata", False), "evaluate")
@example(("dtype", "", "bfloat16", True), "quantized")
@given(DAMAGES, st.sampled_from(list(DOORS)))
def test_a_door_computes_what_transformers_computes_or_says_what_is_wrong(model, damage, door):
    check_doors(model, damage, [door])


@pytest.mark.slow
@bounded(500)
@given(DAMAGES)
def test_every_door(model, damage):
    check_doors(model, damage, list(DOORS))


def damage_tensors(file: Path, how: str) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[0]
    changed = {
        "drop": {other: tensor for other, tensor in tensors.items() if other != name},
        "rename": {other.upper(): tensor for other, tensor in tensors.items()},
        "more": tensors | {f"x.{name}": tensors[name].clone()},
        "shape": tensors | {name: torch.cat([tensors[name], tensors[name]])},
        "one": tensors | {name: tensors[name].flatten()[0].clone()},
        "nan": tensors | {name: torch.full_like(tensors[name], torch.nan)},
    }[how]
    save_file(changed, file)


STUDENTS = st.one_of(
    st.tuples(st.just(CONFIG_FILE), st.sampled_from(sorted(QuantConfig.__dataclass_fields__)), VALUES),
    st.tuples(
        st.sampled_from([GRIDS_FILE, STEPS_FILE]),
        st.sampled_from(["drop", "rename", "more", "shape", "one", "nan"]),
    ),
    st.tuples(
        st.sampled_from([CONFIG_FILE, GRIDS_FILE, STEPS_FILE, writer.PTQ_RECORD]),
        st.sampled_from(["cut", "insert", "zeros", "directory", "delete"]),
        st.floats(0, 0.2),
    ),
)


@pytest.fixture(scope="module")
def student(model) -> Path:
    """With grids of its own and learned steps."""
    directory = Path(shutil.copytree(model, model.with_name("student")))
    quant = QuantConfig(4, 8, 16, a_quantizer="lsq")
    quant.save(directory)
    layers = {name.removesuffix(".weight"): w for name, w in load_file(directory / WEIGHTS).items() if "_proj" in name}
    save_grids({name: quantize(w, quant.weights).grid for name, w in layers.items()}, directory / GRIDS_FILE)
    save_steps({f"{name}.input_step": torch.ones(1) for name in layers}, directory)
    (directory / writer.PTQ_RECORD).write_text('{"method": "gptq"}')
    assert logits(simulated.load(str(directory), torch.float32)).isfinite().all()
    return directory


@bounded(15)
@example((GRIDS_FILE, "one"))
@example((GRIDS_FILE, "more"))
@example((STEPS_FILE, "rename"))
@example((STEPS_FILE, "shape"))
@example((CONFIG_FILE, "w_bits", 0.5))
@example((CONFIG_FILE, "delete", 0.0))
@example((GRIDS_FILE, "delete", 0.0))
@example((STEPS_FILE, "delete", 0.0))
@given(STUDENTS)
def test_a_student_is_read_whole_or_refused(student, damage):
    folder = student.parent / "damaged-student"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(student, folder)
    file, how, *more = damage
    if how in QuantConfig.__dataclass_fields__:
        set_field(folder / file, how, *more)
    elif more:
        damage_bytes(folder / file, how, *more)
    else:
        damage_tensors(folder / file, how)
    with torch.no_grad():
        was_refused = refusal(lambda path: logits(simulated.load(str(path), torch.float32)), folder)
    may_be_read = more and (how != "delete" or file == writer.PTQ_RECORD)  # bits may be other bits, and bytes numbers
    assert was_refused or may_be_read


OF_INTEGERS = [
    *((WEIGHTS, how) for how in ("drop", "rename", "more", "shape", "one", "nan")),
    *(("config.json", "format", value) for value in ([], {"a": 1}, 3)),
    ("config.json", "config_groups", {}),
    (WEIGHTS, "cut", 0.5),
    ("config.json", "cut", 0.9),
    (CONFIG_FILE, "cut", 0.5),
]


def test_an_integer_export_that_is_damaged_is_refused(model, tmp_path):
    """By what serves it, and by what evaluates it."""
    student = Path(shutil.copytree(model, tmp_path / "student"))
    QuantConfig(4, 8, 4).save(student)
    export.export(student_folder.find(student), tmp_path / "sound", PACK_QUANTIZED)
    for file, how, *more in OF_INTEGERS:
        folder = Path(shutil.copytree(tmp_path / "sound", tmp_path / "damaged"))
        if how == "cut":
            damage_bytes(folder / file, how, *more)
        elif more:
            stored = json.loads((folder / file).read_text())["quantization_config"]
            set_field(folder / file, "quantization_config", stored | {how: more[0]})
        else:
            damage_tensors(folder / file, how)
        for read in (qat.load, lambda path: simulated.load(models.resolve(path), torch.float32)):
            assert refusal(lambda path, read=read: read(str(path)), folder), (file, how, *more)
        shutil.rmtree(folder)


RECORDS = st.sampled_from(
    ["", "[]", "3", "{", "{}", '{"settings": 3}', '{"settings": {}}', '{"sequences": []}', "\x00"]
)


@bounded(10)
@given(RECORDS)
def test_records_of_runs_and_caches_are_read_or_refused(model, text):
    folder = model.parent / "records"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-1" / "zero_pp_rank_0_model_states.pt").touch()
    for name in ("settings.json", "manifest.json", writer.PTQ_RECORD):
        (folder / name).write_text(text)
    for read in (
        lambda path: student_folder.find(path / "checkpoints" / "step-1", str(model)),
        lambda path: run.open_folder(path, dict.fromkeys(run.CHANGES_NO_RESULT), {}),
        lambda path: train.TrainingData(path, tiny_tokenizer(), 0),
        lambda path: TeacherCache(path).check({"teacher": "x"}),
        lambda path: writer.is_complete(path, {"method": "x"}),
    ):
        assert refusal(read, folder)


def test_nothing_is_lost_where_a_model_is_refused(model, tmp_path):
    """What lies where a command would write stays as it is."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    os.truncate(folder / WEIGHTS, 4000)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for door in DOORS.values():
        if door is not planned:
            assert refusal(door, folder)
    assert before == {file: file.read_bytes() for file in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]
