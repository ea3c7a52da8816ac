"""The results of many jobs, gathered: what is missing, what fell below its floor, and a summary that people can read.

Needs nothing but the standard library, so that the job that does it installs nothing:

    python3 -m harness.ci.gather RESULTS... [--plan JSON] [--markdown PATH]

The same as `moe-harness summary`. In a job of GitHub's it also appends to the job's summary and annotates.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.base.text import cut, number
from harness.ci import annotate, matrix
from harness.ci.annotate import Annotation
from harness.ci.matrix import MatrixError, MatrixRow
from harness.results import summary
from harness.results.file import ResultsError
from harness.results.floor import UPDATE
from harness.results.merge import merge
from harness.results.verdict import FAILED, NOT_EXECUTED

SHOWN = 50  #: failures that the Markdown lists
NO_ROW = "(no row)"  #: where records name none: a run that was not started as one

Record = dict[str, Any]


# -- what is wrong ----------------------------------------------------------------------------------------------------
def last_of_each(records: Iterable[Record]) -> list[Record]:
    """Of every question of every row the last answer: a job that was run again counts once."""
    found = {(r.get("row"), r.get("family"), r["case"], r["backend"], r["device"]): r for r in records}
    return list(found.values())


def expected(plan: str | None, records: Iterable[Record]) -> dict[str, list[str]]:
    """The shards that there must be, by row: those of the plan (what `matrix --json` prints), else, where none is
    given, all of each row that there are records of."""
    if plan is None:
        last = {str(r["row"]): str(r.get("shard", "1/1")) for r in records if r.get("row")}
        return {row: shards(matrix.shard_of(shard)[1]) for row, shard in last.items()}
    found: dict[str, list[str]] = defaultdict(list)
    try:
        for job in json.loads(plan)["rows"]["include"]:
            found[job["row"]].append(job["shard"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise MatrixError(f"--plan {plan[:60]!r}: must be what `matrix --json` prints ({error!r})") from error
    return dict(found)


def shards(count: int) -> list[str]:
    return [f"{i}/{count}" for i in range(1, count + 1)]


def absent(due: dict[str, list[str]], records: Iterable[Record]) -> list[str]:
    """One line for every shard of which there is no record."""
    here = {(r.get("row"), r.get("shard", "1/1")) for r in records}
    return [
        f"{row}, shard {shard}: no results; its job did not run, or ended before its first verdict"
        for row, every in due.items()
        for shard in every
        if (row, shard) not in here
    ]


def executed(row: str, records: Iterable[Record]) -> Counter[str]:
    """How many verdicts of a row each backend executed."""
    return Counter(r["backend"] for r in records if r.get("row") == row and r["status"] not in NOT_EXECUTED)


def below_floor(row: MatrixRow, records: Iterable[Record]) -> list[str]:
    """One line for every backend that executed less than the row's floor."""
    ran = executed(row.name, records)
    return [
        f"{row.name}, floor: {backend} executed {ran[backend]} verdicts, at least {number} are due; {UPDATE}"
        for backend, number in row.floor.items()
        if ran[backend] < number
    ]


def problems(records: list[Record], due: dict[str, list[str]], rows: dict[str, MatrixRow]) -> list[str]:
    """Everything wrong that is no verdict: absent shards, rows below their floor, rows that are not in matrix.toml."""
    found = absent(due, records)
    for name in due:
        found += below_floor(rows[name], records) if name in rows else [f"{name}: matrix.toml has no such row"]
    return found


# -- the summary ------------------------------------------------------------------------------------------------------
def overview(records: list[Record], due: dict[str, list[str]], rows: dict[str, MatrixRow]) -> list[tuple[str, ...]]:
    """A line for each row of the matrix, the head first."""
    lines: list[tuple[str, ...]] = [
        ("row", "shards", "passed", "failed", "mistrusted", "unsupported", "executed", "floor")
    ]
    by_row: dict[str, list[Record]] = {name: [] for name in due}
    for r in records:
        by_row.setdefault(str(r.get("row") or NO_ROW), []).append(r)
    for name, each in by_row.items():
        counts = Counter(r["status"] for r in each)
        here = {r.get("shard", "1/1") for r in each}
        every = due.get(name, [])
        told = f"{len(here & set(every))} of {len(every)}" if every else "-"
        failed = sum(counts[status] for status in FAILED)
        ran = len(each) - sum(counts[status] for status in NOT_EXECUTED)
        floor = str(sum(rows[name].floor.values())) if name in rows else "-"
        numbers = (counts["passed"], failed, counts["mistrusted"], counts["unsupported"], ran)
        lines.append((name, told, *map(str, numbers), floor))
    return lines


def verdict(records: list[Record], wrong: list[str]) -> str:
    """The whole in one line."""
    failed = sum(r["status"] in FAILED for r in records)
    parts = [f"{failed} failed"] if failed else []
    parts += [number(len(wrong), "problem")] if wrong else []
    ran = sum(r["status"] not in NOT_EXECUTED for r in records)
    return f"{', '.join(parts) or 'good'}: {number(ran, 'verdict')} executed"


def text(records: list[Record], table: list[tuple[str, ...]], wrong: list[str], remarks: list[str]) -> list[str]:
    """The summary for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(n) if not i else cell.rjust(n) for i, (cell, n) in enumerate(zip(line, widths)))
             for line in table]  # fmt: skip
    return [*summary.render(records, remarks=remarks), "", *lines, "", *wrong, verdict(records, wrong)]


def markdown(records: list[Record], table: list[tuple[str, ...]], wrong: list[str], remarks: list[str]) -> str:
    """The summary for a page of GitHub's."""
    lines = [f"## moe-harness: {_inline(verdict(records, wrong))}", ""]
    lines += [f"- {_inline(problem)}" for problem in wrong] + [""] * bool(wrong)
    head, *rest = ([_inline(cell) for cell in line] for line in table)
    lines += [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines += [f"| {' | '.join(line)} |" for line in rest]
    failed = [r for r in records if r["status"] in FAILED]
    if failed:
        lines += ["", f"### {number(len(failed), 'failure')}", ""]
    for r in failed[:SHOWN]:
        file, line = annotate.location(r)
        where = f" ({file}:{line})" if line else ""
        told = f"{r['status']}: {r['backend']} on {r['device']}: {cut(r['reason'], 300)}{where}"
        lines += [f"- {_inline(told)}", *_block([r["reproduce"]], indent="  ")]
    if len(failed) > SHOWN:
        lines.append(f"- and {len(failed) - SHOWN} more, in the results files")
    whole = summary.render([r for r in records if r["status"] not in FAILED], remarks=remarks)
    lines += [
        "",
        "<details><summary>By family and backend, without what failed</summary>",
        "",
    ]
    lines += [*_block(whole), "", "</details>", ""]
    return "\n".join(lines)


def _inline(words: str) -> str:
    """Text that Markdown leaves as it is, in a line or a cell."""
    shown = " ".join(words.splitlines()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|~#@!" else c for c in shown)


def _block(lines: list[str], indent: str = "") -> list[str]:
    """Lines as a block of code, whatever they hold."""
    runs = re.findall(r"`{3,}", "\n".join(lines))
    fence = max(runs, key=len) + "`" if runs else "```"
    return [f"{indent}{line}" for line in [fence, *lines, fence]]


# -- the command ------------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="results files, or directories of them")
    parser.add_argument("--plan", metavar="JSON", help="the jobs that there were, as `matrix --json` printed them")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="append the summary to this file, too")


def gather(args: argparse.Namespace) -> int:
    """1 if anything failed, is missing or fell below its floor. ResultsError, MatrixError: something cannot be read."""
    here = [path for path in args.results if args.plan is None or not _is_empty(Path(path))]
    records, remarks = merge(here) if here or not args.plan else ([], [])
    records = last_of_each(records)
    rows = matrix.read()
    due = expected(args.plan, records)
    wrong = problems(records, due, rows)
    table = overview(records, due, rows)
    print("\n".join(text(records, table, wrong, remarks)))
    pages = [args.markdown] if args.markdown else []
    pages += [Path(page)] if (page := os.environ.get("GITHUB_STEP_SUMMARY")) else []
    for page in pages:
        with page.open("a", encoding="utf-8") as file:
            file.write(markdown(records, table, wrong, remarks))
    failed = annotate.failures(records)
    if os.environ.get("GITHUB_ACTIONS"):
        found = [Annotation(problem) for problem in wrong] + failed + [Annotation(r, "warning") for r in remarks]
        print("\n".join(annotate.commands(found)))
    return 1 if wrong or failed else 0


def _is_empty(path: Path) -> bool:
    """A directory into which no job put its results: with a plan, that is said shard by shard."""
    return path.is_dir() and not any(path.rglob("*.jsonl"))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("python3 -m harness.ci.gather", description="The results of many jobs, gathered.")
    add_arguments(found)
    return found


def main(argv: list[str] | None = None) -> int:
    try:
        return gather(parser().parse_args(argv))
    except (MatrixError, ResultsError) as error:
        print(f"moe-harness: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
