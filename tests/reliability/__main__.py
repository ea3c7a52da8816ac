"""`python3 -m tests.reliability` (make faults): every fault in every way to run, random kills, hostile files, and the
supervisor's share of the time. It prints the tables of docs/reliability.md, and with --write puts them there.

The exit code is 1 if a verdict is not what the catalogue says, or if anything was lost.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.reliability import hostile, kills, litter, share, tables, warm, ways
from tests.reliability.catalogue import FAULTS
from tests.reliability.ends import BEYOND
from tests.reliability.loading import LOADING, VERIFIED

PARTS = ("faults", "kills", "hostile", "share")
LANES = 2  #: runs at a time

#: A function, and its arguments.
Job = tuple[Any, ...]


def main(words: list[str]) -> int:
    """Run the parts, print their tables, and return the exit code."""
    parser = argparse.ArgumentParser("python3 -m tests.reliability", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (repeatable)")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="TEXT", help="only faults with TEXT in the name"
    )
    parser.add_argument("--way", action="append", choices=ways.WAYS, help="only this way to run (repeatable)")
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="random kills (300)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="runs of each kind for the share (5)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reliability.md")
    args = parser.parse_args(words)
    parts = args.part or PARTS
    started = time.monotonic()
    ways.fuzzed()  # before anything has loaded pytest's plugins: Hypothesis would warn
    warm.load([*kills.ROWS, ways.BEFORE, ways.AT, ways.AFTER, ways.AT.replace("exact", "random")])
    sections: dict[str, list[str]] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="moe-faults-") as folder:
        root = Path(folder)
        if "faults" in parts:
            cells = faults(args.fault, args.way or ways.WAYS, root)
            sections["faults"] = tables.fault_lines(cells)
            problems += [f"{cell.fault}, {cell.way}: {line}" for cell in cells for line in cell.problems]
            progress(started, f"faults: {len({cell.fault for cell in cells})} kinds")
        if "kills" in parts:
            jobs = [(kills.kill, (args.kills + lane) // LANES, lane, root / f"kills {lane}") for lane in range(LANES)]
            killed = sum(lanes(jobs), kills.Kills())
            sections["kills"] = tables.kill_lines(killed)
            problems += tables.kill_problems(killed)
            progress(started, f"kills: {killed.kills}")
        if "hostile" in parts:
            jobs = [(hostile.part, lane, LANES, root / f"hostile {lane}") for lane in range(LANES)]
            tried = sum(lanes(jobs), hostile.Hostile())
            sections["hostile"] = tables.hostile_lines(tried)
            problems += tried.problems
            progress(started, f"hostile: {tried.files + tried.inputs}")
        if "share" in parts:
            sections["share"] = tables.share_lines(share.measure(args.turns, root))
            progress(started, "share")
    for name, lines in sections.items():
        print("", f"## {name}", "", *lines, sep="\n")
    print("", f"{len(problems)} problems", *problems, sep="\n")
    if args.write:
        tables.write(sections)
    return 1 if problems else 0


def faults(texts: list[str], chosen: Iterable[str], root: Path) -> list[ways.Cell]:
    """The cells of the faults with one of the texts in their name (none: of all), in these ways."""
    named = [name for name in FAULTS if not texts or any(text in name for text in texts)]
    broken = [name for name in LOADING if not texts or any(text in name for text in texts)]
    names = [name for name in named if FAULTS[name].group != BEYOND]
    single = {"plain": ways.plain, "run": ways.run, "fuzz": ways.fuzz}
    cells: list[ways.Cell] = []
    for way in chosen:
        started = time.monotonic()
        jobs: list[Job] = [(ways.unloadable, what, way, root) for what in broken if way != "verify" or what in VERIFIED]
        if way in single:
            usable = [name for name in names if way == "plain" or FAULTS[name].group != litter.FILES]
            jobs += [(single[way], name, root) for name in usable]
        if way == "plain":
            jobs += [(ways.beyond, name, root) for name in named if FAULTS[name].group == BEYOND]
        cells += lanes(jobs)
        progress(started, way)
    started = time.monotonic()
    files = [name for name in names if FAULTS[name].group == litter.FILES]
    groups = [group for group in ([name for name in names if name not in files], files) if group]
    batches: list[Job] = [(ways.batch, way, group, root) for group in groups for way in chosen if way in ways.BATCHES]
    if batches:
        cells += [cell for batch in lanes(batches) for cell in batch]
        progress(started, "all faults in one run")
    return cells


def lanes(jobs: list[Job]) -> list[Any]:
    """The results of jobs, two of which run at a time, each in a forked process."""
    with ProcessPoolExecutor(LANES, mp_context=multiprocessing.get_context("fork")) as pool:
        return [each.result() for each in [pool.submit(_call, *job) for job in jobs]]


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def progress(started: float, what: str) -> None:
    """Print what is done, and after how many seconds."""
    print(f"[{time.monotonic() - started:.0f} s] {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
