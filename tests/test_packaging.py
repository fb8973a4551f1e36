"""What ``pip install .`` gives: every module, what they read, and ranges that hold the pinned versions."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
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


def test_the_pinned_versions_are_within_the_ranges():
    pins = {}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if "==" in line:
                requirement = Requirement(line.partition("#")[0].strip())
                pins[requirement.name] = next(iter(requirement.specifier)).version
    ranges = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, ranges):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


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
