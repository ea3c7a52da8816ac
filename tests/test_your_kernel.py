"""docs/your-kernel.md, followed to the letter: its files, its commands, and what it says comes of them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "your-kernel.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line.partition("#")[0].strip() for language, text in BLOCKS if not language for line in text.splitlines()]


@pytest.fixture
def home(tmp_path):
    """A kernel author's directory, with the files of the page."""
    for block in PYTHON:
        if named := re.match(r"# (my_package/\w+\.py)\n", block):
            path = tmp_path / named[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
    return tmp_path


@pytest.fixture
def declaring(home):
    """The same, its backend with the page's method that says what it does not do."""
    (method,) = [block for block in PYTHON if block.lstrip().startswith("def supports")]
    path = home / "my_package" / "moe.py"
    path.write_text(path.read_text() + "\n" + method)
    return home


def run(home, words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True)


def command(start):
    (found,) = [c for c in COMMANDS if c.startswith(start)]
    return [sys.executable, *shlex.split(found)[1:]]


def test_the_class_is_shorter_than_ten_lines():
    (moe,) = [block for block in PYTHON if "class MyMoE" in block]
    assert len([line for line in moe.splitlines() if line.strip()]) < 10


def test_the_first_verdict_is_passed(home):
    ran = run(home, command("python3 -m harness run"))
    assert ran.returncode == 0 and "\npassed" in ran.stdout, ran.stdout + ran.stderr


BIAS = "python3 -m harness run t16-h256-i128-e8-k2-bf16-bias-random --backend my_package.moe:MyMoE"


def test_what_it_does_not_do_is_red(home):
    ran = run(home, [sys.executable, *shlex.split(BIAS)[1:]])
    assert ran.returncode == 1 and "both biases missing" in ran.stdout, ran.stdout + ran.stderr


def test_until_it_says_so(declaring):
    ran = run(declaring, [sys.executable, *shlex.split(BIAS)[1:]])
    assert ran.returncode == 0 and "unsupported, so it was not run: quant: plain layers only" in ran.stdout


def test_with_that_all_that_it_declares_is_right(declaring):
    ran = run(declaring, command("python3 -m harness capabilities"))
    assert ran.returncode == 0 and re.search(r"\d+ right, \d+ refused", ran.stdout), ran.stdout + ran.stderr
