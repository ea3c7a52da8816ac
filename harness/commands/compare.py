"""`moe-harness compare`: compare two versions of the kernels, side by side on one device."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from harness import device as devices
from harness.base.arguments import LONGEST, number, positionals_after_options, writable_file
from harness.base.errors import UserError
from harness.base.processes import ROOT
from harness.commands import parse_case
from harness.device import DEVICES
from harness.perf.compare import compare
from harness.perf.compare.compare import ComparisonRequest
from harness.perf.compare.report import markdown_lines, table_lines, total_lines
from harness.perf.count.baseline_file import BASELINE, read
from harness.perf.metrics import METRICS, STRUCTURE
from harness.perf.versions.checkout import CannotBuild, Checkouts, ended_by_sigterm, short

BUDGET, THRESHOLD = 900.0, 1.0
ON_CPU = "torch-grouped-mm"  #: the backend that is timed on a CPU: other backends need the interpreter
ON_GPU = "triton"
EPILOG = """\
BASE and HEAD are commits, tags, branches, or the word "worktree" for the working tree with its uncommitted changes
(without the files that git ignores). Each runs in processes of its own, on one device, measured by one copy of this
installation's code. A case is timed only if it is correct on both sides.

Counted metrics are exact: any that is worse is a regression. Timed metrics are sampled until a case is regressed,
improved or same (the interval lies within the threshold), or until the budget is spent: undecided. A regression is
significant with a false discovery rate of 0.5 % over all cases and looks, and larger than both --threshold and the
noise floor. The noise floor is the change of BASE against itself in the same run.

exit codes:
  0  every case is the same, or improved
  1  a case regressed: slower, counted worse, incorrect at HEAD only, or missing at HEAD
  2  the arguments are wrong, or BASE cannot be built
  3  no case regressed, but one is undecided or incorrect on both sides, or none could be compared
"""


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(command, "compare", "Is HEAD slower than BASE, or otherwise worse? Two commits, measured side by side.")
    sub.formatter_class, sub.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    sub.add_argument("base", metavar="BASE", help="the older version")
    sub.add_argument("head", metavar="HEAD", help="the newer version")
    sub.add_argument("descriptor", nargs="*", metavar="DESCRIPTOR", help="cases (a default set for the device)")
    sub.add_argument("--repo", type=Path, metavar="DIR", help="the repository of your own kernels (this one)")
    sub.add_argument("--backend", action="append", default=[], metavar="SPEC", help="only this backend (repeatable)")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument(
        "--metric", action="append", choices=METRICS, metavar="NAME",
        help=f"only this (repeatable): {', '.join(METRICS)} (all counted ones but the compiled, and device_us)",
    )  # fmt: skip
    sub.add_argument(
        "--budget", type=number(0, LONGEST), default=BUDGET, metavar="SECONDS",
        help=f"no further samples after this time, except those of the first look ({BUDGET:g})",
    )  # fmt: skip
    sub.add_argument(
        "--threshold",
        type=number(0, 1000, above=True),
        default=THRESHOLD,
        metavar="PERCENT",
        help=f"changes that count ({THRESHOLD:g})",
    )
    sub.add_argument(
        "--markdown", type=writable_file, metavar="PATH", help="append the table there, for a job's summary"
    )
    sub.add_argument("--json", type=writable_file, metavar="PATH", help="write everything there")
    sub.add_argument("--build", metavar="CMD", help="a shell command, run once in each version's directory")
    positionals_after_options(sub, "descriptor")


def command(args: argparse.Namespace) -> int:
    """Compare two versions, and return the exit code (EPILOG)."""
    if args.device != "xpu" and args.device not in devices.present():
        raise UserError(f"--device {args.device}: {devices.why_absent(args.device)}")
    wanted = requests(args)
    begun, started = time.time(), time.monotonic()
    with ended_by_sigterm(), Checkouts(args.repo or ROOT, args.build) as checkouts:
        base, head = checkouts.resolve(args.base), checkouts.resolve(args.head)
        title = f"{args.base} ({short(base)}) against {args.head} ({short(head)}) on {args.device}"
        title += _same_files(checkouts, base, head, "" if args.repo else "kernels")
        for commit in (base, head):
            try:
                checkouts.at(commit)
            except CannotBuild as error:
                if commit == base:
                    raise UserError(f"BASE {error}") from error
                print(f"moe-harness: HEAD {error}\nregressed: HEAD cannot be built", file=sys.stderr)
                return 1
        older, newer = (compare.Side(checkouts, commit, args.device) for commit in (base, head))
        rows = compare.compare(older, newer, wanted, args.budget, args.threshold / 100, _progress)
        _progress("")
        environment = newer.environment
    totals = total_lines(rows, time.monotonic() - started)
    print("\n".join([title, "", *table_lines(rows), "", *totals]))
    if args.markdown:
        _write(args.markdown, "a", "\n".join([f"### {title}", "", *markdown_lines(rows), "", *totals, ""]) + "\n")
    if args.json:
        record = {
            "base": base, "head": head, "device": args.device, "environment": environment, "time": begun,
            "threshold": args.threshold / 100, "exit": compare.exit_code(rows), "rows": [r.record() for r in rows],
        }  # fmt: skip
        _write(args.json, "w", json.dumps(record, indent=1) + "\n")
    return compare.exit_code(rows)


def requests(args: argparse.Namespace) -> list[ComparisonRequest]:
    """A request for every case on every backend, or the default set of the device."""
    if args.repo and not args.backend:
        raise UserError("--repo without --backend: name yours, --backend package.module:object")
    metrics = tuple(args.metric or (*STRUCTURE, "device_us"))
    if not args.descriptor and not args.backend and args.device != "cuda":
        counted = tuple(name for name in metrics if METRICS[name].source != "time")
        timed = tuple(name for name in metrics if METRICS[name].source == "time")
        blocks = read(BASELINE).blocks if counted else []
        exact = [ComparisonRequest(block.descriptor, block.backend, counted) for block in blocks]
        return exact + [ComparisonRequest(case, ON_CPU, timed) for case in (_timed("cpu") if timed else [])]
    cases = [str(parse_case(text)) for text in args.descriptor] or _timed(args.device)
    backends = args.backend or [ON_CPU if args.device == "cpu" else ON_GPU]
    pairs = product(dict.fromkeys(cases), dict.fromkeys(backends))
    return [ComparisonRequest(case, backend, metrics) for case, backend in pairs]


def _same_files(checkouts: Checkouts, base: str, head: str, folder: str) -> str:
    """The remark for two versions with the same files; "" for others."""
    if not compare.identical(checkouts, base, head, folder):
        return ""
    return f"; {f'{folder}/ is' if folder else 'all files are'} the same in both, so any difference is noise"


def _timed(device: str) -> list[str]:
    """The cases that are timed on this device. The exact ones take as long as those with random weights."""
    from harness.problem import families

    module = next(m for m in families.families() if m.FAMILY == families.TIMED)
    cases = [row.case for row in families.rows(module, devices.Device(device, emulated=device == "xpu").on_cpu)]
    return [str(case) for case in cases if case.fill == "random"]


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:110]}", end="" if line else "\r", file=sys.stderr, flush=True)
    elif line:
        print(f"moe-harness: {line}", file=sys.stderr, flush=True)


def _write(path: Path, mode: str, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
