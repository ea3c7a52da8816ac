"""`moe-harness matrix`: list the rows of matrix.toml, run one, print the jobs of CI."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import device as devices
from harness.base.arguments import positionals_after_options, writable_file
from harness.base.errors import UserError
from harness.base.processes import ROOT, environment, exit_code
from harness.base.table import aligned
from harness.base.text import number
from harness.ci import gather, matrix
from harness.ci.durations import condensed
from harness.ci.matrix import MatrixRow
from harness.commands.verify import report_unfinished
from harness.results.merge import merge


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(command, "matrix", "The rows of the CI matrix; or one of them, run here exactly as CI does.")
    matrix.add_arguments(sub)
    sub.add_argument("--shard", default="", metavar="I/N", help="the I-th of N parts (all that a row has, in one)")
    sub.add_argument(
        "--results", type=writable_file, metavar="PATH", help="the results file (in results/, named after the row)"
    )
    sub.add_argument("--compare", nargs=2, metavar=("BASE", "HEAD"), help="the row's `moe-harness compare` instead")
    sub.add_argument("--durations", nargs="+", metavar="RESULTS", help="print a durations file made of these results")
    sub.add_argument("pytest", nargs="*", metavar="-- PYTEST OPTION", help="passed on to pytest")
    positionals_after_options(sub, "pytest")


def command(args: argparse.Namespace) -> int:
    """List the rows or run one. MatrixError, ResultsError, UserError: an argument or a file cannot be used."""
    if args.json or args.install:
        return matrix.plain(args)
    if args.durations:
        return _durations(args.durations)
    rows = matrix.read()
    if not args.row:
        print("\n".join(_table(list(rows.values()))))
        return 0
    row = matrix.row_named(args.row, rows)
    return _compare(row, *args.compare) if args.compare else _run(row, args)


def _durations(paths: list[str]) -> int:
    merged = merge(paths)
    for line in merged.remarks + merged.invalid:
        print(f"moe-harness: {line}", file=sys.stderr)
    if not merged.records:
        raise UserError(f"--durations {', '.join(paths)}: no verdict in it that can be read")
    print(condensed(merged.records), end="")
    return 0


# -- the list ---------------------------------------------------------------------------------------------------------
def _table(rows: list[MatrixRow]) -> list[str]:
    lines = [("row", "runner", "device", "markers", "shards", "minutes", "when", "floor", "here")]
    why: dict[str, list[str]] = {}
    for row in rows:
        floor = f"{sum(row.floor.values())} ({number(len(row.floor), 'backend')})"
        if reason := absent(row):
            why.setdefault(reason, []).append(row.name)
        here, when = "no" if reason else "yes", ", ".join(row.when)
        runner, markers = " ".join(row.runner), row.markers or "-"
        lines.append((row.name, runner, row.device, markers, str(row.shards), str(row.minutes), when, floor, here))
    return [*aligned(lines), *(f"not here: {', '.join(names)}: {reason}" for reason, names in why.items())]


def absent(row: MatrixRow) -> str:
    """Why the row cannot run on this machine, or ""."""
    if row.device == "xpu-emulated":
        return "an XPU is here, nothing is emulated" if "xpu" in devices.present() else ""
    return "" if row.device in devices.present() else devices.why_absent(row.device)


# -- a run ------------------------------------------------------------------------------------------------------------
def _run(row: MatrixRow, args: argparse.Namespace) -> int:
    if reason := absent(row):
        raise UserError(f"{row.name} cannot run here: {reason}")
    shard = args.shard or "1/1"
    number, count = matrix.shard_of(shard)
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{row.name}-{number}of{count}.jsonl"
    path = args.results or Path("results") / name
    words = matrix.pytest_command(row, shard, path, args.pytest)
    variables = [f"{name}={shlex.quote(value)}" for name, value in matrix.variables(row, shard).items()]
    print(f"moe-harness: {' '.join(variables)} {shlex.join(['python3', *words[1:]])}", flush=True)
    returned = subprocess.run(words, env=environment() | matrix.variables(row, shard)).returncode
    code = exit_code(returned)
    code = max(code, report_unfinished(path, args.pytest, code))
    if returned < 0:
        return code
    if count > 1 or args.pytest:
        print(f"moe-harness: the floor of {row.name} is for all its shards: python3 -m harness summary RESULTS")
        return code
    return max(code, _below_floor(row, path))


def _below_floor(row: MatrixRow, path: Path) -> int:
    problems = gather.below_floor(row, gather.last_of_each(merge([path]).records))
    for problem in problems:
        print(f"moe-harness: {problem}")
    return 1 if problems else 0


def _compare(row: MatrixRow, base: str, head: str) -> int:
    if row.compare is None:
        raise UserError(f"{row.name}: compares nothing (no key compare in matrix.toml)")
    words = [sys.executable, "-m", "harness", "compare", base, head]
    words += [f"--device={row.device.removesuffix('-emulated')}", *row.compare]
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        words.append(f"--markdown={page}")
    print(f"moe-harness: {shlex.join(['python3', *words[1:]])}", flush=True)
    return exit_code(subprocess.run(words, cwd=ROOT, env=environment() | row.environment).returncode)
