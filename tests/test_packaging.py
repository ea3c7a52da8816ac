"""pyproject.toml, constraints.txt, Makefile, .ci/run: they agree with each other and with what the code imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"harness", "reference", "kernels", "cases"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: A distribution is mostly imported by its own name.
IMPORTED_AS = {
    "pytest": {"pytest", "_pytest"}, "ml-dtypes": {"ml_dtypes"},
    "intel-extension-for-pytorch": {"intel_extension_for_pytorch"},
}  # fmt: skip
#: Python 3.11 has tomllib. For 3.10, pytest brings tomli, and pip has it before anything is installed.
BY_OTHERS = {"tomllib", "tomli", "pip"}


def requirements(*extras):
    project = PROJECT["project"]
    lines = project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def imported(room):
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


EXTRAS = {"harness": (), "reference": (), "cases": (), "kernels": ("test", "ipex")}


@pytest.mark.parametrize("room, extras", EXTRAS.items())
def test_what_is_imported_is_declared(room, extras):
    declared = {name for r in requirements(*extras) for name in IMPORTED_AS.get(r, {r})}
    assert set(imported(room)) - set(sys.stdlib_module_names) - ROOMS - declared - BY_OTHERS == set()


def test_constraints_pin_what_the_extras_ask_for_and_nothing_else():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    wanted = requirements("test", "dev")
    assert pinned.keys() == wanted.keys()
    for name, pin in pinned.items():
        version = re.fullmatch(r"==([\d.]+)", str(pin.specifier))
        assert version and wanted[name].specifier.contains(version[1]), pin


def test_only_the_project_s_own_pytest_options_are_always_on():
    assert PROJECT["tool"]["pytest"]["ini_options"]["addopts"] == ["--strict-markers"]
    assert "pytest11" not in PROJECT["project"].get("entry-points", {})  # see conftest.py


def test_the_command_is_there():
    module, _, name = PROJECT["project"]["scripts"]["moe-harness"].partition(":")
    assert (module, name) == ("harness.cli", "main")
    done = subprocess.run([sys.executable, "-m", "harness", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(
        f"    {c} " in done.stdout for c in ("doctor", "list", "run", "verify", "floor")
    )


def test_transformers_does_not_take_this_for_the_kernels_of_pypi():
    assert not SpecifierSet(">=0.18.2,<0.19").contains(PROJECT["project"]["version"])


@pytest.mark.parametrize("build", ["build_editable", "build_wheel"])
def test_only_an_editable_build_is_possible(tmp_path, build):
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    script = f"from setuptools.build_meta import {build} as build; build('out')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert [path.suffix for path in (tmp_path / "out").glob("*")] == ([".whl"] if build == "build_editable" else [])
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    if build == "build_wheel":
        assert done.returncode and len(errors) == 1 and "Traceback" not in done.stderr
        assert errors[0].startswith("error: moe-harness can only be installed with `pip install -e .`: its top-level")
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    "python, message",
    [
        ("no-such-python", "make: no no-such-python here; name one with PYTHON=..."),
        ("echo 'Python 3.6.15'; false", "make: Python 3.6.15 is too old, 3.10 is needed; name another with PYTHON=..."),
        ('case "$2" in *venv*) exit 1;; esac', "cannot make virtual environments; install its venv package"),
    ],
    ids=["missing", "old", "no venv"],
)
@pytest.mark.parametrize("target", ["test", "upstream"])
def test_make_says_what_is_wrong_with_python_in_one_line(tmp_path, python, message, target):
    if python.startswith("no-"):
        path = Path(python)
    else:
        path = tmp_path / "python3"
        path.write_text(f"#!/bin/sh\n{python}\n")
        path.chmod(0o755)
    arguments = [f"PYTHON={path}", f"VENV={tmp_path}/venv", f"UPSTREAM_VENV={tmp_path}/venv-upstream"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(["make", "-s", target, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = done.stderr.splitlines()
    assert done.returncode and message in lines[0] and len(lines) == 2  # the second is make's own
    assert not list(tmp_path.glob("venv*"))


def test_ci_runs_the_make_targets_and_takes_no_arguments():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    targets = ("lint", "test", "structure", "mutants", "verify")
    assert "set -euo pipefail" in text and all(f"make {target}" in text for target in targets)
    assert "run: .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
