"""`moe-harness verify`, the whole suite on every device of this machine, and `moe-harness floor`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import device as devices
from harness.base.errors import UserError
from harness.base.processes import ROOT, environment, exit_code, pytest_words, workers
from harness.device import DEVICES
from harness.results.file import read_results
from harness.results.floor import new_floor


def register(add: Callable[..., Any]) -> None:
    """Declare the arguments of both commands."""
    sub = add(verify, "verify", "The whole suite on every device of this machine, one process for each.")
    sub.add_argument("--device", action="append", choices=DEVICES, help="only this device (repeatable)")
    sub.add_argument("--backend", action="append", default=[], metavar="SPEC", help="only this backend (repeatable)")
    sub.add_argument("--jobs", type=int, metavar="N", help="pytest-xdist workers (all cores; on a GPU at most 4)")
    sub.add_argument("pytest", nargs="*", metavar="-- PYTEST OPTION", help="passed on to pytest")

    sub = add(floor, "floor", "A floor file from a results file: 90 %% of the verdicts that the last run executed.")
    sub.add_argument("results", type=Path, help="a results file (JSON Lines)")


def verify(args: argparse.Namespace) -> int:
    """Run pytest once for each device. Returns the worst exit code."""
    codes = []
    for name in args.device or devices.present():
        command = pytest_command(name, args.backend, args.jobs, args.pytest)
        print(f"moe-harness: {' '.join(command[1:])}", flush=True)
        codes.append(exit_code(subprocess.run(command, env=environment()).returncode))
        if codes[-1]:
            print(f"moe-harness: {name}: pytest ended with {codes[-1]}", flush=True)
    return max(codes)


def pytest_command(device: str, specs: list[str], jobs: int | None, more: list[str]) -> list[str]:
    """The pytest command for one device. specs: values of --backend; jobs: workers; more: further words for pytest."""
    path = Path("results") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{device}.jsonl"
    command = [*pytest_words(device, path), f"--floor={ROOT / 'cases' / 'floor.toml'}"]
    command += [f"--backend={spec}" for spec in specs]
    command += workers(jobs) if jobs or device == "cpu" else []  # on a GPU the plugin chooses their number
    return [*command, str(ROOT / "cases"), *more]


def floor(args: argparse.Namespace) -> int:
    """Print a floor file. UserError: the results file holds no records."""
    records, remarks = read_results(args.results)
    for remark in remarks:
        print(f"moe-harness: {remark}", file=sys.stderr)
    if not records:
        raise UserError(f"{args.results}: holds no records")
    print(new_floor(records), end="")
    return 0
