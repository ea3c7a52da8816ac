"""`moe-harness bisect`: find the commit that made a metric of a case worse."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import device as devices
from harness.base.arguments import integer, number, writable_file
from harness.base.errors import UserError, bare
from harness.base.processes import ROOT
from harness.commands import parse_case
from harness.device import DEVICES
from harness.perf.bisect.log import Log
from harness.perf.bisect.measure import WorkerPool
from harness.perf.metrics import METRICS, TARGETS, TIMED


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(bisect, "bisect", "The commit that made a metric of a case worse: exact, or by statistics for a time.")
    sub.add_argument("descriptor", help="such as t16-h256-i128-e8-k2-bf16-exact")
    sub.add_argument("--good", required=True, metavar="REF", help="a commit, tag or branch that is good")
    sub.add_argument("--bad", required=True, metavar="REF", help="one of its descendants that is bad")
    sub.add_argument("--backend", metavar="SPEC", required=True, help="a backend's name, or package.module:object")
    sub.add_argument("--metric", choices=METRICS, help="default: the first structural one that is worse at the bad end")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument("--target", default="sm_90", help=f"of compiled metrics: {', '.join(TARGETS)}, ... (sm_90)")
    sub.add_argument("--repo", type=Path, metavar="DIR", help="another repository than this harness's own")
    sub.add_argument("--build", metavar="COMMAND", help="shell command run once in every commit's worktree")
    sub.add_argument(
        "--confidence", type=number(0.5, 1), default=0.99, metavar="P", help="of a timed search's answer (0.99)"
    )
    sub.add_argument(
        "--budget", type=integer(0), metavar="N", help="most measurements (exact: none; timed: 300 paired runs)"
    )
    again = sub.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the log of an earlier search (the default)")
    again.add_argument("--restart", action="store_true", help="measure everything again, and write over the log")
    sub.add_argument(
        "--log", type=writable_file, metavar="PATH", help="the log (a file in the repository's git directory)"
    )


def bisect(args: argparse.Namespace) -> int:
    """Exit code 0: found. 1: there is nothing to find. 3: the budget ended the search before the answer was certain."""
    _validate(args)
    from harness.perf.versions.checkout import Checkouts, ended_by_sigterm

    with ended_by_sigterm(), Checkouts(args.repo or ROOT, build=args.build) as checkouts:
        return search(args, WorkerPool(checkouts, args.device))


def search(args: argparse.Namespace, pool: WorkerPool) -> int:
    """Search with the workers of a pool, which the caller ends. Prints progress and the result."""
    from harness.perf.bisect.bisect import Refused, bisect, choose_metric
    from harness.perf.bisect.history import History
    from harness.perf.bisect.log import default_path
    from harness.perf.bisect.measure import Measurements, MetricRequest
    from harness.perf.bisect.report import Command, result_lines

    resolve = pool.checkouts.resolve
    history = History(pool.checkouts, resolve(args.good), resolve(args.bad))
    what = {"good": history.good, "bad": history.bad, "case": args.descriptor, "backend": args.backend}
    what |= {"metric": args.metric, "device": args.device, "target": args.target, "build": args.build} | _versions()
    with Log(args.log or default_path(history.common_directory, what), what, args.restart) as log:
        _say_resumed(log)
        # To choose a metric, the structure is measured. Any structural metric requests it.
        metric = METRICS[args.metric or "launches"]
        measurements = Measurements(
            MetricRequest(args.descriptor, args.backend, args.device, metric, args.target), pool, log, history.good
        )
        try:
            if args.metric is None:
                metric = choose_metric(measurements, history.good, history.bad, _say)
                measurements.request = replace(measurements.request, metric=metric)
            result = bisect(measurements, history, confidence=args.confidence, budget=args.budget, say=_say)
        except Refused as reason:
            more = Command(measurements.request, args.repo, args.build).more(reason, history)
            print(f"refused: {reason}", "", *more, sep="\n")
            return 3 if reason.stopped else 1
        print("", *result_lines(result, history, Command(measurements.request, args.repo, args.build)), sep="\n")
    return 0 if result.certain else 3


def _say(line: str) -> None:
    print(line, flush=True)


def _say_resumed(log: Log) -> None:
    if log.resumed:
        cut = f" ({log.cut} cut off)" if log.cut else ""
        _say(f"going on with {log.resumed} measurements of {log.path}{cut}; --restart measures everything again")


def _validate(args: argparse.Namespace) -> None:
    from harness.perf.bisect.search import LEAST_BUDGET

    parse_case(args.descriptor)
    if not 0.5 < args.confidence < 1:
        raise UserError(f"--confidence {args.confidence}: above 0.5 and below 1")
    if args.budget is not None and args.budget < 2:
        raise UserError(f"--budget {args.budget}: 2 or more, both ends are measured")
    if args.budget is not None and args.metric in TIMED and args.budget < LEAST_BUDGET:
        raise UserError(f"--budget {args.budget}: {LEAST_BUDGET} or more with --metric {args.metric}")
    if not re.fullmatch(r"sm_[0-9]{2,3}a?|gfx[0-9a-f]{3,8}", args.target):
        raise UserError(f"--target {bare(args.target)}: such as {', '.join(TARGETS)}")
    if args.device not in devices.present() and args.device != "xpu":
        raise UserError(f"--device {args.device}: {devices.why_absent(args.device)}")


def _versions() -> dict[str, str | None]:
    """The versions that counts depend on. A log made with other versions belongs to another search."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
