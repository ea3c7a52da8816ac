"""`moe-harness verify`, the whole suite on every device of this machine, and `moe-harness floor`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import device as devices
from harness.base.arguments import MOST_JOBS, integer
from harness.base.errors import UserError
from harness.base.processes import ROOT, environment, exit_code, pytest_words, workers
from harness.device import DEVICES
from harness.results.file import ResultsError
from harness.results.floor import new_floor
from harness.results.merge import merge

NO_RUN = {"--collect-only", "--co", "--help", "-h", "--version"}  #: words for pytest after which it runs nothing


def register(add: Callable[..., Any]) -> None:
    """Declare the arguments of both commands."""
    sub = add(verify, "verify", "The whole suite on every device of this machine, one process for each.")
    sub.add_argument("--device", action="append", choices=DEVICES, help="only this device (repeatable)")
    sub.add_argument("--backend", action="append", default=[], metavar="SPEC", help="only this backend (repeatable)")
    sub.add_argument(
        "--jobs", type=integer(1, MOST_JOBS), metavar="N", help="pytest-xdist workers (all cores; on a GPU at most 4)"
    )
    sub.add_argument("pytest", nargs="*", metavar="-- PYTEST OPTION", help="passed on to pytest")

    sub = add(floor, "floor", "A floor file from a results file: 90 %% of the verdicts that the last run executed.")
    sub.add_argument("results", type=Path, help="a results file (JSON Lines)")


def verify(args: argparse.Namespace) -> int:
    """Run pytest once for each device. Returns the worst exit code; 1 at least if a run is not whole."""
    codes = []
    for name in args.device or devices.present():
        command, path = pytest_command(name, args.backend, args.jobs, args.pytest)
        print(f"moe-harness: {' '.join(command[1:])}", flush=True)
        code = exit_code(subprocess.run(command, env=environment()).returncode)
        if code:
            print(f"moe-harness: {name}: pytest ended with {code}", flush=True)
        codes.append(max(code, report_unfinished(path, args.pytest, code)))
    return max(codes)


def pytest_command(device: str, specs: list[str], jobs: int | None, more: list[str]) -> tuple[list[str], Path]:
    """The pytest command for one device, and its results file.

    specs: values of --backend; jobs: workers; more: further words for pytest.
    """
    path = Path("results") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{device}.jsonl"
    command = [*pytest_words(device, path), f"--floor={ROOT / 'cases' / 'floor.toml'}"]
    command += [f"--backend={spec}" for spec in specs]
    command += workers(jobs) if jobs or device == "cpu" else []  # on a GPU the plugin chooses their number
    return [*command, str(ROOT / "cases"), *more], path


def report_unfinished(path: Path, words: Iterable[str], code: int) -> int:
    """Print why the last run of a results file is not whole. Returns 1 then, else 0.

    words: those for pytest; code: its exit code.
    """
    if NO_RUN & set(words) or (code and not path.exists()):
        return 0  # it runs nothing, or has said why it did not begin
    try:
        runs = merge([path]).runs
        problems = runs[-1].problems if runs else ["there is no run in it"]
    except ResultsError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"moe-harness: {path}: the run is not whole: {problem}", flush=True)
    return 1 if problems else 0


def floor(args: argparse.Namespace) -> int:
    """Print a floor file. UserError: the results file holds no verdicts, or the last run on a device is not whole."""
    merged = merge([args.results])
    for line in merged.remarks:
        print(f"moe-harness: {line}", file=sys.stderr)
    if merged.invalid or not merged.records:
        raise UserError(next(iter(merged.invalid), f"{args.results}: holds no verdicts"))
    last = {str(record["device"]): str(record.get("run", "")) for record in merged.records}
    for run in merged.runs:
        if run.name in last.values() and not run.whole:
            raise UserError(f"{args.results}: run {run.name} is not whole: {run.problems[0]}")
    print(new_floor(merged.records), end="")
    return 0
