"""moe-harness compare: two versions of the kernels, side by side on one device."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import device as devices
from harness.commands.common import ROOT, Wrong
from harness.commands.structure import BASELINE
from harness.device import DEVICES
from harness.perf.metrics import METRICS, STRUCTURE
from harness.problem import Case, DescriptorError

if TYPE_CHECKING:
    from harness.perf.checkout import Checkouts
    from harness.perf.compare import Question, Row

BUDGET, THRESHOLD = 900.0, 1.0
ON_CPU = "torch-grouped-mm"  #: the backend that is timed there: others need the interpreter
ON_GPU = "triton"
EPILOG = """\
BASE and HEAD are commits, tags, branches, or the word "worktree" for the working tree with its uncommitted changes
(what git ignores is left out). Each runs in processes of its own, on one device, measured by one copy of this
installation's code. A case that is not correct on both sides has no speed.

Counted metrics are exact: any that is worse is a regression. Timed ones are sampled until a case is regressed,
improved, same (the interval lies within the threshold) or the budget is spent: undecided. A regression is significant
with a false discovery rate of 0.5 % over all cases and looks, and larger than both --threshold and the noise floor,
which is what BASE shows against itself in the same run.

exit codes:
  0  every case is the same, or improved
  1  something regressed: slower, counted worse, incorrect at HEAD only, or gone at HEAD
  2  the arguments are wrong, or BASE cannot be built
  3  nothing regressed, but something stayed undecided, is incorrect on both sides, or nothing could be compared
"""


def register(add: Callable[..., Any]) -> None:
    """Declares the command's arguments."""
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
        "--budget", type=float, default=BUDGET, metavar="SECONDS",
        help=f"no further samples after this time, those of the first look apart ({BUDGET:g})",
    )  # fmt: skip
    sub.add_argument(
        "--threshold", type=float, default=THRESHOLD, metavar="PERCENT", help=f"changes that count ({THRESHOLD:g})"
    )
    sub.add_argument("--markdown", type=Path, metavar="PATH", help="append the table there, for a job's summary")
    sub.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    sub.add_argument("--build", metavar="CMD", help="a shell command, run once in each version's directory")
    _take_cases_after_options(sub)


def _take_cases_after_options(sub: argparse.ArgumentParser) -> None:
    """`BASE HEAD --backend SPEC DESCRIPTOR`: argparse takes DESCRIPTOR to be the nothing that followed HEAD."""
    whole = sub.parse_known_args

    def parse_known_args(words: Any = None, namespace: Any = None) -> Any:
        found, strange = whole(words, namespace)
        found.descriptor += [word for word in strange if not word.startswith("-")]
        return found, [word for word in strange if word.startswith("-")]

    sub.parse_known_args = parse_known_args  # type: ignore[assignment]


def command(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from harness.perf import compare
    from harness.perf.checkout import CannotBuild, Checkouts, ended_by_sigterm, short

    if args.device != "xpu" and args.device not in devices.present():
        raise Wrong(f"--device {args.device}: {devices.why_absent(args.device)}")
    if args.budget < 0 or args.threshold <= 0:
        name, value = ("budget", args.budget) if args.budget < 0 else ("threshold", args.threshold)
        raise Wrong(f"--{name} {value:g}: must be {'0 or more' if name == 'budget' else 'above 0'}")
    asked = questions(args)
    begun, started = time.time(), time.monotonic()
    with ended_by_sigterm(), Checkouts(args.repo or ROOT, args.build) as checkouts:
        base, head = checkouts.resolve(args.base), checkouts.resolve(args.head)
        title = f"{args.base} ({short(base)}) against {args.head} ({short(head)}) on {args.device}"
        title += _alike(checkouts, base, head, "" if args.repo else "kernels")
        for commit in (base, head):
            try:
                checkouts.at(commit)
            except CannotBuild as error:
                if commit == base:
                    raise Wrong(f"BASE {error}") from error
                print(f"moe-harness: HEAD {error}\nregressed: HEAD cannot be built", file=sys.stderr)
                return 1
        older, newer = (compare.Side(checkouts, commit, args.device) for commit in (base, head))
        rows = compare.compare(older, newer, asked, args.budget, args.threshold / 100, _progress)
        _progress("")
        environment = newer.environment
    closing = summed_up(rows, time.monotonic() - started)
    print("\n".join([title, "", *table(rows), "", *closing]))
    if args.markdown:
        _write(args.markdown, "a", "\n".join([f"### {title}", "", *markdown(rows), "", *closing, ""]) + "\n")
    if args.json:
        record = {
            "base": base, "head": head, "device": args.device, "environment": environment, "time": begun,
            "threshold": args.threshold / 100, "exit": compare.exit_code(rows), "rows": [r.record() for r in rows],
        }  # fmt: skip
        _write(args.json, "w", json.dumps(record, indent=1) + "\n")
    return compare.exit_code(rows)


def questions(args: argparse.Namespace) -> list[Question]:
    """What is asked: every case on every backend, or the default set of the device."""
    from harness.perf.compare import Question

    if args.repo and not args.backend:
        raise Wrong("--repo without --backend: name yours, --backend package.module:object")
    metrics = tuple(args.metric or (*STRUCTURE, "device_us"))
    if not args.descriptor and not args.backend and args.device != "cuda":
        from harness.perf.baseline_text import read

        counted = tuple(name for name in metrics if METRICS[name].source != "time")
        timed = tuple(name for name in metrics if METRICS[name].source == "time")
        found = [Question(b.descriptor, b.backend, counted) for b in read(BASELINE).blocks] if counted else []
        return found + ([Question(case, ON_CPU, timed) for case in _timed("cpu")] if timed else [])
    try:
        cases = [str(Case.parse(text)) for text in args.descriptor] or _timed(args.device)
    except DescriptorError as error:
        raise Wrong(f"{error}; those in use: python3 -m harness list --why") from error
    backends = args.backend or [ON_CPU if args.device == "cpu" else ON_GPU]
    return [Question(case, backend, metrics) for case in dict.fromkeys(cases) for backend in dict.fromkeys(backends)]


def _alike(checkouts: Checkouts, base: str, head: str, folder: str) -> str:
    """What to say if there is no difference to be found; "" if there may be."""
    from harness.perf.compare import identical

    if not identical(checkouts, base, head, folder):
        return ""
    return f"; {f'{folder}/ is' if folder else 'all files are'} the same in both, so what differs is noise"


def _timed(device: str) -> list[str]:
    """The cases that are timed on this device."""
    from harness import battery

    module = next(m for m in battery.families() if m.FAMILY == battery.TIMED)
    cases = [row.case for row in battery.rows(module, devices.Device(device, emulated=device == "xpu"))]
    return [str(case) for case in cases if case.fill == "random"]  # an exact one takes as long, or the judge longer


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
        raise Wrong(f"{path}: {error.strerror}") from error


# -- in words ---------------------------------------------------------------------------------------------------------
HEADING = ("", "BASE", "HEAD", "change", "", "floor", "finds", "samples", "time")
WIDTHS = (18, 12, 12, 29, 13, 8, 8, 9, 8)


def table(rows: Iterable[Row]) -> list[str]:
    """For people, 120 columns: a line for each case and backend, and for each metric but what is exactly the same."""
    lines = [_line(HEADING)]
    for (case, backend), told, same in _told(rows):
        heading = f"{case} on {backend}" + (f": the same in {same}" if same else "")
        lines += textwrap.wrap(heading, 120, subsequent_indent="  ", break_on_hyphens=False)
        for row in told:
            lines.append(_line(_cells(row)))
            lines += [f"      {remark}"[:120] for remark in row.remarks]
    return lines


def markdown(rows: Iterable[Row]) -> list[str]:
    """The same as a table of Markdown."""
    heading = ("case", "backend", "metric", "BASE", "HEAD", "change", "verdict", *HEADING[5:], "remarks")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for (case, backend), told, same in _told(rows):
        tails = [[*_cells(row), "; ".join(row.remarks)] for row in told]
        tails += [[same, "", "", "", "same", "", "", "", "", ""]] if same else []
        for words in tails:
            words[4] = f"**{words[4]}**" if words[4] == "regressed" else words[4]
            escaped = (word.replace("|", "\\|") for word in (case, backend, *words))
            lines.append(f"| {' | '.join(escaped)} |")
    return lines


def _told(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row], str]]:
    """By case and backend: the rows to be told one by one, and the exact metrics that are the same in a few words."""
    found: dict[tuple[str, str], tuple[list[Row], list[Row]]] = {}
    for row in rows:
        told, same = found.setdefault((row.case, row.backend), ([], []))
        (same if row.verdict == "same" and METRICS[row.metric].exact else told).append(row)
    words = []
    for key, (told, same) in found.items():
        counted = sum(row.metric != "correct" for row in same)
        parts = ["correctness"] if len(same) > counted else []
        parts += [f"{counted} counted metric{'s' if counted > 1 else ''}"] if counted else []
        words.append((key, told, " and ".join(parts)))
    return words


def _cells(row: Row) -> list[str]:
    e = row.estimate
    cells = [row.metric, _value(row.base, row.metric), _value(row.head, row.metric), "", row.verdict, "", "", "", ""]
    if e and row.detectable is not None:
        cells[3] = f"{100 * e.change:+.1f} % ({100 * e.low:+.1f} to {100 * e.high:+.1f})"
        cells[5], cells[6] = f"{100 * e.floor:.1f} %", f"{100 * row.detectable:.1f} %"
        cells[7] = f"{e.generations} x {row.samples // e.generations}"
    elif isinstance(row.base, int) and isinstance(row.head, int):
        cells[3] = f"{row.head - row.base:+d}"
    if row.seconds:
        cells[8] = f"{row.seconds:.0f} s"
    return cells


def _value(value: Any, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} us" if isinstance(value, float) else str(value)


def _line(cells: Iterable[str]) -> str:
    first, *others = cells
    return (f"  {first:{WIDTHS[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(others, WIDTHS[1:]))).rstrip()


def summed_up(rows: list[Row], seconds: float) -> list[str]:
    """The totals, and what the timed part could have found."""
    counts = Counter(row.verdict for row in rows)
    told = ", ".join(
        f"{counts[v]} {v}" for v in ("regressed", "improved", "undecided", "same", "not compared") if counts[v]
    )
    lines = [f"{len(rows)} metrics in {seconds:.0f} s: {told}."]
    limits = [row.detectable for row in rows if row.detectable is not None and row.verdict in ("same", "undecided")]
    if limits:
        lines.append(
            f"In {len(limits)} timed as same or undecided, a change of {100 * max(limits):.1f} % would have been found "
            "with 80 % probability (finds: one by one)."
        )
    floors = [row.estimate.floor for row in rows if row.estimate]
    if floors:
        lines.append(
            f"Noise floor, from BASE against itself: {100 * min(floors):.1f} to {100 * max(floors):.1f} %. Intervals: "
            "each bound holds with 95 %."
        )
    return lines
