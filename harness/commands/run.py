"""`moe-harness run`: one case on one backend, in full detail."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from harness import backend as backends
from harness import device as devices
from harness.base.arguments import integer, seconds
from harness.base.errors import UserError
from harness.base.table import labelled
from harness.base.text import inert, number, share, shortened
from harness.commands import parse_case
from harness.device import DEVICES, DeviceLost, ready
from harness.problem.case import Case
from harness.problem.words import in_words
from harness.results import known_failures
from harness.results.verdict import GREEN, OUTPUT, REPORT, Verdict
from harness.run.case import run_case
from harness.run.supervisor import LIMIT, Supervisor


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(run, "run", "One case on one backend, with everything there is to know about it.")
    sub.add_argument("descriptor", help="such as t16-h256-i128-e8-k2-bf16-exact")
    sub.add_argument("--backend", metavar="SPEC", required=True, help="a backend's name, or package.module:object")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument(
        "--seeds", type=integer(1, 10**6), default=1, metavar="N", help="N seeds, from the descriptor's own on (1)"
    )
    sub.add_argument("--json", action="store_true", help="one JSON record a verdict, and nothing else")
    sub.add_argument(
        "--case-timeout", type=seconds, default=LIMIT, metavar="SECONDS", help=f"of the backend ({LIMIT:g})"
    )
    sub.add_argument("--in-process", action="store_true", help="in this process, for a debugger")


def run(args: argparse.Namespace) -> int:
    """0 if every verdict is green, otherwise 1; UserError if the arguments cannot be used."""
    case = parse_case(args.descriptor)
    device = ready(args.device)
    backend = backends.load(args.backend)
    if device.emulated and not backend.xpu_contract:
        raise UserError(
            f"--device xpu: {devices.why_absent('xpu')}; to be emulated, {backend.name} must set xpu_contract"
        )
    if reason := backends.unavailable(backend, device):
        raise UserError(f"--backend {args.backend} on {device}: {reason}")
    if device.emulated and not args.json:
        print("xpu is EMULATED on the CPU by Triton's interpreter, nothing runs on an XPU:", devices.why_absent("xpu"))
    entries = known_failures.read()
    counts: Counter[str] = Counter()
    with Supervisor([device], args.case_timeout, loaded={args.backend: backend}) as supervisor:
        for seed in range(case.seed, case.seed + args.seeds):
            seeded = case.change(seed=seed)
            if counts and not args.json:
                print()
            try:
                if args.in_process:
                    verdict = run_case(seeded, backend, device, spec=args.backend)
                else:
                    verdict = supervisor.run(seeded, args.backend, device, name=backend.name)
            except DeviceLost as error:
                print(f"moe-harness: the device is lost: {error}", file=sys.stderr)
                return 1
            known = known_failures.covering(entries, seeded, backend.name, str(device))
            verdict.known = known_failures.explanation(verdict, known)
            record = verdict.record()
            if args.json:
                print(json.dumps(record | {"environment": devices.environment(device)}, default=str), flush=True)
            else:
                print("\n".join(map(inert, _lines(seeded, verdict))), flush=True)
            counts[verdict.status] += 1
    if args.seeds > 1 and not args.json:
        print(f"\n{args.seeds} seeds: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    return 0 if set(counts) <= set(GREEN) else 1


def _lines(case: Case, verdict: Verdict) -> list[str]:
    """The verdict for a reader: the case in words, the verdict, what was measured, and the report."""
    not_run = ", so it was not run" if verdict.status == "unsupported" else ""
    lines = [
        f"{case} on {verdict.backend}, {verdict.device}",
        *in_words(case),
        f"{verdict.status}{not_run}{': ' + verdict.reason if verdict.reason else ''}",
        *labelled([*_measured(verdict), *_traced(verdict)]),
    ]
    details = shortened(verdict.details, REPORT, REPORT // 4).splitlines()
    lines += ["", *details] if details else []
    lines += ["", "It printed:", *shortened(verdict.output, OUTPUT, OUTPUT // 2).splitlines()] if verdict.output else []
    return lines if verdict.green or lines[-1] == verdict.reproduce else [*lines, "", verdict.reproduce]


def _measured(verdict: Verdict) -> Iterator[tuple[str, str]]:
    if verdict.known:
        yield "known", verdict.known
    for note in verdict.notes:
        yield "note", note
    if not verdict.calls:
        return
    yield "judged", f"{number(verdict.calls, 'call')} in {verdict.seconds:.2f} s, oracle included"
    each = ", ".join(f"{name} {share(used)}" for name, used in verdict.budgets.items())
    yield "budget used", f"{share(verdict.budget)}{f' ({each})' if each else ''}; above 1 fails"
    if verdict.plan and verdict.plan not in verdict.report:
        yield "plan", verdict.plan


def _traced(verdict: Verdict) -> Iterator[tuple[str, str]]:
    if not verdict.trace:
        return
    launches = Counter(verdict.trace.get("launches", []))
    names = ", ".join(name + (f" x{n}" if n > 1 else "") for name, n in launches.items())
    yield "launched", names or "no Triton kernel"
    rest = ((name, value) for name, value in verdict.trace.items() if name != "launches")
    yield "traced", ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in rest)
