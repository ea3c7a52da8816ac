"""`moe-harness capabilities`: what a backend declares against what it does, corner by corner."""

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
    """Declare the command's arguments."""
    sub = add(command, "capabilities", "What backends declare against what they do: right, ignored, wrong, crashed.")
    sub.add_argument("--backend", action="append", default=[], metavar="SPEC", help="only this backend (repeatable)")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument("--corner", action="append", choices=[c for c in CORNERS if c], help="only this (repeatable)")
    sub.add_argument("--json", action="store_true", help="one JSON object a corner, and nothing else")


def command(args: argparse.Namespace) -> int:
    """0 if every corner is right or refused, otherwise 1; UserError if a backend cannot be used here."""
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
        with IsolatedRunner(spec, device) as runner:
            for finding in capabilities.findings(backend, device, runner.run, args.corner or CORNERS):
                counts[finding.word] += 1
                if args.json:
                    print(json.dumps({"backend": backend.name, "device": str(device), **asdict(finding)}), flush=True)
                elif finding.word == "refused" and not finding.disagrees:
                    refused[finding.detail].append(finding.corner or "plain layer")
                else:
                    print(cut(_line(finding)), flush=True)
        bad |= bool(set(counts) - {"right", "refused"})
        if not args.json:
            for reason, corners in refused.items():
                print(cut(f"  refused: {reason}"))
                print(
                    *textwrap.wrap(", ".join(corners), 110, initial_indent=" " * 4, subsequent_indent=" " * 4), sep="\n"
                )
            print("  " + (", ".join(f"{counts[w]} {w}" for w in WORDS if counts[w]) or "it supports no plain layer"))
    return int(bad)


def _line(finding: Finding) -> str:
    """One corner for a reader; "!" where the package declares otherwise."""
    share = f"{finding.budget:.2f}" if finding.word == "right" else ""
    package = ""
    if finding.disagrees:
        package = f"  ! the package {f'refuses it: {finding.declared}' if finding.declared else 'accepts it'}"
    return f"  {finding.corner or 'plain layer':24} {finding.word:8} {share:5}{finding.detail}{package}".rstrip()
