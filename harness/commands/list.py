"""`moe-harness list`: the cases by family, and the glossary of descriptors."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

from harness import backend as backends
from harness import device as devices
from harness.base.errors import UserError, bare
from harness.base.suggest import did_you_mean
from harness.base.table import aligned
from harness.base.text import cut
from harness.device import DEVICES, Device, ready
from harness.problem import families
from harness.problem.case import FILLS, Case
from harness.problem.words import glossary


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(show, "list", "The cases, by family.")
    sub.add_argument("--family", help="only this family")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="the cases of this device (cpu)")
    sub.add_argument("--backend", metavar="SPEC", help="only the cases that this backend supports")
    sub.add_argument("--why", action="store_true", help="every case, and the reason why it exists")
    sub.add_argument("--grammar", action="store_true", help="the tokens of a descriptor and their meaning, no cases")


def show(args: argparse.Namespace) -> int:
    """Print the families, the cases or the grammar."""
    if args.grammar:
        print("A descriptor is a list of these tokens, joined by -. The sizes and the dtype are required.")
        print("\n".join(aligned([("token", "field", "meaning"), *glossary()])))
        return 0
    device = ready(args.device) if args.backend or args.device in devices.present() else Device(args.device)
    backend = backends.load(args.backend) if args.backend else None
    modules = {module.FAMILY: module for module in families.families()}
    if args.family and args.family not in modules:
        words = did_you_mean(args.family, modules)
        raise UserError(f"--family {bare(args.family)}: no such family{words}; one of {', '.join(sorted(modules))}")
    lines, total = [], 0
    for family, module in sorted(modules.items()):
        if args.family not in (None, family):
            continue
        rows = [
            row for row in families.rows(module, device.on_cpu) if not backend or _supports(backend, row.case, device)
        ]
        total += len(rows)
        if args.why:
            for row in rows:
                print(f"{row.case}  {row.why}")
        else:
            fills = Counter(row.case.fill for row in rows)
            parts = ", ".join(f"{fills[fill]} {fill}" for fill in FILLS if fills[fill])
            lines.append((family, str(len(rows)), f"cases ({parts or 'none'})  {_first_line(module)}"))
    if not args.why:
        lines.append(("all", str(total), f"cases on {device}" + (f" for {backend.name}" if backend else "")))
        print("\n".join(map(cut, aligned(lines, right={1}, gap=1))))
    return 0


def _supports(backend: Any, case: Case, device: Device) -> bool:
    return backends.unsupported(backend, case.problem, device) is None


def _first_line(module: Any) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0]
