"""The house: which package and which test may import what, and what importing costs."""

import ast
import re
import subprocess
import sys
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path

import pytest
from commands import ROOT

from qat.export.formats import EXPORT_FORMATS, FAKE, GGUF
from qat.quant.architecture import ARCHITECTURES
from qat.store.compressed_tensors import FLOAT_QUANTIZED, INT_QUANTIZED, MXFP4, NVFP4, PACK_QUANTIZED

FLOORS = [
    {"launch", "launch.paper"},
    {"datagen", "qat"},
    {"qat.train", "qat.ptq", "qat.export", "qat.export.formats"},
    {"qat.infer", "qat.evaluate", "qat.data", "qat.train.losses"},
    {"qat.store"},
    {"qat.quant"},
    {"qat.runtime"},
]
"""From top to bottom. A package imports from floors below its own; launch runs launch.paper, and qat.export
has a package for its formats."""

MAY_IMPORT = {
    package: set(chain.from_iterable(FLOORS[floor + 1 :])) | {package}
    for floor, packages in enumerate(FLOORS)
    for package in packages
}
for package in (
    "qat",
    "qat.train",
    "qat.train.losses",
    "qat.ptq",
    "qat.export",
    "qat.export.formats",
    "qat.infer",
    "qat.evaluate",
):
    MAY_IMPORT["datagen"].discard(package)
MAY_IMPORT["qat.export"] |= {"qat.export.formats"}
MAY_IMPORT["launch"] |= {"launch.paper"}

FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("launch", "datagen", "qat")
    for file in (ROOT / package).rglob("*.py")
}


def package_of(module: str) -> str:
    """The innermost of FLOORS' packages."""
    return max((package for package in MAY_IMPORT if f"{module}.".startswith(f"{package}.")), key=len)


def imports(module: str) -> set[str]:
    """Modules that ``module`` imports, wherever in it: ours, and others by their first name."""
    return imports_in(FILES[module])


def imports_in(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return {name if name in FILES else name.partition(".")[0] for name in found}


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    package = package_of(module)
    ours = {name for name in imports(module) if name in FILES}
    up = {name for name in ours if package_of(name) not in MAY_IMPORT[package]}
    assert not up, f"{package} stands too low to import {up}"


def test_no_circles():
    rest = {module: {name for name in imports(module) if name in FILES} - {module} for module in FILES}
    while free := {module for module, needs in rest.items() if not needs & rest.keys()}:
        rest = {module: needs for module, needs in rest.items() if module not in free}
    assert not rest


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda file: file.stem)
def test_what_several_tests_use_is_in_no_test_module(file):
    """Nor in conftest.py, which has fixtures."""
    assert not [name for name in imports_in(file) if name.startswith("test_") or name == "conftest"]


def test_number_formats_need_torch_alone():
    formats = [
        module
        for module in FILES
        if module.startswith(("qat.quant.number_format", "qat.quant.quantizers.", "qat.quant.kv_formats"))
    ]
    for module in ("qat.quant.fused", *formats):
        foreign = {name for name in imports(module) if name not in FILES and name not in sys.stdlib_module_names}
        assert foreign <= {"torch"}, module


def strings(value: object) -> set[str]:
    """All strings in a description."""
    if isinstance(value, str):
        return {value}
    parts = vars(value).values() if is_dataclass(value) else value if isinstance(value, tuple) else ()
    return set(chain.from_iterable(map(strings, parts)))


LAYERS = {
    part
    for described in ARCHITECTURES.values()
    for name in strings(described)
    for part in name.split(".")
    if "_" in part and part != described.sliding_window
} | {"model.layers"}
"""What transformers calls the modules of the models that are described."""


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"qat.quant.architecture"}))
def test_one_file_knows_the_layers_names(module):
    assert {"q_proj", "gate_proj", "self_attn", "embed_tokens", "lm_head", "rotary_emb", "input_layernorm"} <= LAYERS
    source = FILES[module].read_text()
    assert not re.search(r"hidden_size\s*//\s*[\w.]*num_attention_heads", source), "head_dim(config) knows better"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in LAYERS, f"{module}, line {node.lineno}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.search(r"\s", node.value):
            found = [name for name in LAYERS if re.search(rf"(^|\W){re.escape(name)}($|\W)", node.value)]
            assert not found, f"{module}, line {node.lineno}"


DEFINES_FORMATS = {
    "qat.store.compressed_tensors": {PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED, NVFP4, MXFP4},
    "qat.export.formats.base": {FAKE, GGUF},
    "qat.store.gguf_files": {GGUF},  # the package's name, too
}
"""The constants with the names of export formats, and where they are defined."""


@pytest.mark.parametrize("module", sorted(FILES))
def test_names_of_export_formats_are_not_repeated(module):
    nodes = ast.walk(ast.parse(FILES[module].read_text()))
    values = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names = EXPORT_FORMATS.keys() - DEFINES_FORMATS.get(module, set())
    assert not names & values
    assert not [value for value in values for name in names if f"--format {name}" in value]


def test_help_imports_neither_transformers_nor_deepspeed():
    """Each takes longer than the rest together, and refusing a wrong flag needs neither."""
    code = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "usage: " in printed.getvalue(), script
    assert not {"transformers", "deepspeed", "lm_eval"} & sys.modules.keys(), script
"""
    scripts = [str(file) for file in (ROOT / "launch").glob("*.py") if "cli.run(main)" in file.read_text()]
    assert len(scripts) > 9
    subprocess.run([sys.executable, "-c", code, *sorted(scripts)], check=True, timeout=300)
