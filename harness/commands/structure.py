"""moe-harness structure: what a call does, in exact numbers, against the baseline in the repository."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.base.errors import UserError
from harness.base.processes import ROOT
from harness.device import DEVICES, ready
from harness.perf.metrics import METRICS, TARGETS

BASELINE = ROOT / "cases" / "structure.toml"
ACCEPT = "python3 -m harness structure --accept"


def register(add: Callable[..., Any]) -> None:
    """Declares the command's arguments."""
    sub = add(structure, "structure", "Launches, allocations, copies, machine code: exact, against the baseline.")
    sub.add_argument("descriptor", nargs="?", help="only this case, shown whole, without the baseline")
    sub.add_argument("--backend", metavar="SPEC", help="its backend: a name, or package.module:object")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu; the baseline is the cpu's)")
    sub.add_argument("--target", action="append", metavar="TARGET", help=f"compile for it ({', '.join(TARGETS)})")
    sub.add_argument(
        "--no-compile", action="store_true", help="leave machine code out: half a minute instead of minutes"
    )
    sub.add_argument("--accept", action="store_true", help="write the baseline anew, and say what changed")
    sub.add_argument(
        "--baseline", type=Path, default=BASELINE, metavar="FILE", help="another file than the repository's"
    )
    sub.add_argument("--json", action="store_true", help="JSON, and nothing else")


def structure(args: argparse.Namespace) -> int:
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
    from harness.perf.count.baseline_file import read

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

    found = baseline.compare(old, device, compiling=not args.no_compile, accepting=args.accept, progress=progress)
    progress("")
    if args.json:
        told = {"changed": found.changes, "not_compared": found.not_compared, "compared": found.compared}
        print(json.dumps(told | {"kernels": found.kernels}))
    else:
        print("\n".join(_told(found)))
    if args.accept:
        return _accept(args, old, found)
    if not args.json and found.changes:
        print(f"\nIf that is meant: {ACCEPT}")
    return 1 if found.changes or not found.compared else 0


def _told(found: Any) -> list[str]:
    lines = [f"not compared: {what}" for what in found.not_compared]
    for key, changes in found.changes.items():
        lines += ["", key, *(f"  {change}" for change in changes)]
    if lines and found.changes:
        lines.append("")
    if not found.compared and not found.changes:
        lines.append("nothing could be compared")
    changed = len(found.changes)
    kernels = f", {found.kernels} compiled kernels" if found.kernels else ""
    return [*lines, f"{found.compared} cases{kernels}: {f'{changed} changed' if changed else 'nothing changed'}"]


def _accept(args: argparse.Namespace, old: Any, found: Any) -> int:
    from harness.perf.count import baseline
    from harness.perf.count.baseline_file import render

    missing = [block.key for block in found.fresh.blocks if block.record is None]
    if missing:
        raise UserError(
            f"--accept: {len(missing)} cases have no numbers here, so nothing is written: {', '.join(missing)}"
        )
    if render(old) == render(found.fresh):
        return 0
    baseline.write(args.baseline, found.fresh)
    if not args.json:
        print(f"\naccepted: {args.baseline}")
    return 0


# -- one case ---------------------------------------------------------------------------------------------------------
def _show(args: argparse.Namespace) -> int:
    from harness import backend as backends
    from harness.perf.count.compiled import gpu
    from harness.perf.count.structure import NotCorrect, NotMeasured, compile_for, measure
    from harness.problem.case import Case

    case = Case.parse(args.descriptor)
    targets = args.target or list(TARGETS)
    for target in targets:
        try:
            gpu(target)
        except ValueError as error:
            raise UserError(f"--{error}") from error
    device = ready(args.device)
    try:
        found = measure(case, backends.load(args.backend), device)
    except (NotCorrect, NotMeasured) as error:
        print(f"moe-harness: not measured: {error}", file=sys.stderr)
        return 1
    if not args.no_compile:
        found = compile_for(found, targets)
    if args.json:
        print(json.dumps({"case": str(case), "backend": args.backend, "device": str(device)} | found.record()))
        return 0
    print(f"{case} @ {args.backend} on {device}" + ("" if args.device == "cpu" else " (the baseline is the cpu's)"))
    print("\n".join(_whole(found)))
    return 0


def _whole(found: Any) -> list[str]:
    lines = [f"  {name:16} {value:>8}  {METRICS[name].counts}" for name, value in found.metrics.items()]
    for title, values in (
        ("launched", found.kernels),
        ("allocated", found.allocations),
        ("waits", [f"{n} {what}" for what, n in found.waits.items()]),
        ("copies", [f"{n} {what}" for what, n in found.copies.items()]),
        ("operators", [f"{n:4} {what}" for what, n in found.operators.items()]),
        ("Python functions", [f"{n:4} {what}" for what, n in found.functions.items()]),
    ):
        lines += ["", title, *(f"  {value}" for value in values)] if values else []
    for kernel, targets in found.compiled.items():
        lines += ["", kernel]
        for target, numbers in targets.items():
            parts = ", ".join(f"{k} {_short(v)}" for k, v in numbers.items())
            lines.append(f"  {target:8} {parts}")
    return lines


def _short(value: Any) -> str:
    return " ".join(f"{k}:{v}" for k, v in value.items()) or "none" if isinstance(value, dict) else str(value)
