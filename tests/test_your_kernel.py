"""docs/your-kernel.md, followed to the letter: its files, its commands and their results, and its generated tables.

`python3 -m tests.test_your_kernel` writes the tables.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.backend import protocol_table

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "your-kernel.md"
PAGE = FILE.read_text(encoding="utf-8")
TABLES = re.compile(r"(<!-- protocol: [^\n]* -->\n)(.*?)(<!-- end of protocol -->\n)", re.DOTALL)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line.partition("#")[0].strip() for language, text in BLOCKS if not language for line in text.splitlines()]


@pytest.fixture
def home(tmp_path):
    """A kernel author's directory with the files of the page."""
    for block in PYTHON:
        if named := re.match(r"# (my_package/\w+\.py)\n", block):
            path = tmp_path / named[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
    return tmp_path


@pytest.fixture
def declaring(home):
    """The same directory, where the backend also has the page's supports()."""
    (method,) = [block for block in PYTHON if block.lstrip().startswith("def supports")]
    path = home / "my_package" / "moe.py"
    path.write_text(path.read_text() + "\n" + method)
    return home


def run(home, words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True)


def command(start):
    """The page's one command that begins so, for this interpreter."""
    (line,) = [c for c in COMMANDS if c.startswith(start)]
    return [sys.executable, *shlex.split(line)[1:]]


def test_the_tables_are_those_of_the_protocol():
    (tables,) = [match[2] for match in TABLES.finditer(PAGE)]
    assert tables == protocol_table(), "python3 -m tests.test_your_kernel writes them"


def test_the_class_is_shorter_than_ten_lines():
    (moe,) = [block for block in PYTHON if "class MyMoE" in block]
    assert len([line for line in moe.splitlines() if line.strip()]) < 10


def test_the_first_verdict_is_passed(home):
    ran = run(home, command("python3 -m harness run"))
    assert ran.returncode == 0 and "\npassed" in ran.stdout, ran.stdout + ran.stderr


BIAS = "python3 -m harness run t16-h256-i128-e8-k2-bf16-bias-random --backend my_package.moe:MyMoE"


def test_an_undeclared_gap_fails(home):
    ran = run(home, [sys.executable, *shlex.split(BIAS)[1:]])
    assert ran.returncode == 1 and "both biases missing" in ran.stdout, ran.stdout + ran.stderr


def test_a_declared_gap_is_unsupported(declaring):
    ran = run(declaring, [sys.executable, *shlex.split(BIAS)[1:]])
    assert ran.returncode == 0 and "unsupported, so it was not run: quant: plain layers only" in ran.stdout


def test_everything_it_declares_is_right(declaring):
    ran = run(declaring, command("python3 -m harness capabilities"))
    assert ran.returncode == 0 and re.search(r"\d+ right, \d+ refused", ran.stdout), ran.stdout + ran.stderr


if __name__ == "__main__":
    FILE.write_text(TABLES.sub(lambda match: match[1] + protocol_table() + match[3], PAGE), encoding="utf-8")
