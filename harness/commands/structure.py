"""`moe-harness structure`: count what one call does, and compare the counts with the baseline in the repository."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.base.errors import UserError
from harness.commands import parse_case
from harness.device import DEVICES, ready
from harness.perf.count.baseline_file import BASELINE, Baseline, read, render
from harness.perf.metrics import TARGETS

ACCEPT = "python3 -m harness structure --accept"


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(structure, "structure", "Launches, allocations, copies, machine code: exact, against the baseline.")
    sub.add_argument("descriptor", nargs="?", help="only this case, with all its numbers, without the baseline")
    sub.add_argument("--backend", metavar="SPEC", help="its backend: a name, or package.module:object")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu; the baseline is the cpu's)")
    sub.add_argument("--target", action="append", metavar="TARGET", help=f"compile for it ({', '.join(TARGETS)})")
    sub.add_argument(
        "--no-compile", action="store_true", help="leave out machine code: half a minute instead of minutes"
    )
    sub.add_argument("--accept", action="store_true", help="rewrite the baseline, and print the changes")
    sub.add_argument(
        "--baseline", type=Path, default=BASELINE, metavar="FILE", help="another file than the repository's"
    )
    sub.add_argument("--json", action="store_true", help="JSON, and nothing else")


def structure(args: argparse.Namespace) -> int:
    """Show one case, or compare all cases of the baseline. Exit code 1: a change, or a case that is not measured."""
    if args.descriptor is None:
        return _check(args)
    if args.backend is None:
        raise UserError(f"{args.descriptor}: needs --backend SPEC")
    if args.accept:
        raise UserError(f"--accept takes no case: it writes all of {args.baseline.name}; add the case there first")
    return _show(args)


# -- the baseline -----------------------------------------------------------------------------------------------------
def _check(args: argparse.Namespace) -> int:
    from harness.perf.count import baseline
    from harness.perf.count.report import check_lines

    if args.device != "cpu" or args.backend or args.target:
        option = "--backend" if args.backend else "--target" if args.target else f"--device {args.device}"
        raise UserError(f"{option}: needs a DESCRIPTOR; the baseline is the cpu's, for all its backends and targets")
    if args.accept and args.no_compile:
        raise UserError("--accept --no-compile: a baseline without machine code is not one; leave --no-compile out")
    old = read(args.baseline)
    device = ready("cpu")

    def progress(line: str) -> None:
        if sys.stderr.isatty() and not args.json:
            print(f"\r\033[K{line[:100]}", end="", file=sys.stderr, flush=True)

    check = baseline.check(old, device, compiling=not args.no_compile, accepting=args.accept, progress=progress)
    progress("")
    if args.json:
        record = {"changed": check.changes, "not_compared": check.not_compared, "compared": check.compared}
        print(json.dumps(record | {"kernels": check.kernels}))
    else:
        print("\n".join(check_lines(check)))
    if args.accept:
        return _accept(args, old, check.fresh)
    if not args.json and check.changes:
        print(f"\nIf that is meant: {ACCEPT}")
    return 1 if check.changes or not check.compared else 0


def _accept(args: argparse.Namespace, old: Baseline, fresh: Baseline) -> int:
    from harness.perf.count import baseline

    missing = [block.key for block in fresh.blocks if block.record is None]
    if missing:
        raise UserError(
            f"--accept: {len(missing)} cases have no numbers here, so nothing is written: {', '.join(missing)}"
        )
    if render(old) == render(fresh):
        return 0
    baseline.write(args.baseline, fresh)
    if not args.json:
        print(f"\naccepted: {args.baseline}")
    return 0


# -- one case ---------------------------------------------------------------------------------------------------------
def _show(args: argparse.Namespace) -> int:
    from harness import backend as backends
    from harness.perf.count.compiled import gpu
    from harness.perf.count.report import counts_lines
    from harness.perf.count.structure import NotCorrect, NotMeasured, compile_for, measure

    case = parse_case(args.descriptor)
    targets = args.target or list(TARGETS)
    for target in targets:
        try:
            gpu(target)
        except ValueError as error:
            raise UserError(f"--{error}") from error
    device = ready(args.device)
    try:
        counts = measure(case, backends.load(args.backend), device)
    except (NotCorrect, NotMeasured) as error:
        print(f"moe-harness: not measured: {error}", file=sys.stderr)
        return 1
    if not args.no_compile:
        counts = compile_for(counts, targets)
    if args.json:
        print(json.dumps({"case": str(case), "backend": args.backend, "device": str(device)} | counts.record()))
        return 0
    print(f"{case} @ {args.backend} on {device}" + ("" if args.device == "cpu" else " (the baseline is the cpu's)"))
    print("\n".join(counts_lines(counts)))
    return 0
