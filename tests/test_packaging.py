"""What ``pip install .`` gives: every module, what they read, and ranges that hold the pinned versions."""

import ast
import contextlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from itertools import chain

from commands import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("qat", "datagen", "launch", "ds_configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_wheel_has_every_module_and_what_they_read(tmp_path):
    """From another folder than the repository's."""
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    expected = {str(file.relative_to(source)) for package in PACKAGES for file in (source / package).rglob("*.*")}
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as files:
        assert not expected - set(files.namelist())
        files.extractall(installed)
    plan = [sys.executable, "-m", "launch.plan", "--model=llama-7b", "--deepspeed=ds_configs/zero3.json"]
    run = subprocess.run(
        plan, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert "zero3.json fits" in run.stdout, run.stderr


def pins(file: str) -> dict[str, str]:
    """The pinned versions in a file of requirements, by the package's name."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    pinned = [Requirement(line) for line in lines if "==" in line]
    return {canonicalize_name(one.name): next(iter(one.specifier)).version for one in pinned}


def brought(names: Iterable[str]) -> set[str]:
    """The installed packages that packages need, and what these need, themselves included. Extras are not looked
    into."""
    found, rest = set(), list(names)
    while rest:
        if (name := canonicalize_name(rest.pop())) in found:
            continue
        with contextlib.suppress(PackageNotFoundError):  # of another platform
            needs = map(Requirement, requires(name) or [])
            rest += [one.name for one in needs if not one.marker or one.marker.evaluate({"extra": ""})]
            found.add(name)
    return found


def test_what_the_pinned_packages_bring_is_pinned_too():
    """But for what torch and its kin are built for: a CPU or a GPU."""
    chosen, locked = pins("requirements.txt") | pins("requirements-dev.txt"), pins("constraints.txt")
    assert chosen.items() - {("torch", chosen["torch"])} <= locked.items()
    for_gpus = {name for name in brought(["torch"]) if name.startswith(("cuda-", "nvidia-"))}
    assert brought(chosen) - {"torch"} - for_gpus <= locked.keys()


def test_the_pinned_versions_are_within_the_ranges():
    pinned = pins("requirements.txt") | pins("requirements-dev.txt")
    ranges = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, ranges):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_environment_of_vllm_is_made_anew_when_what_makes_it_changes(tmp_path):
    """With a Python whose pip notes its calls."""
    source, environment, python = tmp_path / "source", tmp_path / "venv", tmp_path / "python"
    (source / "tests").mkdir(parents=True)
    for file in ("tests/vllm_venv.sh", "requirements-vllm.txt"):
        shutil.copy(ROOT / file, source / file)
    pip = '#!/bin/sh\necho "$@" >> calls'
    python.write_text(f"#!/bin/sh\nmkdir -p $3/bin\ncat > $3/bin/pip <<'END'\n{pip}\nEND\nchmod +x $3/bin/pip\n")
    python.chmod(0o755)

    def calls() -> int:
        subprocess.run([source / "tests" / "vllm_venv.sh", environment, python], cwd=tmp_path, check=True)
        return len((tmp_path / "calls").read_text().splitlines())

    made = calls()
    assert calls() == made
    (environment / ".ready").write_text("")  # as an earlier version left it
    assert calls() == 2 * made
    with open(source / "requirements-vllm.txt", "a") as requirements:
        requirements.write("another\n")
    assert calls() == 3 * made
    assert calls() == 3 * made


def test_what_the_code_imports_is_declared():
    """Among the dependencies or the extras; but for vLLM, which has an environment of its own."""
    imported = set()
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - set(PACKAGES) - {"vllm"}
    of = packages_distributions()
    declared = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    names = {canonicalize_name(Requirement(one).name) for one in declared}
    missing = {module for module in foreign if not names & {canonicalize_name(own) for own in of.get(module, [])}}
    assert not missing
