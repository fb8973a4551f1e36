"""The house: which package may import which, and what importing costs."""

import ast
import sys
from itertools import chain

import pytest
from conftest import ROOT

FLOORS = [
    {"launch", "launch.paper"},
    {"datagen", "qat"},
    {"qat.train", "qat.ptq", "qat.export"},
    {"qat.infer", "qat.evaluate", "qat.data", "qat.train.losses"},
    {"qat.store"},
    {"qat.quant"},
    {"qat.runtime"},
]
"""From top to bottom. A package imports from floors below its own; of the top one, launch runs launch.paper."""

MAY_IMPORT = {
    package: set(chain.from_iterable(FLOORS[floor + 1 :])) | {package}
    for floor, packages in enumerate(FLOORS)
    for package in packages
}
MAY_IMPORT["datagen"] -= {"qat", "qat.train", "qat.train.losses", "qat.ptq", "qat.export", "qat.infer", "qat.evaluate"}
MAY_IMPORT["launch"] |= {"launch.paper"}
MAY_IMPORT["launch.paper"] |= {"launch"}

FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("launch", "datagen", "qat")
    for file in (ROOT / package).rglob("*.py")
}


def package_of(module: str) -> str:
    return module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]


def imports(module: str) -> set[str]:
    """Modules that ``module`` imports, wherever in it: ours, and others by their first name."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
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


def test_number_formats_need_torch_alone():
    for module in ("qat.quant.quantizers", "qat.quant.fused"):
        foreign = {name for name in imports(module) if name not in FILES and name not in sys.stdlib_module_names}
        assert foreign == {"torch"}, module
