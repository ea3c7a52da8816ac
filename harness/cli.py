"""The command line, `moe-harness` or `python3 -m harness`: doctor, list, run, verify, floor; more in commands/.

A process uses either the interpreter or a GPU, never both: whatever concerns several devices starts one process each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import backend as backends
from harness import battery, ledger, results, summary
from harness import device as devices
from harness.backend import BackendError
from harness.commands import bisect, capabilities, compare, fuzz, gather, matrix, mutate, report, structure
from harness.commands.common import ROOT, Wrong, environment, the_device
from harness.device import DEVICES, Device, DeviceLost
from harness.problem import FILLS, Case, DescriptorError, Problem
from harness.processes import exit_code, pytest_words, workers
from harness.verdict import GREEN, Verdict

PACKAGES = ("torch", "triton", "numpy", "ml_dtypes", "pytest", "pytest-xdist", "pytest-benchmark", "transformers")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 good, 1 something is not green, 2 wrong arguments."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a kernel author's own directory, for --backend package.module:object
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (Wrong, BackendError, DescriptorError, results.ResultsError, ledger.LedgerError) as error:
        print(f"moe-harness: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `moe-harness list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it flushes at exit
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("moe-harness", description="Is this fused MoE kernel right?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Any, name: str, summary: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=summary, description=summary)
        found.set_defaults(command=command)
        return found

    sub = add(doctor, "doctor", "What is here: devices, versions, and which backend can run where.")
    sub.add_argument("--device", choices=DEVICES, help="only this device")

    sub = add(show, "list", "The cases, by family.")
    sub.add_argument("--family", help="only this family")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="the cases of this device (cpu)")
    sub.add_argument("--backend", metavar="SPEC", help="only the cases that this backend supports")
    sub.add_argument("--why", action="store_true", help="every case, and the reason why it exists")

    sub = add(run, "run", "One case on one backend, with everything there is to know about it.")
    sub.add_argument("descriptor", help="such as t16-h256-i128-e8-k2-bf16-exact")
    sub.add_argument("--backend", metavar="SPEC", required=True, help="a backend's name, or package.module:object")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="N seeds, from the descriptor's own on (1)")
    sub.add_argument("--json", action="store_true", help="one JSON record a verdict, and nothing else")

    sub = add(verify, "verify", "The whole battery on every device that is here, a process for each.")
    sub.add_argument("--device", action="append", choices=DEVICES, help="only this device (repeatable)")
    sub.add_argument("--backend", action="append", default=[], metavar="SPEC", help="only this backend (repeatable)")
    sub.add_argument("--jobs", type=int, metavar="N", help="pytest-xdist workers (all cores; on a GPU at most 4)")
    sub.add_argument("pytest", nargs="*", metavar="-- PYTEST OPTION", help="handed on to pytest")

    sub = add(floor, "floor", "A floor file made from a results file: 90 %% of what the last run executed.")
    sub.add_argument("results", type=Path, help="a results file (JSON Lines)")

    for module in (capabilities, structure, compare, bisect, matrix, mutate, fuzz, gather, report):
        module.register(add)
    return parser


# -- doctor -----------------------------------------------------------------------------------------------------------
def doctor(args: argparse.Namespace) -> int:
    if args.device:
        return _doctor_of(args.device)
    print(f"python        {platform.python_version()} ({sys.executable})")
    for package in PACKAGES:
        print(f"{package:13} {_version(package)}")
    for name in DEVICES:
        print()
        sys.stdout.flush()
        if name in devices.present():
            subprocess.run([sys.executable, "-m", "harness", "doctor", "--device", name], env=environment())
        else:
            print(f"{name}: {devices.why_absent(name)}")
            if name == "xpu":
                print("  its contract can be emulated on the CPU: pytest cases -m xpu")
    return 0


def _doctor_of(name: str) -> int:
    device = the_device(name)
    found = devices.environment(device)
    detail = ", ".join(f"{k} {v}" for k, v in found.items() if k in ("device_name", "cuda", "capability"))
    print(f"{device}: {detail or platform.machine()}, {device.memory_bytes() / 2**30:.1f} GiB free")
    for backend in backends.installed():
        print(f"  {backend.name:24} {backends.unavailable(backend, device) or 'usable'}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# -- list -------------------------------------------------------------------------------------------------------------
def show(args: argparse.Namespace) -> int:
    device = the_device(args.device) if args.backend or args.device in devices.present() else Device(args.device)
    backend = backends.load(args.backend) if args.backend else None
    modules = {module.FAMILY: module for module in battery.families()}
    if args.family and args.family not in modules:
        raise Wrong(f"--family {args.family}: one of {', '.join(sorted(modules))}")
    total = 0
    for family, module in sorted(modules.items()):
        if args.family not in (None, family):
            continue
        rows = [row for row in battery.rows(module, device) if not backend or _supports(backend, row.case, device)]
        total += len(rows)
        if args.why:
            for row in rows:
                print(f"{row.case}  {row.why}")
        else:
            fills = Counter(row.case.fill for row in rows)
            parts = ", ".join(f"{fills[fill]} {fill}" for fill in FILLS if fills[fill])
            print(summary.cut(f"{family:24} {len(rows):5} cases ({parts or 'none'})  {_first_line(module)}").rstrip())
    if not args.why:
        print(f"{'all':24} {total:5} cases on {device}" + (f" for {backend.name}" if backend else ""))
    return 0


def _supports(backend: Any, case: Case, device: Device) -> bool:
    return backends.unsupported(backend, case.problem, device) is None


def _first_line(module: Any) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0]


# -- run --------------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> int:
    try:
        case = Case.parse(args.descriptor)
    except DescriptorError as error:
        raise Wrong(f"{error}; those in use: python3 -m harness list --why") from error
    if args.seeds < 1:
        raise Wrong(f"--seeds {args.seeds}: 1 or more")
    device = the_device(args.device)
    backend = backends.load(args.backend)
    if device.emulated and not getattr(backend, "xpu_contract", False):
        raise Wrong(f"--device xpu: {devices.why_absent('xpu')}; to be emulated, {backend.name} must set xpu_contract")
    if device.emulated and not args.json:
        print("xpu is EMULATED on the CPU by Triton's interpreter, nothing runs on an XPU:", devices.why_absent("xpu"))
    from harness import check

    entries = ledger.read()
    counts: Counter[str] = Counter()
    for seed in range(case.seed, case.seed + args.seeds):
        asked = case.change(seed=seed)
        if counts and not args.json:
            print()
        try:
            verdict = check.run(asked, backend, device)
            verdict.spec = args.backend
            known = ledger.covering(entries, asked, backend.name, str(device))
            verdict.known = ledger.explanation(verdict, known)
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


def in_words(case: Case) -> list[str]:
    """The case for a reader, line by line."""
    p: Problem = case.problem
    scheme = "unquantized"
    if p.quant:
        taken = f"activations quantized per {p.quant.activation}" if p.quant.activation else "activations not quantized"
        scheme = f"{p.quant.weight_format} weights scaled per {p.quant.weight}, {taken}"
    shape = "x".join(map(str, (p.local_experts, p.w13_rows, p.hidden_size)))
    more = [
        f"activation {p.activation}" + (f" clamped at {p.limit:g}" if p.limit is not None else ""),
        "biases" if p.bias else "",
        "router weight on input" if p.router_weight_on_input else "",
        f"rank {p.ep.rank} of {p.ep.size}{' (strided)' if p.ep.strided else ''}" if p.ep else "",
        f"{p.shared_experts} shared experts" if p.shared_experts else "",
        "rows of hidden_states padded" if p.padded else "",
    ]
    return [
        f"  {p.tokens} tokens of {p.hidden_size}, top {p.top_k} of {p.num_experts} experts of {p.intermediate_size}",
        f"  {p.dtype}, {scheme}",
        f"  w13 {shape}, layout {p.layout}; topk_ids int{p.ids}, routing {p.routing}",
        f"  {', '.join(filter(None, more))}",
        f"  fill {case.fill}, seed {case.seed}, scenario {case.scenario}",
    ]


def _told(case: Case, verdict: Verdict) -> list[str]:
    lines = [f"{case} on {verdict.backend}, {verdict.device}", *in_words(case)]
    not_run = ", so it was not run" if verdict.status == "unsupported" else ""
    lines.append(f"{verdict.status}{not_run}{': ' + verdict.reason if verdict.reason else ''}")
    lines += [f"  known        {verdict.known}"] if verdict.known else []
    report = verdict.report.rstrip()
    if verdict.calls:
        lines.append(
            f"  judged       {summary.number(verdict.calls, 'call')} in {verdict.seconds:.2f} s, oracle included"
        )
        each = [f"{name} {summary.share(used)}" for name, used in verdict.budgets.items()]
        told = f" ({', '.join(each)})" if each else ""
        lines.append(f"  budget used  {summary.share(verdict.budget)}{told}; above 1 fails")
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


# -- verify and floor -------------------------------------------------------------------------------------------------
def verify(args: argparse.Namespace) -> int:
    codes = []
    for name in args.device or devices.present():
        command = pytest_command(name, args.backend, args.jobs, args.pytest)
        print(f"moe-harness: {' '.join(command[1:])}", flush=True)
        codes.append(exit_code(subprocess.run(command, env=environment()).returncode))
        if codes[-1]:
            print(f"moe-harness: {name}: pytest ended with {codes[-1]}", flush=True)
    return max(codes)


def pytest_command(device: str, specs: list[str], jobs: int | None, more: list[str]) -> list[str]:
    """One device's part of `verify`."""
    path = Path("results") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{device}.jsonl"
    command = [*pytest_words(device, path), f"--floor={ROOT / 'cases' / 'floor.toml'}"]
    command += [f"--backend={spec}" for spec in specs]
    command += workers(jobs) if jobs or device == "cpu" else []  # on a GPU the plugin chooses their number
    return [*command, str(ROOT / "cases"), *more]


def floor(args: argparse.Namespace) -> int:
    records, remarks = results.read(args.results)
    for remark in remarks:
        print(f"moe-harness: {remark}", file=sys.stderr)
    if not records:
        raise Wrong(f"{args.results}: holds no records")
    print(results.new_floor(records), end="")
    return 0
