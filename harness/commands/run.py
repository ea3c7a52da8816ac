"""`moe-harness run`: one case on one backend, with everything there is to know about it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from harness import backend as backends
from harness import device as devices
from harness.base.errors import UserError
from harness.base.text import number, share
from harness.device import DEVICES, DeviceLost, ready
from harness.problem.case import Case, DescriptorError
from harness.problem.words import in_words
from harness.results import known_failures
from harness.results.verdict import GREEN, Verdict
from harness.run.case import run_case


def register(add: Callable[..., Any]) -> None:
    sub = add(run, "run", "One case on one backend, with everything there is to know about it.")
    sub.add_argument("descriptor", help="such as t16-h256-i128-e8-k2-bf16-exact")
    sub.add_argument("--backend", metavar="SPEC", required=True, help="a backend's name, or package.module:object")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="N seeds, from the descriptor's own on (1)")
    sub.add_argument("--json", action="store_true", help="one JSON record a verdict, and nothing else")


def run(args: argparse.Namespace) -> int:
    try:
        case = Case.parse(args.descriptor)
    except DescriptorError as error:
        raise UserError(f"{error}; those in use: python3 -m harness list --why") from error
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: 1 or more")
    device = ready(args.device)
    backend = backends.load(args.backend)
    if device.emulated and not backend.xpu_contract:
        raise UserError(
            f"--device xpu: {devices.why_absent('xpu')}; to be emulated, {backend.name} must set xpu_contract"
        )
    if device.emulated and not args.json:
        print("xpu is EMULATED on the CPU by Triton's interpreter, nothing runs on an XPU:", devices.why_absent("xpu"))
    entries = known_failures.read()
    counts: Counter[str] = Counter()
    for seed in range(case.seed, case.seed + args.seeds):
        asked = case.change(seed=seed)
        if counts and not args.json:
            print()
        try:
            verdict = run_case(asked, backend, device)
            verdict.spec = args.backend
            known = known_failures.covering(entries, asked, backend.name, str(device))
            verdict.known = known_failures.explanation(verdict, known)
        except DeviceLost as error:
            print(f"moe-harness: the device is lost: {error}", file=sys.stderr)
            return 1
        if args.json:
            print(json.dumps(verdict.record() | {"environment": devices.environment(device)}, default=str), flush=True)
        else:
            print("\n".join(_told(asked, verdict)), flush=True)
        counts[verdict.status] += 1
    if args.seeds > 1 and not args.json:
        print(f"\n{args.seeds} seeds: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    return 0 if set(counts) <= set(GREEN) else 1


def _told(case: Case, verdict: Verdict) -> list[str]:
    lines = [f"{case} on {verdict.backend}, {verdict.device}", *in_words(case)]
    not_run = ", so it was not run" if verdict.status == "unsupported" else ""
    lines.append(f"{verdict.status}{not_run}{': ' + verdict.reason if verdict.reason else ''}")
    lines += [f"  known        {verdict.known}"] if verdict.known else []
    report = verdict.report.rstrip()
    if verdict.calls:
        lines.append(f"  judged       {number(verdict.calls, 'call')} in {verdict.seconds:.2f} s, oracle included")
        each = [f"{name} {share(used)}" for name, used in verdict.budgets.items()]
        told = f" ({', '.join(each)})" if each else ""
        lines.append(f"  budget used  {share(verdict.budget)}{told}; above 1 fails")
        lines += [f"  plan         {verdict.plan}"] if verdict.plan and verdict.plan not in report else []
    if verdict.trace:
        trace = dict(verdict.trace)
        launches = Counter(trace.pop("launches", []))
        named = ", ".join(name + (f" x{n}" if n > 1 else "") for name, n in launches.items())
        lines.append(f"  launched     {named or 'no Triton kernel'}")
        rest = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in trace.items())
        lines.append(f"  traced       {rest}")
    report = report.removeprefix(verdict.reason).strip("\n")  # its first line has been said
    lines += ["", *report.splitlines()] if report else []
    return lines if verdict.green or lines[-1] == verdict.reproduce else [*lines, "", verdict.reproduce]
