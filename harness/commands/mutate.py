"""moe-harness mutate: known bugs put back into the kernels, and how many of them the suite notices."""

from __future__ import annotations

import argparse
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harness.base.arguments import MOST_JOBS, integer, number, positive_seconds, writable_file
from harness.base.errors import UserError, bare
from harness.base.suggest import did_you_mean
from harness.device import DEVICES

FLOOR = 0.98  #: of the bugs must be noticed
LONGEST_WORD = 200
ONE_IN = 6  #: entries that --part takes
CONTROL_RUNS, CONTROL_RUNS_OF_PART = 2000, 200
#: Seconds for a bug and for a case. A GPU compiles each kernel that it runs.
LIMITS = {"cpu": (120.0, 60.0), "gpu": (300.0, 300.0)}


def register(add: Callable[..., Any]) -> None:
    """Declares the command's arguments."""
    sub = add(mutate, "mutate", "Known bugs put back into the kernels: how many does the suite notice?")
    sub.add_argument("entry", nargs="*", help="only these: names, classes, or patterns such as 'router-*' (all)")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument(
        "--jobs", type=integer(1, MOST_JOBS), metavar="N", help="mutants at a time (all cores; on a GPU at most 12)"
    )
    sub.add_argument(
        "--results", type=writable_file, metavar="PATH",
        help="store outcomes here, and skip those that it holds (results/DATE-mutate-DEVICE.jsonl; with ENTRY: none)",
    )  # fmt: skip
    sub.add_argument("--part", action="store_true", help=f"one in {ONE_IN}, of every class: what CI runs")
    sub.add_argument("--all", action="store_true", help="continue with each bug after the first case that notices it")
    sub.add_argument(
        "--against",
        metavar="RULE",
        help="judge the same calls by a rule of another test suite too, or by all rules (all)",
    )
    sub.add_argument(
        "--markdown", type=writable_file, metavar="PATH", help="write the table of --against, for a README"
    )
    sub.add_argument(
        "--floor", type=number(0, 1), default=FLOOR, metavar="SHARE", help=f"least share of kills ({FLOOR})"
    )
    sub.add_argument(
        "--control-runs", type=integer(1), metavar="N",
        help=f"cases of all correct variants together ({CONTROL_RUNS}; --part {CONTROL_RUNS_OF_PART})",
    )  # fmt: skip
    sub.add_argument("--limit", type=positive_seconds, metavar="SECONDS", help="for a bug (120; on a GPU 300)")
    sub.add_argument("--case-limit", type=positive_seconds, metavar="SECONDS", help="for a case (60; on a GPU 300)")


def mutate(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from harness.mutate import bugs, process, runner, schedule, summary
    from harness.mutate.outcomes import OutcomesFile, entry_digest, suite_digest
    from harness.mutate.progress import Progress

    rules = _rules(args)
    known = bugs.read()
    chosen = _select(schedule.sample(known, ONE_IN) if args.part else known, args.entry)
    device, reason = runner.find_device(args.device)
    if device is None:
        raise UserError(f"--device {args.device}: {reason}")
    elsewhere = {name: bug for name, bug in chosen.items() if bug.device not in ("", device.name)}
    chosen = {name: bug for name, bug in chosen.items() if name not in elsewhere}
    if not chosen:
        raise UserError(f"--device {device.name}: can show none of {', '.join(elsewhere)}")
    process.preload(device)
    jobs = args.jobs or _jobs(device)
    tasks = _tasks(args, chosen, device, rules, jobs)
    path = args.results or (None if args.entry else _default_path(device))
    file = OutcomesFile(path, str(device))
    suite = suite_digest()
    digests = {task.bug.name: entry_digest(task.bug, task.settings, suite) for task in tasks}
    outcomes = [stored for digest in digests.values() if (stored := file.get(digest))]
    done = {outcome.mutant for outcome in outcomes}
    stored_in = f"into {path}" if path else "not stored"
    print(f"moe-harness: {_describe_selection(chosen)} on {device}, {jobs} at a time, {stored_in}", flush=True)
    if outcomes:
        print(f"moe-harness: {len(outcomes)} of them are in it already")
    for name, bug in elsewhere.items():
        print(f"not run {name}: only {bug.device} can show it")
    progress = Progress(len(tasks), len(outcomes))
    before = {number: signal.signal(number, progress.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for outcome in runner.run([task for task in tasks if task.bug.name not in done], jobs, progress.watch):
            outcome.digest = digests[outcome.mutant]
            file.append(outcome)
            outcomes.append(outcome)
            progress.done(summary.outcome_line(outcome))
    except KeyboardInterrupt:
        progress.clear()
        resume = f"; to continue: --results {path}" if path else ""
        print(f"moe-harness: interrupted, {len(outcomes)} of {len(tasks)} done{resume}")
        return 130
    finally:
        for problem in file.close():
            print(f"moe-harness: {problem}", file=sys.stderr)
        for number, handler in before.items():
            signal.signal(number, handler)
    progress.clear()
    _print_summary(args, outcomes, known, rules)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = f"; results: {path}" if path else ""
    print(f"\n{progress.seconds:.0f} s, {spent.ru_utime + spent.ru_stime:.0f} s of CPU time{results}")
    # Few backends keep the contract of the emulated XPU: an entry without one of them is no error there.
    return _exit_code(args, [o for o in outcomes if not (device.emulated and o.outcome == "unasked")])


def _print_summary(
    args: argparse.Namespace, outcomes: list[Any], known: dict[str, Any], rules: tuple[str, ...]
) -> None:
    from harness.base.table import aligned, markdown
    from harness.mutate import cause_score, summary

    print("\n".join(summary.summary_lines(outcomes, known, whole=args.all or bool(rules))))
    if rules:
        header, rows = summary.RULES_HEADER, summary.rule_rows(outcomes, rules)
        print("\n".join(["", *aligned([header, *rows])]))
        if args.markdown:
            _write(args.markdown, "\n".join(markdown(header, rows)) + "\n")
    print("\n".join(["", *cause_score.score(outcomes, known).lines()]))


def _exit_code(args: argparse.Namespace, outcomes: list[Any]) -> int:
    """0 if enough bugs were noticed, no control was accused and every entry is a bug; otherwise 1, with the reason."""
    from harness.mutate.outcomes import ILL_MADE, count_killed

    killed, of = count_killed(outcomes)
    wrong = [outcome.mutant for outcome in outcomes if outcome.outcome in ILL_MADE]
    accused = [outcome.mutant for outcome in outcomes if outcome.outcome == "accused"]
    if wrong:
        print(f"moe-harness: entries that are no bugs: {', '.join(wrong)}")
    if accused:
        print(f"moe-harness: correct variants that were accused: {', '.join(accused)}")
    if of and killed < args.floor * of:
        print(f"moe-harness: {killed} of {of} bugs noticed, the floor is {args.floor:.0%}")
        return 1
    return 1 if wrong or accused else 0


def _default_path(device: Any) -> Path:
    return Path("results") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-mutate-{device.name}.jsonl"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        words = did_you_mean(args.against, RULES)
        raise UserError(f"--against {bare(args.against)}: no such rule{words}; one of {', '.join(RULES)}, or all")
    return (args.against,)


def _select(known: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Return the entries that the words match, by name, class or pattern; all without words."""
    words = list(words)
    selected: dict[str, Any] = {}
    for word in words:
        if len(word) > LONGEST_WORD:
            raise UserError(f"{bare(word)}: a name or pattern has at most {LONGEST_WORD} characters")
        matching = {name: bug for name, bug in known.items() if fnmatch(name, word) or fnmatch(bug.kind, word)}
        if not matching:
            kinds = sorted({bug.kind for bug in known.values()})
            words = did_you_mean(word, [*known, *kinds])
            raise UserError(f"{bare(word)}: no entry of that name or pattern{words}; classes: {', '.join(kinds)}")
        selected |= matching
    return selected if words else dict(known)


def _tasks(args: argparse.Namespace, chosen: dict[str, Any], device: Any, rules: tuple[str, ...], jobs: int) -> list:
    from harness.mutate import runner
    from harness.mutate.protocol import MEMORY, MORE, Settings

    limit, case_limit = LIMITS["cpu" if device.interprets_triton else "gpu"]
    whole = args.all or bool(rules)
    settings = Settings(
        device.name, args.limit or limit, args.case_limit or case_limit, more=MORE if whole else 0, rules=rules,
        memory=MEMORY // (jobs + 1),
    )  # fmt: skip
    controls = sum(bug.control for bug in chosen.values())
    control_runs = args.control_runs or (CONTROL_RUNS_OF_PART if args.part else CONTROL_RUNS)
    each = math.ceil(control_runs / controls) if controls else 0
    # Controls take longest: they come first, or the last of them would run alone.
    ordered = sorted(chosen.values(), key=lambda bug: not bug.control)
    return [runner.make_task(bug, device, settings, each) for bug in ordered]


def _jobs(device: Any) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device.interprets_triton else max(1, min(12, cores * 3 // 4))


def _describe_selection(chosen: dict[str, Any]) -> str:
    controls = sum(bug.control for bug in chosen.values())
    return f"{len(chosen) - controls} bugs and {controls} correct variants"
