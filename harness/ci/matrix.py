"""The CI matrix: the rows of matrix.toml, the command of a row's shard, and the list of jobs.

Needs the standard library alone, so a job can use it before anything is installed:

    python3 -m harness.ci.matrix --json --when change      the jobs, for GitHub's fromJSON
    python3 -m harness.ci.matrix --install ROW             installs the packages of a row into .venv (--venv: elsewhere)

`python3 -m harness matrix ROW` (commands/matrix.py) runs a row, in CI and elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.base import toml
from harness.base.arguments import Parser, integer
from harness.base.errors import UserError, bare, shown
from harness.base.processes import ROOT, pytest_words, workers
from harness.base.suggest import did_you_mean
from harness.results.file import ResultsError
from harness.results.floor import read_floor

PATH = ROOT / "matrix.toml"
DURATIONS = ROOT / "cases" / "durations.toml"
DEVICES = ("cpu", "cuda", "xpu", "xpu-emulated")
WHEN = ("change", "nightly")
SELF_HOSTED = "self-hosted"
MOST_SHARDS = 10_000
#: Environment variables of a job; results/file.py writes them into every record.
ROW, SHARD = "MOE_HARNESS_ROW", "MOE_HARNESS_SHARD"


class MatrixError(UserError):
    """matrix.toml, or a request for a row, is wrong; the message names the row, the key and what is valid."""


@dataclass(frozen=True)
class MatrixRow:
    """One row; the head of matrix.toml explains the keys."""

    name: str
    runner: tuple[str, ...]
    device: str
    floor: dict[str, int]  #: the least number of executed verdicts, by backend
    minutes: int
    when: tuple[str, ...] = WHEN
    shards: int = 1
    markers: str = ""
    backends: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    python: str = ""
    extras: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    constraints: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    compare: tuple[str, ...] | None = None

    @property
    def own_labels(self) -> set[str]:
        """The labels of a self-hosted runner beside "self-hosted"; none for a hosted runner."""
        return set(self.runner) - {SELF_HOSTED} if SELF_HOSTED in self.runner else set()


# -- the file ---------------------------------------------------------------------------------------------------------
def read(path: Path | None = None) -> dict[str, MatrixRow]:
    """{name: row} in the order of the file (matrix.toml). MatrixError: it cannot be used."""
    path = path or PATH
    tables = toml.read(path, MatrixError)
    if not tables:
        raise MatrixError(f"{path}: holds no rows; a row is a table, [name]")
    return {name: _row(name, table, path) for name, table in tables.items()}


def _row(name: str, table: Any, path: Path) -> MatrixRow:
    def wrong(key: str, valid: str) -> MatrixError:
        return MatrixError(f"{path.name}: [{bare(name)}] {bare(key)}={shown(table[key])}: {valid}")

    if not isinstance(table, dict):
        raise MatrixError(f"{path.name}: {bare(name)}={shown(table)}: must be a table, [{bare(name)}]")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise MatrixError(
            f"{path.name}: [{bare(name)}]: a name is of a-z, 0-9, - and _, since files are named after it"
        )
    for key, value in table.items():
        if key not in VALID:
            raise wrong(key, f"no such key{did_you_mean(key, VALID)}; valid: {', '.join(VALID)}")
        valid, words = VALID[key]
        if not valid(value):
            raise wrong(key, words)
    for f in fields(MatrixRow):
        if f.name in VALID and f.default is MISSING and f.default_factory is MISSING and f.name not in table:
            raise MatrixError(f"{path.name}: [{name}] has no {f.name}: {VALID[f.name][1]}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    if isinstance(values["runner"], str):
        values["runner"] = (values["runner"],)
    if values.get("constraints") and not (path.parent / values["constraints"]).is_file():
        raise wrong("constraints", "no such file")
    if isinstance(values["floor"], str):
        try:
            sections = read_floor(path.parent / values["floor"])
        except ResultsError as error:
            raise wrong("floor", str(error).removeprefix("--floor ")) from error
        if values["device"] not in sections:
            raise wrong("floor", f"has no section [{values['device']}]; there: {', '.join(sections) or 'none'}")
        only, whole = values.get("backends"), sections[values["device"]]
        values["floor"] = {backend: n for backend, n in whole.items() if not only or backend in only}
    if not any(values["floor"].values()):
        raise wrong("floor", "demands nothing: a row that tests nothing would be green")
    return MatrixRow(name, **values)


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and word for word in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_SHARDS


def _is_floor(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and all(type(n) is int and 0 <= n < 10**9 for n in value.values())
    )


#: {key: (a test of its value, the valid values in words)}.
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "runner": (lambda value: bool(value) and (_text(value) or _words(value)), "a label, or a list of labels"),
    "device": (lambda value: value in DEVICES, f"one of {', '.join(DEVICES)}"),
    "floor": (_is_floor, "a floor file, or a table of counts by backend"),
    "minutes": (_count, f"a number, 1 or more, at most {MOST_SHARDS}"),
    "when": (lambda value: bool(value) and _words(value) and set(value) <= set(WHEN), f"a list of {', '.join(WHEN)}"),
    "shards": (_count, f"a number, 1 or more, at most {MOST_SHARDS}"),
    "markers": (_text, "a string"),
    "backends": (_words, "a list of strings"),
    "options": (_words, "a list of strings"),
    "python": (_text, "a string"),
    "extras": (_words, "a list of strings"),
    "packages": (_words, "a list of strings"),
    "constraints": (_text, "a string"),
    "environment": (lambda value: isinstance(value, dict) and all(map(_text, value.values())), "a table of strings"),
    "compare": (_words, "a list of strings"),
}  # fmt: skip


def row_named(name: str, rows: dict[str, MatrixRow]) -> MatrixRow:
    """The row of that name. MatrixError: there is none."""
    if name not in rows:
        raise MatrixError(f"{bare(name)}: no such row{did_you_mean(name, rows)}; one of {', '.join(rows)}")
    return rows[name]


# -- shards and jobs --------------------------------------------------------------------------------------------------
def shard_of(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4), the second of four. MatrixError: the text is no shard."""
    number, slash, count = text.partition("/")
    try:
        parts = integer(1, MOST_SHARDS)(number), integer(1, MOST_SHARDS)(count)
    except argparse.ArgumentTypeError:
        parts = (0, 0)
    if not slash or not 1 <= parts[0] <= parts[1]:
        raise MatrixError(f"--shard {bare(text)}: I/N with I from 1 to N, such as 2/4; N at most {MOST_SHARDS}")
    return parts


def takes_part(row: MatrixRow, when: str, runners: Iterable[str]) -> bool:
    """Whether a row runs at `when`, given the labels of the registered self-hosted runners."""
    return when in row.when and row.own_labels <= set(runners)


def jobs(rows: Iterable[MatrixRow]) -> dict[str, Any]:
    """The jobs in the form of GitHub's strategy.matrix: one for every shard, one for every row that compares."""
    rows = list(rows)

    def job(row: MatrixRow, **more: Any) -> dict[str, Any]:
        return {"row": row.name, "runner": list(row.runner), "python": row.python, "minutes": row.minutes, **more}

    shards = [
        job(row, shard=f"{i}/{row.shards}", name=f"{row.name}-{i}of{row.shards}")
        for row in rows
        for i in range(1, row.shards + 1)
    ]
    return {"rows": {"include": shards}, "compare": {"include": [job(r) for r in rows if r.compare is not None]}}


# -- commands ---------------------------------------------------------------------------------------------------------
def pytest_command(row: MatrixRow, shard: str, path: Path, more: Iterable[str] = ()) -> list[str]:
    """The command that runs one shard and appends its verdicts to the results file `path`."""
    device = row.device.removesuffix("-emulated")
    command = pytest_words(device, path)
    command += [f"--require-device={device}"] if device == row.device else []
    command += ["-m", row.markers] if row.markers else []
    command += [f"--backend={spec}" for spec in row.backends]
    if shard_of(shard)[1] > 1:
        command += [f"--shard={shard}", f"--durations-from={DURATIONS}"]
    return [*command, *spread(row), *row.options, str(ROOT / "cases"), *more]


def spread(row: MatrixRow) -> list[str]:
    """xdist options: a worker for every core on the CPU. On a GPU the plugin decides; timed runs use one process."""
    return [] if row.device in ("cuda", "xpu") or "perf" in row.markers else workers()


def variables(row: MatrixRow, shard: str) -> dict[str, str]:
    """The additional environment variables of a shard."""
    return {**row.environment, ROW: row.name, SHARD: shard}


def install_commands(row: MatrixRow, venv: str = ".venv") -> list[list[str]]:
    """The commands that make the virtual environment of a row.

    A row without its own Python keeps the machine's packages, such as a torch built for its GPU, and adds the missing
    ones. The packages under test are installed without their dependencies: many depend on another torch.
    """
    system = [] if row.python else ["--system-site-packages"]
    what = f".[{','.join(row.extras)}]" if row.extras else "."
    constraints = ["-c", row.constraints] if row.constraints else []
    pip = [f"{venv}/bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    alone = [[*pip, "--no-deps", *row.packages]] if row.packages else []
    return [[sys.executable, "-m", "venv", *system, venv], [*pip, "-e", what, *constraints], *alone]


# -- the command line of this module ----------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that need nothing installed."""
    parser.add_argument("row", nargs="?", metavar="ROW", help="a row of matrix.toml")
    parser.add_argument("--json", action="store_true", help="the jobs, as GitHub's strategy.matrix has them")
    parser.add_argument("--when", choices=WHEN, help="with --json: only rows that run then")
    parser.add_argument("--runners", metavar="LABELS", help="with --json: own labels of the self-hosted runners (all)")
    parser.add_argument("--install", action="store_true", help="make a virtual environment with the packages of ROW")
    parser.add_argument("--venv", default=".venv", metavar="DIR", help="with --install: where (.venv)")


def plain(args: argparse.Namespace) -> int:
    """Run --json or --install. MatrixError: the row or matrix.toml is wrong."""
    rows = read()
    if args.install:
        if not args.row:
            raise MatrixError(f"--install: needs a row, one of {', '.join(rows)}")
        for command in install_commands(row_named(args.row, rows), args.venv):
            print(f"moe-harness: {shlex.join(command)}", flush=True)
            if code := subprocess.run(command, cwd=ROOT).returncode:
                return code
        return 0
    chosen = []
    for row in [row_named(args.row, rows)] if args.row else rows.values():
        runners = row.own_labels if args.runners is None else args.runners.replace(",", " ").split()
        if takes_part(row, args.when or row.when[0], runners):
            chosen.append(row)
        elif args.when in (None, *row.when):
            labels = " ".join(sorted(row.own_labels))
            print(f"moe-harness: {row.name} is left out: no runner with the labels {labels}", file=sys.stderr)
    print(json.dumps(jobs(chosen)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python3 -m harness.ci.matrix`."""
    parser = Parser("python3 -m harness.ci.matrix", description="The commands without installation.")
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, 2 for wrong arguments."""
    try:
        args = parser().parse_args(argv)
        if not (args.json or args.install):
            raise MatrixError("--json or --install; to list and run rows: python3 -m harness matrix")
        return plain(args)
    except UserError as error:
        print(f"moe-harness: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
