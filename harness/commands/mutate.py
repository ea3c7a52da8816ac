"""moe-harness mutate: known bugs put back into the kernels, and how many of them the suite notices."""

from __future__ import annotations

import argparse
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harness.base.errors import UserError
from harness.device import DEVICES

FLOOR = 0.98  #: of the bugs must be noticed
ONE_IN = 6  #: entries that --part takes
CONTROL_RUNS, CONTROL_RUNS_OF_PART = 2000, 200
#: Seconds for a bug and for a case. A GPU compiles what it runs.
LIMITS = {"cpu": (120.0, 60.0), "gpu": (300.0, 300.0)}


def register(add: Callable[..., Any]) -> None:
    """Declares the command's arguments."""
    sub = add(mutate, "mutate", "Known bugs put back into the kernels: how many does the suite notice?")
    sub.add_argument("entry", nargs="*", help="only these: names, classes, or patterns such as 'router-*' (all)")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument("--jobs", type=int, metavar="N", help="mutants at a time (all cores; on a GPU at most 12)")
    sub.add_argument("--results", type=Path, metavar="PATH", help="the file to write; what it holds is not run again")
    sub.add_argument("--part", action="store_true", help=f"one in {ONE_IN}, of every class: what CI runs")
    sub.add_argument("--all", action="store_true", help="go on with each bug after the first case that notices")
    sub.add_argument(
        "--against", metavar="RULE", help="judge the same calls by a rule of the field too, or by all of them (all)"
    )
    sub.add_argument("--markdown", type=Path, metavar="PATH", help="the table of --against, for a README")
    sub.add_argument("--floor", type=float, default=FLOOR, metavar="SHARE", help=f"least share of kills ({FLOOR})")
    sub.add_argument(
        "--control-runs", type=int, metavar="N",
        help=f"cases of all correct variants together ({CONTROL_RUNS}; --part {CONTROL_RUNS_OF_PART})",
    )  # fmt: skip
    sub.add_argument("--limit", type=float, metavar="SECONDS", help="for a bug (120; on a GPU 300)")
    sub.add_argument("--case-limit", type=float, metavar="SECONDS", help="for a case (60; on a GPU 300)")


def mutate(args: argparse.Namespace) -> int:
    from harness.mutate import bugs, cause_score, process, runner, schedule, summary
    from harness.mutate.outcomes import Store, digest, suite_digest
    from harness.mutate.progress import Progress

    rules = _rules(args)
    if not 0 <= args.floor <= 1:
        raise UserError(f"--floor {args.floor:g}: a share, from 0 to 1")
    try:
        known = bugs.read()
    except bugs.BugError as error:
        raise UserError(str(error)) from error
    chosen = schedule.part(known, ONE_IN) if args.part else known
    chosen = _named(chosen, args.entry)
    device, reason = runner.look(args.device)
    if device is None:
        raise UserError(f"--device {args.device}: {reason}")
    elsewhere = {name: bug for name, bug in chosen.items() if bug.device not in ("", device.name)}
    chosen = {name: bug for name, bug in chosen.items() if name not in elsewhere}
    if not chosen:
        raise UserError(f"--device {device.name}: can show none of {', '.join(elsewhere)}")
    process.prepare(device)
    jobs = _count("--jobs", args.jobs, _jobs(device))
    tasks = _tasks(args, chosen, device, rules, jobs)
    path = args.results or Path("results") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-mutate-{device.name}.jsonl"
    file = Store(path, str(device))
    suite = suite_digest()
    marks = {task.bug.name: digest(task.bug, task.asking, suite) for task in tasks}
    outcomes = [found for mark in marks.values() if (found := file.known(mark))]
    done = {found.mutant for found in outcomes}
    print(f"moe-harness: {_said(chosen)} on {device}, {jobs} at a time, into {path}", flush=True)
    if outcomes:
        print(f"moe-harness: {len(outcomes)} of them are in it already")
    for name, bug in elsewhere.items():
        print(f"not asked {name}: only {bug.device} can show it")
    progress = Progress(len(tasks), len(outcomes))
    before = {number: signal.signal(number, progress.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for found in runner.run([task for task in tasks if task.bug.name not in done], jobs, progress.watch):
            found.digest = marks[found.mutant]
            file.append(found)
            outcomes.append(found)
            progress.done(summary.line(found))
    except KeyboardInterrupt:
        progress.clear()
        print(f"moe-harness: interrupted, {len(outcomes)} of {len(tasks)} done; to go on: --results {path}")
        return 130
    finally:
        file.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    progress.clear()
    print("\n".join(summary.told(outcomes, known, whole=args.all or bool(rules))))
    if rules:
        rows = summary.against(outcomes, rules)
        print("\n".join(["", *summary.plain(rows)]))
        if args.markdown:
            _write(args.markdown, summary.markdown(rows))
    print("\n".join(["", *cause_score.score(outcomes, known).lines()]))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{progress.seconds:.0f} s, {spent.ru_utime + spent.ru_stime:.0f} s of CPU time; results: {path}")
    # Emulated is a contract that few backends have: who has none of them is not asked, and need not be.
    return _verdict(args, [found for found in outcomes if not (device.emulated and found.outcome == "unasked")])


def _verdict(args: argparse.Namespace, outcomes: list[Any]) -> int:
    from harness.mutate.outcomes import ILL_MADE, counts

    killed, asked = counts(outcomes)
    wrong = [found.mutant for found in outcomes if found.outcome in ILL_MADE]
    accused = [found.mutant for found in outcomes if found.outcome == "accused"]
    if wrong:
        print(f"moe-harness: entries that are no bugs: {', '.join(wrong)}")
    if accused:
        print(f"moe-harness: correct variants that were accused: {', '.join(accused)}")
    if asked and killed < args.floor * asked:
        print(f"moe-harness: {killed} of {asked} bugs noticed, the floor is {args.floor:.0%}")
        return 1
    return 1 if wrong or accused else 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--markdown {path}: {error.strerror}") from error


def _rules(args: argparse.Namespace) -> tuple[str, ...]:
    from harness.mutate.field_rules import RULES

    if args.markdown and not args.against:
        raise UserError("--markdown: needs --against RULE")
    if args.against in (None, "all"):
        return tuple(RULES) if args.against else ()
    if args.against not in RULES:
        raise UserError(f"--against {args.against}: one of {', '.join(RULES)}, or all")
    return (args.against,)


def _named(known: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """The entries that a word names, by name, class or pattern."""
    words = list(words)
    found: dict[str, Any] = {}
    for word in words:
        mine = {name: bug for name, bug in known.items() if fnmatch(name, word) or fnmatch(bug.kind, word)}
        if not mine:
            kinds = sorted({bug.kind for bug in known.values()})
            raise UserError(f"{word}: no entry of that name or pattern; classes: {', '.join(kinds)}")
        found |= mine
    return found if words else dict(known)


def _tasks(args: argparse.Namespace, chosen: dict[str, Any], device: Any, rules: tuple[str, ...], jobs: int) -> list:
    from harness.mutate import runner
    from harness.mutate.protocol import MEMORY, MORE, Asking

    limit, case_limit = LIMITS["cpu" if device.interprets_triton else "gpu"]
    whole = args.all or bool(rules)
    asking = Asking(
        device.name, args.limit or limit, args.case_limit or case_limit, more=MORE if whole else 0, rules=rules,
        memory=MEMORY // (jobs + 1),
    )  # fmt: skip
    controls = sum(bug.control for bug in chosen.values())
    due = _count("--control-runs", args.control_runs, CONTROL_RUNS_OF_PART if args.part else CONTROL_RUNS)
    each = math.ceil(due / controls) if controls else 0
    # Controls take longest: they come first, or the last of them would run alone.
    ordered = sorted(chosen.values(), key=lambda bug: not bug.control)
    return [runner.task(bug, device, asking, each) for bug in ordered]


def _count(option: str, given: int | None, otherwise: int) -> int:
    if given is not None and given < 1:
        raise UserError(f"{option} {given}: 1 or more")
    return given or otherwise


def _jobs(device: Any) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device.interprets_triton else max(1, min(12, cores * 3 // 4))


def _said(chosen: dict[str, Any]) -> str:
    controls = sum(bug.control for bug in chosen.values())
    return f"{len(chosen) - controls} bugs and {controls} correct variants"
