"""The command lines: wrong inputs give one clear sentence, and imports run one way."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import MISSING, asdict, fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import JSON, ROOT, error_of, generate_flags, train_flags
from forked import processes
from tiny import tiny_model, tiny_tokenizer
from transformers import GPTNeoXConfig

from datagen.corpus import Corpus
from launch import chat, cli
from qat.evaluate import heldout
from qat.export import model_card
from qat.quant.config import QuantConfig
from qat.quant.linear import ARITHMETIC, WITH_ZERO_POINTS, arithmetic_of
from qat.runtime.errors import UserError
from qat.runtime.files import lock
from qat.train import deepspeed_json
from qat.train.config import TrainConfig
from qat.train.run import open_folder, record_settings


@pytest.mark.parametrize("script", ["train", "generate", "evaluate"])
def test_wrong_model_path(script, monkeypatch, tmp_path):
    places = {"evaluate": []}.get(script, [f"--output={tmp_path}/o", *([f"--data={tmp_path}"] * (script == "train"))])
    assert "no model at '/nowhere'" in error_of(monkeypatch, script, "--model=/nowhere", *places)


def test_an_error_of_another_rank_is_told_too(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("launch.cli.time.sleep", lambda seconds: None)
    message = error_of(monkeypatch, "evaluate", "--model=/nowhere")
    assert "no model at '/nowhere'" in message
    assert message.endswith("(rank 1)")


def test_model_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no model at 'nobody/nothing'" in error_of(monkeypatch, "evaluate", "--model=nobody/nothing")


def test_directory_that_is_no_model(monkeypatch, tmp_path):
    assert "no config.json" in error_of(monkeypatch, "evaluate", f"--model={tmp_path}")


def test_unsupported_architecture(monkeypatch, tmp_path, tiny_data):
    tiny_model(GPTNeoXConfig).save_pretrained(tmp_path / "neox")
    message = error_of(monkeypatch, "train", *train_flags(tmp_path / "neox", tiny_data, tmp_path / "out"))
    assert "gpt_neox" in message
    assert "llama" in message


def test_impossible_bits(monkeypatch, tiny_directory, tiny_data, tmp_path):
    flags = train_flags(tiny_directory, tiny_data, tmp_path / "out")
    assert "w_bits=1 is invalid: choose 2 to 8, or 16" in error_of(monkeypatch, "train", *flags, "--w_bits=1")
    assert "w_group_size=9 is invalid" in error_of(monkeypatch, "train", *flags, "--w_group_size=9")


def test_a_refused_mistake_leaves_the_folder_free(monkeypatch, tiny_directory, tiny_data, tmp_path):
    flags = train_flags(tiny_directory, tiny_data, tmp_path / "out")
    assert "w_group_size=48 does not divide" in error_of(monkeypatch, "train", *flags, "--w_group_size=48")
    assert not (tmp_path / "out").exists()


def test_a_resume_with_other_settings_names_those_alone(tmp_path):
    params = {"lr": 2e-5, "betas": [0.9, 0.999], "weight_decay": 0.0}
    optimizer = {"type": "AdamW", "params": params}
    settings = {**asdict(QuantConfig()), **asdict(TrainConfig()), "optimizer": optimizer, "arithmetic": ARITHMETIC}
    record_settings(tmp_path, settings, {}, {})
    changed = settings | {"lr": 3e-4, "optimizer": optimizer | {"params": params | {"lr": 3e-4}}}
    with pytest.raises(UserError, match=re.escape("other settings (lr was 2e-05, now 0.0003): give the same")):
        open_folder(tmp_path, changed, {})
    (tmp_path / "lock").unlink()  # which this process holds to its end
    changed = settings | {"optimizer": optimizer | {"params": params | {"betas": [0.9, 0.95]}}}
    with pytest.raises(UserError, match=re.escape("(optimizer.params.betas was [0.9, 0.999], now [0.9, 0.95])")):
        open_folder(tmp_path, changed, {})


def test_a_resume_whose_checkpoints_would_be_others_is_refused(tmp_path):
    """What only moves between GPU and host, or changes the traffic, may change."""
    settings = {**asdict(QuantConfig()), **asdict(TrainConfig()), "arithmetic": ARITHMETIC}
    shipped = {path.stem: deepspeed_json.read(path) for path in deepspeed_json.SHIPPED.glob("zero3*.json")}
    record_settings(tmp_path, settings, shipped["zero3_offload"], {})
    larger = shipped["zero3_offload"]["zero_optimization"] | {"sub_group_size": 10**7}
    for now, named in (
        (shipped["zero3"], ""),
        (shipped["zero3_nvme"], "optimizer on NVMe was False, now True"),
        (shipped["zero3_offload"] | {"zero_optimization": larger}, "sub_group_size was "),
        (
            shipped["zero3_offload"] | {"data_types": {"grad_accum_dtype": "bf16"}},
            "grad_accum_dtype was 'fp32', now 'bf16'",
        ),
    ):
        with pytest.raises(UserError, match=f"another --deepspeed, .*{named}") if named else nullcontext():
            open_folder(tmp_path, settings, now)
        (tmp_path / "lock").unlink()


def test_runs_on_one_machine_do_not_share_a_folder_on_nvme(tmp_path):
    ds_config = deepspeed_json.read(deepspeed_json.SHIPPED / "zero3_nvme.json")
    first, again, second = (
        deepspeed_json.nvme_folders(deepspeed_json.with_own_folders(ds_config, tmp_path / name)) for name in "aab"
    )
    assert first == again
    assert not {*first} & {*second}
    assert [folder.parent for folder in first] == [Path("/local_nvme")]


def test_a_run_that_multiplied_floats_where_codes_with_zero_points_are_multiplied_now_is_refused(tmp_path):
    """As the version before it recorded it. Of symmetric weights and activations nothing has changed."""
    for quant, is_refused in ((QuantConfig(w_quantizer="minmax_asymmetric"), True), (QuantConfig(), False)):
        settings = {**asdict(quant), **asdict(TrainConfig()), "arithmetic": "products of codes"}
        record_settings(tmp_path, settings, {}, {})
        now = settings | {"arithmetic": arithmetic_of(quant)}
        with (
            pytest.raises(UserError, match="products of codes; now products of codes less")
            if is_refused
            else nullcontext()
        ):
            open_folder(tmp_path, now, {})
        (tmp_path / "lock").unlink()
        (tmp_path / "settings.json").unlink()
    grouped = QuantConfig(w_quantizer="minmax_asymmetric", w_group_size=32)
    overridden = QuantConfig(overrides={"*.q_proj": {"w_quantizer": "minmax_asymmetric"}})
    assert [arithmetic_of(one) for one in (grouped, overridden)] == [ARITHMETIC, WITH_ZERO_POINTS]


def test_a_run_in_bf16_of_the_first_version_which_rounded_rope_is_refused(tmp_path):
    """It recorded no arithmetic. In fp32 it computed as this version does."""
    settings = {**asdict(QuantConfig()), **asdict(TrainConfig())}
    for bf16, outcome in ((True, pytest.raises(UserError, match="RoPE in bf16")), (False, nullcontext())):
        begun = settings | {"bf16": {"enabled": bf16}}
        record_settings(tmp_path, begun, {}, {})
        with outcome:
            open_folder(tmp_path, begun | {"arithmetic": ARITHMETIC}, {})
        (tmp_path / "lock").unlink()
        (tmp_path / "settings.json").unlink()


@pytest.mark.parametrize("left", ["checkpoints/step-000005", "final"])
def test_a_run_that_lost_its_settings_is_refused(left, monkeypatch, tiny_directory, tiny_data, tmp_path):
    (tmp_path / "out" / left).mkdir(parents=True)
    message = error_of(monkeypatch, "train", *train_flags(tiny_directory, tiny_data, tmp_path / "out"))
    assert "a run without its settings.json" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} == {left.split("/")[0], "lock"}


def test_empty_data_folder(monkeypatch, tiny_directory, tmp_path):
    (tmp_path / "empty").mkdir()
    message = error_of(monkeypatch, "train", *train_flags(tiny_directory, tmp_path / "empty", tmp_path / "out"))
    assert "no training data" in message
    assert "launch/generate.py" in message


def test_shards_of_another_tokenizer(monkeypatch, tiny_directory, tiny_data, tmp_path):
    tiny_model().save_pretrained(tmp_path / "other")
    tiny_tokenizer("quite another text, of a few words only").save_pretrained(tmp_path / "other")
    message = error_of(monkeypatch, "train", *train_flags(tmp_path / "other", tiny_data, tmp_path / "out"))
    assert "another tokenizer" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "optimizer.params.lr = 0.001, the flags say 2e-05",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4, the flags say 1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2, the flags say 8"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage to 3"),
        ({"train_batch_size": 4}, "train_batch_size = 4, the flags say 8"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled = "auto", but no flag sets it'),
        ({"tensor_parallel": {"autotp_size": 2}}, "AutoTP"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "in bf16 most updates"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"checkpoint": {"load_universal": True}}, "sets checkpoint"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 4}}, "sets zero_optimization.mics_shard_size"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "sets zero_optimization.offload_optimizer.super_offload",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.0}}},
            "offload_optimizer.ratio to 0.0",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}},
            "puts offload_optimizer on /nowhere",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "~/nowhere"}}},
            f"puts offload_param on {Path.home() / 'nowhere'}",
        ),
    ],
)
def test_deepspeed_json_that_contradicts_the_flags(change, named, monkeypatch, tiny_directory, tiny_data, tmp_path):
    contradicting = tmp_path / "ds.json"
    contradicting.write_text(json.dumps(json.loads(JSON.read_text()) | change))
    flags = train_flags(tiny_directory, tiny_data, tmp_path / "out", contradicting)
    assert named in error_of(monkeypatch, "train", *flags)


def test_missing_or_broken_deepspeed_json(monkeypatch, tiny_directory, tiny_data, tmp_path):
    flags = train_flags(tiny_directory, tiny_data, tmp_path / "out", tmp_path / "none.json")
    message = error_of(monkeypatch, "train", *flags)
    assert f"no DeepSpeed configuration at {tmp_path / 'none.json'}: choose ds_configs/" in message
    (tmp_path / "broken.json").write_text("{")
    flags = train_flags(tiny_directory, tiny_data, tmp_path / "out", tmp_path / "broken.json")
    assert "is not JSON" in error_of(monkeypatch, "train", *flags)


def test_the_shipped_deepspeed_jsons_are_found_from_everywhere(monkeypatch, tmp_path):
    """An installed package has them beside its modules; a folder of that name in the working directory comes first."""
    expected = deepspeed_json.read(JSON)
    monkeypatch.chdir(tmp_path)
    relative = JSON.relative_to(JSON.parents[1])
    assert deepspeed_json.read(relative) == expected
    relative.parent.mkdir()
    relative.write_text(JSON.read_text().replace('"stage": 3', '"stage": 2'))
    with pytest.raises(UserError, match="must set zero_optimization"):
        deepspeed_json.read(relative)


def test_data_of_other_settings(monkeypatch, tiny_directory, tiny_data):
    flags = [*generate_flags(tiny_directory, tiny_data), "--seed=5"]
    assert "seed was 0, now 5" in error_of(monkeypatch, "generate", *flags)


def test_two_runs_in_one_folder(tmp_path):
    held = "import sys; from pathlib import Path; from qat.runtime.files import lock"
    held += "; lock(Path(sys.argv[1])); print(); input()"
    other = subprocess.Popen([sys.executable, "-c", held, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match="Another run is still using"):
        lock(tmp_path)
    other.communicate(b"\n")
    lock(tmp_path)  # it has ended: the folder is free


def test_quantized_model_as_teacher(monkeypatch, tiny_directory, tiny_data, tmp_path):
    student = shutil.copytree(tiny_directory, tmp_path / "student")
    QuantConfig().save(student)
    message = error_of(monkeypatch, "train", *train_flags(student, tiny_data, tmp_path / "out"))
    assert "quantized already" in message


COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "cli.run(main)" in path.read_text())


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_says_which_flag_was_meant(script, monkeypatch, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("modle: there\n")
    for given in ("--modle=there", f"--config={tmp_path / 'recipe.yaml'}"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", given])
        with pytest.raises(UserError) as refused:
            import_module(f"launch.{script}").main()
        first, usage, *_ = str(refused.value).splitlines()
        assert "modle" in first
        assert first.endswith(": did you mean --model?")
        assert usage.startswith(f"usage: {script}.py")


@pytest.mark.parametrize(("flag", "named"), [("--learning_rate=1", "--learning_rate=1"), ("--lr=fast", '"lr"')])
def test_a_wrong_flag_is_named_first_and_the_flags_follow_once(flag, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *train_flags("m", "d", "o"), flag])
    with pytest.raises(SystemExit) as stop:
        cli.run(import_module("launch.train").main)
    assert stop.value.code == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert named in first
    assert [line.startswith("usage: train.py") for line in others].count(True) == 1


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path, monkeypatch):
    bad = b"caf\xc3\xa9\r\n" * 3 + b"caf\xe9\n"

    def typed(file: str) -> None:
        with Path(file).open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            list(chat._lines())

    def given(file: str) -> None:
        monkeypatch.setattr(sys, "argv", ["chat.py", f"--config={file}"])
        cli.parse("", chat.Chat)

    readers = {
        "a.txt": lambda file: list(heldout.paragraphs(file)),
        "b.txt": lambda file: list(Corpus(file).pieces()),
        "c.jsonl": lambda file: list(Corpus(file).pieces()),
        "README.md": lambda file: model_card.origin_of(str(Path(file).parent)),
        "recipe.yaml": given,
        "The standard input": typed,
    }
    for name, read in readers.items():
        content = bad.replace(b"\r\n", b"\n").replace(b"caf", b'{"text": "caf').replace(b"\n", b'"}\n')
        (tmp_path / name).write_bytes(content if name == "c.jsonl" else bad)
        with pytest.raises(UserError, match=rf"{name}, line 4, is not UTF-8 text"):
            read(str(tmp_path / name))
    ends = np.array([0, 3, 6, 10], np.int32)  # of three texts
    texts = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(ends), pa.py_buffer(b"onetwocaf\xe9")])
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d.parquet, row 3, is not UTF-8 text"):
        list(Corpus(str(tmp_path / "d.parquet")).pieces())


def test_recipe_and_flags_set_the_same_fields(monkeypatch, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("w_bits: 3\nlr: 1.0e-4\n")
    train = import_module("launch.train")
    flags = [*train_flags("m", "d", "o"), f"--config={recipe}", "--lr=5e-4"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    _, quant, config = cli.parse("", train.Paths, train.QuantConfig, train.TrainConfig)
    assert (quant.w_bits, config.lr) == (3, 5e-4)


def test_a_plugin_that_a_recipe_names_is_imported_wherever_the_recipe_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for number, recipe in enumerate((f"{tmp_path}/0.yaml", "~/1.yaml")):
        (tmp_path / f"own_plugin_{number}.py").touch()
        (tmp_path / f"{number}.yaml").write_text(f"plugin: own_plugin_{number}\nmodel: m\n")
        monkeypatch.setattr(sys, "argv", ["chat.py", f"--config={recipe}"])
        cli.parse("", chat.Chat)
        assert sys.modules.pop(f"own_plugin_{number}")


SCRIPTS = sorted(file.stem for file in (ROOT / "launch").glob("*.py") if "cli.run(main)" in file.read_text())


def places() -> Iterator[tuple[str, type, str]]:
    """Script, dataclass and name of every setting that is a path, or may be one."""
    for script in SCRIPTS:
        (given,) = re.findall(
            r"cli\.parse\(__doc__, ([\w, ]+?)(?:, \*.*)?\)", (ROOT / "launch" / f"{script}.py").read_text()
        )
        for config in (getattr(import_module(f"launch.{script}"), name) for name in given.split(", ")):
            for field in fields(config):
                if "Path" in str(field.type) or field.name in cli.PLACES:
                    yield script, config, field.name


def test_a_home_that_no_shell_expanded_is_one_folder_in_every_command(monkeypatch, tmp_path):
    """Given by a flag, and by a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = set()
    for script, config, name in places():
        needed = {f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING} - {name}
        beside = needed | ({"deepspeed"} if name == "teacher_deepspeed" else set())
        value = '["~/x"]' if "list" in str(config.__annotations__[name]) else "~/x"
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{name}: {value}\n")
        for flag in (f"--{name}={value}", f"--config={recipe}"):
            others = [f"--{other}=y" for other in sorted(beside)]
            wanted = {("quantize", "data"): ["--method=gptq"], ("evaluate", "baseline"): ["--tasks=piqa"]}
            monkeypatch.setattr(sys, "argv", [f"{script}.py", *others, *wanted.get((script, name), []), flag])
            (made,) = cli.parse("", config)
            (given,) = given if isinstance(given := getattr(made, name), list) else [given]
            assert str(given) == str(tmp_path / "home" / "x"), f"{script}, {flag}"
        found.add((script, name))
    assert {
        ("generate", "output"), ("train", "data"), ("evaluate", "text"), ("export", "results"), ("chat", "model")
    } <= found  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model=~/x", "--text=encyclopedia,~/a,b~c"])
    (made,) = cli.parse("", import_module("launch.evaluate").Evaluation)
    assert made.text == f"encyclopedia,{tmp_path}/home/a,b~c"
    monkeypatch.setattr(sys, "argv", ["chat.py", "--model=m", "--prompt=~/x is what?"])
    (made,) = cli.parse("", import_module("launch.chat").Chat)
    assert made.prompt == "~/x is what?"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_with_its_meaning(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        import_module(f"launch.{script}").main()
    text = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)(.*(?:\n {10,}.*)*)", text, re.MULTILINE)
    assert len(flags) > 3
    assert all(meaning.strip() for _, meaning in flags)


SELDOM_USED = ("compressed_tensors", "datasets", "lm_eval")
"""Each takes seconds to import, and one format, text or task needs it."""


def _send_seldom_used(to) -> None:
    to.send([name for name in SELDOM_USED if name in sys.modules])


def test_what_is_seldom_used_is_not_imported_by_the_commands():
    """Of all at once, in the process that has imported them."""
    child, ours = multiprocessing.Pipe()
    process = processes().Process(target=_send_seldom_used, args=(child,))
    process.start()
    assert ours.recv() == []
    process.join()
