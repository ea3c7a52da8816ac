"""Hostile files and inputs: no traceback, no hang, no green, each in a forked child of this process."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from harness.base.processes import ROOT
from tests.reliability import warm
from tests.reliability.ways import ALIVE, tail

LIMIT = 2.0  #: seconds for one
PATIENCE = 20.0  #: seconds until it is ended
LOG = 100_000  #: characters of output, at most
#: The commands that read results files; {} is the file.
READERS = (["summary", "{}"], ["report", "{}", "--out", "{}.html"], ["floor", "{}"], ["matrix", "--durations", "{}"])
#: The command that gives no verdict: it prints the durations of the cases that it can read.
NO_VERDICT = "--durations"


@dataclass
class Hostile:
    """What came of the hostile files and inputs."""

    files: int = 0  #: results files
    commands: int = 0  #: that read them
    inputs: int = 0  #: other files, options and descriptors
    tracebacks: int = 0
    slow: int = 0
    green: int = 0
    slowest: float = 0.0  #: seconds
    problems: list[str] = field(default_factory=list)

    def __add__(self, other: Hostile) -> Hostile:
        names = ("files", "commands", "inputs", "tracebacks", "slow", "green")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Hostile(**sums, slowest=max(self.slowest, other.slowest), problems=self.problems + other.problems)


def part(i: int, n: int, root: Path) -> Hostile:
    """Every n-th of the hostile files and inputs, from the i-th on."""
    from tests.support.hostile_inputs import hostile_inputs
    from tests.support.hostile_results import hostile_results

    found = Hostile()
    for name, data in islice(hostile_results(), i, None, n):
        found.files += 1
        for words in READERS:
            folder = _folder(root)
            (folder / "r.jsonl").write_bytes(data)
            found.commands += 1
            _ask(found, f"{words[0]} of the file {name!r}", [w.format(folder / "r.jsonl") for w in words], folder)
    for hostile in islice(hostile_inputs(), i, None, n):
        found.inputs += 1
        folder = _folder(root)
        for file, content in hostile.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        _ask(found, f"the input {hostile.name!r}", [w.replace("{dir}", str(folder)) for w in hostile.argv], folder)
    return found


def _folder(root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return root


def _ask(found: Hostile, what: str, words: list[str], folder: Path) -> None:
    ended = warm.command(warm.harness(words), folder, PATIENCE)
    wrong = []
    if "Traceback (most recent call last)" in ended.text:
        found.tracebacks += 1
        wrong.append("a traceback")
    if ended.seconds > LIMIT:
        found.slow += 1
        wrong.append(f"{ended.seconds:.1f} s")
    if ended.code == 0 and NO_VERDICT not in words:
        found.green += 1
        wrong.append("green")
    if ended.code < 0:
        wrong.append(f"ended by signal {-ended.code}")
    if len(ended.text) > LOG:
        wrong.append(f"{len(ended.text)} characters of output")
    if mark := ALIVE.search(ended.text):
        wrong.append(f"printed as it is: {mark[0]!r}")
    found.slowest = max(found.slowest, ended.seconds)
    if wrong:
        found.problems.append(f"{what}: {', '.join(wrong)}: {tail(ended.text)}".replace(str(ROOT), "."))
