"""moe-harness capabilities: what a backend declares against what it does, corner by corner."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from harness import backend as backends
from harness.base.errors import UserError
from harness.base.text import cut
from harness.device import DEVICES, ready
from harness.run import capabilities
from harness.run.capabilities import CORNERS, WORDS, Finding
from harness.run.isolated import IsolatedRunner


def register(add: Callable[..., Any]) -> None:
    """Declares the command's arguments."""
    sub = add(command, "capabilities", "What backends declare against what they do: right, ignored, wrong, crashed.")
    sub.add_argument("--backend", action="append", default=[], metavar="SPEC", help="only this backend (repeatable)")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument("--corner", action="append", choices=[c for c in CORNERS if c], help="only this (repeatable)")
    sub.add_argument("--json", action="store_true", help="one JSON object a corner, and nothing else")


def command(args: argparse.Namespace) -> int:
    device = ready(args.device)
    specs = args.backend or [
        b.name
        for b in backends.installed()
        if not backends.unavailable(b, device) and (not device.emulated or b.xpu_contract)
    ]
    bad = False
    for n, spec in enumerate(specs):
        backend = backends.load(spec)
        if reason := backends.unavailable(backend, device):
            raise UserError(f"--backend {spec} cannot be used on {device}: {reason}")
        if not args.json:
            print(*[""] * bool(n), f"{backend.name} on {device}", sep="\n", flush=True)
        counts: Counter[str] = Counter()
        refused: dict[str, list[str]] = defaultdict(list)
        with IsolatedRunner(spec, device) as apart:
            for found in capabilities.findings(backend, device, apart.run, args.corner or CORNERS):
                counts[found.word] += 1
                if args.json:
                    print(json.dumps({"backend": backend.name, "device": str(device), **asdict(found)}), flush=True)
                elif found.word == "refused" and not found.disagrees:
                    refused[found.detail].append(found.corner or "plain layer")
                else:
                    print(cut(line(found)), flush=True)
        bad |= bool(set(counts) - {"right", "refused"})
        if not args.json:
            for reason, corners in refused.items():
                print(cut(f"  refused: {reason}"))
                print(
                    *textwrap.wrap(", ".join(corners), 110, initial_indent=" " * 4, subsequent_indent=" " * 4), sep="\n"
                )
            print("  " + (", ".join(f"{counts[w]} {w}" for w in WORDS if counts[w]) or "it supports no plain layer"))
    return int(bad)


def line(found: Finding) -> str:
    """One corner for a reader; "!" where the package says otherwise."""
    share = f"{found.budget:.2f}" if found.word == "right" else ""
    package = ""
    if found.disagrees:
        package = f"  ! the package {f'refuses it: {found.declared}' if found.declared else 'accepts it'}"
    return f"  {found.corner or 'plain layer':24} {found.word:8} {share:5}{found.detail}{package}".rstrip()
