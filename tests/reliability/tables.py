"""The tables of docs/reliability.md."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

import torch

from harness.base.processes import ROOT
from harness.base.table import markdown
from harness.base.text import inert
from tests.reliability.catalogue import FAULTS
from tests.reliability.hostile import READERS, Hostile
from tests.reliability.kills import ROWS, Kills
from tests.reliability.share import BACKEND, CASES, Share
from tests.reliability.ways import BATCHES, WAYS, Cell

PAGE = ROOT / "docs" / "reliability.md"
LOADING = "cannot be loaded"  #: the group of loading.py


def fault_lines(cells: list[Cell]) -> list[str]:
    """One row for every fault: the verdict and the exit code in each way, and what else was lost."""
    by_fault: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        by_fault.setdefault(cell.fault, {})[cell.way] = cell
    rows = []
    for name, ways in by_fault.items():
        group = FAULTS[name].group if name in FAULTS else LOADING
        shown = [_verdict(ways[way]) if way in ways else "" for way in WAYS]
        wrong = [f"{cell.way}: {line}" for cell in ways.values() for line in cell.problems]
        rows.append([group, _cell(name), *shown, _cell("; ".join(wrong)[:300]) or "nothing"])
    order = [*dict.fromkeys(fault.group for fault in FAULTS.values()), LOADING]
    rows.sort(key=lambda row: order.index(row[0]))
    codes = {cell.way: cell.code for cell in cells if cell.way in BATCHES and cell.fault in FAULTS}
    whole = [f"The runs with all faults end with {', '.join(f'{code} ({way})' for way, code in codes.items())}."]
    return [
        f"{len(rows)} kinds of fault, {len(cells)} verdicts.",
        *(whole if codes else []),
        "",
        *markdown(["what the backend does", "fault", *WAYS, "else lost"], rows),
    ]


def _verdict(cell: Cell) -> str:
    """The verdict, and the exit code of a run with this fault alone."""
    alone = cell.way not in BATCHES or cell.fault not in FAULTS
    return f"{cell.status}, {cell.code}" if alone else cell.status


def _cell(text: str) -> str:
    return inert(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def kill_lines(kills: Kills) -> list[str]:
    """The kills in one table."""
    rows = [
        ["kills", f"{kills.kills:,}"],
        ["of these before the run had its plan", f"{kills.before:,}"],
        ["verdicts in the files", f"{kills.verdicts:,}"],
        ["verdicts lost beyond the case in flight", f"{kills.lost:,}"],
        ["files that end in the middle of a line", f"{kills.cut:,}"],
        ["`summary` is green", f"{kills.green:,}"],
        ["`summary` prints a traceback", f"{kills.tracebacks:,}"],
    ]
    about = f"Runs of {len(ROWS)} cases that take {kills.seconds:.1f} s; the moment is uniform over that time."
    return [about, "", *markdown(["", "count"], rows, {1})]


def kill_problems(kills: Kills) -> list[str]:
    """What should not have happened."""
    wrong = {"verdicts lost": kills.lost, "green": kills.green, "tracebacks": kills.tracebacks}
    return [f"kills: {n} {name}" for name, n in wrong.items() if n]


def hostile_lines(tried: Hostile) -> list[str]:
    """The hostile files and inputs in one table."""
    commands = ", ".join(f"`{words[0]}`" for words in READERS)
    rows = [
        ["results files", f"{tried.files:,}"],
        [f"commands that read them ({commands})", f"{tried.commands:,}"],
        ["other files, options and descriptors", f"{tried.inputs:,}"],
        ["tracebacks", f"{tried.tracebacks:,}"],
        ["took more than 2 s", f"{tried.slow:,}"],
        ["green", f"{tried.green:,}"],
    ]
    return [f"The slowest took {tried.slowest:.1f} s.", "", *markdown(["", "count"], rows, {1})]


def share_lines(share: Share) -> list[str]:
    """The supervisor's share of the time in one table."""
    rows = [
        [name, f"{statistics.median(seconds):.2f} s", f"{min(seconds):.2f} to {max(seconds):.2f} s"]
        for name, seconds in (("with a supervisor", share.supervised), ("`--in-process`", share.alone))
    ]
    path = Path(CASES).relative_to(ROOT)
    turns = (
        f"`pytest {path} --backend={BACKEND}`, {len(share.alone)} times each, in turns, after one that is not counted."
    )
    extra = f"The supervisor costs {share.extra * 100:+.1f} % of the median."
    return [turns, extra, "", *markdown(["", "median", "range"], rows, {1, 2})]


def machine() -> str:
    """The machine and the versions, in one sentence."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}."


def write(sections: dict[str, list[str]]) -> None:
    """Put the tables between their markers."""
    text = PAGE.read_text()
    for name, lines in {**sections, "machine": [machine()]}.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, _, foot = rest.partition(end)
        text = head + begin + "\n".join(lines) + "\n" + end + foot
    PAGE.write_text(text)
