"""The results of many jobs, gathered: missing shards, rows below their floor, and a summary.

Needs the standard library alone, so its job installs nothing:

    python3 -m harness.ci.gather RESULTS... [--plan JSON] [--markdown PATH]

The same as `moe-harness summary`. In a job of GitHub Actions it also appends to the job's summary and annotates files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from harness.base import table
from harness.base.arguments import Parser, writable_file
from harness.base.errors import UserError, shown
from harness.base.text import cut, number
from harness.ci import annotate, matrix
from harness.ci.annotate import Annotation
from harness.ci.matrix import MatrixError, MatrixRow
from harness.results import summary
from harness.results.file import Record
from harness.results.floor import UPDATE
from harness.results.merge import Merged, merge
from harness.results.reader import few
from harness.results.verdict import FAILED, NOT_EXECUTED

FEW = 8  #: shards without a verdict that have a line each
NO_RESULTS = "no results; its job did not run, or ended before its first verdict"
SHOWN = 50  #: failures that the Markdown lists
NO_ROW = "(no row)"  #: the row of records that name none: their run was not started as a row
HEADER = ("row", "shards", "passed", "failed", "mistrusted", "unsupported", "executed", "floor")
NUMBERS = range(1, len(HEADER))  #: the columns that are aligned to the right


# -- problems ---------------------------------------------------------------------------------------------------------
def last_of_each(records: Iterable[Record]) -> list[Record]:
    """The last record of each row, family, case, backend and device: a job that ran again counts once."""
    last = {(r.get("row"), r.get("family"), r["case"], r["backend"], r["device"]): r for r in records}
    return list(last.values())


def expected(plan: str | None, here: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The shards that are due, by row: those of the plan, which is the output of `matrix --json`.

    Without a plan: all shards of each row that is here. here: (row, shard) of the runs, oldest first. MatrixError: the
    plan is something else.
    """
    if plan is None:
        last = {row: shard for row, shard in here if row}
        return {row: shards(matrix.shard_of(shard)[1]) for row, shard in last.items()}
    due: dict[str, list[str]] = defaultdict(list)
    try:
        for job in json.loads(plan)["rows"]["include"]:
            row, shard = job["row"], job["shard"]
            if not isinstance(row, str) or not isinstance(shard, str):
                raise TypeError(f"row and shard are texts, not {shown(row)} and {shown(shard)}")
            due[row].append(shard)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise MatrixError(f"--plan {shown(plan)}: must be what `matrix --json` prints ({error!r})") from error
    return dict(due)


def shards(count: int) -> list[str]:
    """The names of so many shards: "1/2", "2/2"."""
    return [f"{i}/{count}" for i in range(1, count + 1)]


def absent(due: dict[str, list[str]], records: Iterable[Record]) -> list[str]:
    """Lines about the shards without a verdict: one for each, or one for the row if many are missing."""
    here = {(r.get("row"), r.get("shard", "1/1")) for r in records}
    lines = []
    for row, every in due.items():
        missing = [shard for shard in every if (row, shard) not in here]
        if len(missing) <= FEW:
            lines += [f"{row}, shard {shard}: {NO_RESULTS}" for shard in missing]
        else:
            lines.append(f"{row}, {len(missing)} of {len(every)} shards, {few(missing)}: {NO_RESULTS}")
    return lines


def executed(row: str, records: Iterable[Record]) -> Counter[str]:
    """{backend: executed verdicts} of a row."""
    return Counter(r["backend"] for r in records if r.get("row") == row and r["status"] not in NOT_EXECUTED)


def below_floor(row: MatrixRow, records: Iterable[Record]) -> list[str]:
    """One line for every backend that executed fewer verdicts than the row's floor."""
    ran = executed(row.name, records)
    return [
        f"{row.name}, floor: {backend} executed {ran[backend]} verdicts, at least {number} are due; {UPDATE}"
        for backend, number in row.floor.items()
        if ran[backend] < number
    ]


def problems(records: list[Record], due: dict[str, list[str]], rows: dict[str, MatrixRow]) -> list[str]:
    """Lines about what is wrong beside the verdicts: none, absent shards, rows below their floor, unknown rows."""
    lines = absent(due, records)
    for name in due:
        lines += below_floor(rows[name], records) if name in rows else [f"{name}: matrix.toml has no such row"]
    if not lines and all(r["status"] in NOT_EXECUTED for r in records):
        lines.append("no verdict was executed: nothing was tested")
    return lines


# -- the summary ------------------------------------------------------------------------------------------------------
def overview(records: list[Record], due: dict[str, list[str]], rows: dict[str, MatrixRow]) -> list[tuple[str, ...]]:
    """One line of cells for each row of the matrix, in the columns of HEADER."""
    lines: list[tuple[str, ...]] = []
    by_row: dict[str, list[Record]] = {name: [] for name in due}
    for r in records:
        by_row.setdefault(str(r.get("row") or NO_ROW), []).append(r)
    for name, each in by_row.items():
        counts = Counter(r["status"] for r in each)
        here = {r.get("shard", "1/1") for r in each}
        every = due.get(name, [])
        shards_here = f"{len(here & set(every))} of {len(every)}" if every else "-"
        failed = sum(counts[status] for status in FAILED)
        ran = len(each) - sum(counts[status] for status in NOT_EXECUTED)
        floor = str(sum(rows[name].floor.values())) if name in rows else "-"
        numbers = (counts["passed"], failed, counts["mistrusted"], counts["unsupported"], ran)
        lines.append((name, shards_here, *map(str, numbers), floor))
    return lines


def verdict(records: list[Record], wrong: list[str]) -> str:
    """The whole result in one line."""
    failed = sum(r["status"] in FAILED for r in records)
    parts = [f"{failed} failed"] if failed else []
    parts += [number(len(wrong), "problem")] if wrong else []
    ran = sum(r["status"] not in NOT_EXECUTED for r in records)
    return f"{', '.join(parts) or 'good'}: {number(ran, 'verdict')} executed"


def text(records: list[Record], rows: list[tuple[str, ...]], wrong: list[str], remarks: list[str]) -> list[str]:
    """The summary for a terminal. rows: the overview; wrong: the problems; remarks: those of the merge."""
    lines = table.aligned([HEADER, *rows], right=NUMBERS)
    return [*summary.render(records, remarks=remarks), "", *lines, "", *wrong, verdict(records, wrong)]


def markdown(records: list[Record], rows: list[tuple[str, ...]], wrong: list[str], remarks: list[str]) -> str:
    """The summary for a page of GitHub; the arguments are those of `text`."""
    lines = [f"## moe-harness: {_inline(verdict(records, wrong))}", ""]
    lines += [f"- {_inline(problem)}" for problem in wrong] + [""] * bool(wrong)
    lines += table.markdown(HEADER, [[_inline(cell) for cell in row] for row in rows], right=NUMBERS)
    failed = [r for r in records if r["status"] in FAILED]
    if failed:
        lines += ["", f"### {number(len(failed), 'failure')}", ""]
    for r in failed[:SHOWN]:
        file = annotate.family_file(r)
        reason = f"{r['status']}: {r['backend']} on {r['device']}: {cut(r['reason'], 300)}"
        lines += [f"- {_inline(reason + f' ({file})' * bool(file))}", *_block([r["reproduce"]], indent="  ")]
    if len(failed) > SHOWN:
        lines.append(f"- and {len(failed) - SHOWN} more, in the results files")
    whole = summary.render([r for r in records if r["status"] not in FAILED], remarks=remarks)
    lines += ["", "<details><summary>By family and backend, without the failures</summary>", ""]
    lines += [*_block(whole), "", "</details>", ""]
    return "\n".join(lines)


def _inline(words: str) -> str:
    """Escape text for a line or a cell of Markdown."""
    shown = " ".join(words.splitlines()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|~#@!" else c for c in shown)


def _block(lines: list[str], indent: str = "") -> list[str]:
    """A block of code with these lines, whatever backticks they contain."""
    runs = re.findall(r"`{3,}", "\n".join(lines))
    fence = max(runs, key=len) + "`" if runs else "```"
    return [f"{indent}{line}" for line in [fence, *lines, fence]]


# -- the command ------------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `gather`."""
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="results files, or directories of them")
    parser.add_argument("--plan", metavar="JSON", help="the jobs of the run, as `matrix --json` printed them")
    parser.add_argument("--markdown", type=writable_file, metavar="PATH", help="append the summary to this file, too")


def gather(args: argparse.Namespace) -> int:
    """Print the summary. Returns 1 if anything failed, is missing or not valid, or fell below its floor.

    ResultsError, MatrixError, UserError: the results, the plan or matrix.toml cannot be read, or the page not written.
    """
    here = [path for path in args.results if args.plan is None or not _is_empty(Path(path))]
    merged = merge(here) if here or not args.plan else Merged([], [], [], [])
    records = last_of_each(merged.records)
    rows = matrix.read()
    due = expected(args.plan, [run.place for run in merged.runs])
    wrong = merged.problems + problems(records, due, rows)
    lines = overview(records, due, rows)
    _print(text(records, lines, wrong, merged.remarks))
    pages = [args.markdown] if args.markdown else []
    pages += [Path(page)] if (page := os.environ.get("GITHUB_STEP_SUMMARY")) else []
    for page in pages:
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            with page.open("a", encoding="utf-8") as file:
                file.write(markdown(records, lines, wrong, merged.remarks))
        except OSError as error:
            raise UserError(f"--markdown {page}: {error.strerror}") from error
    failed = annotate.failures(records)
    if os.environ.get("GITHUB_ACTIONS"):
        warnings = [Annotation(remark, "warning") for remark in merged.remarks]
        print("\n".join(annotate.commands([*map(Annotation, wrong), *failed, *warnings])))
    return 1 if wrong or failed else 0


def _print(lines: list[str]) -> None:
    """Print lines; in a job of GitHub Actions so that none of them is a command."""
    if not os.environ.get("GITHUB_ACTIONS"):
        print("\n".join(lines))
        return
    token = secrets.token_hex(16)  # whatever is in a record cannot know it
    print("\n".join([f"::stop-commands::{token}", *lines, f"::{token}::"]))


def _is_empty(path: Path) -> bool:
    """Whether a directory holds no results. With a plan, `absent` reports that shard by shard."""
    return path.is_dir() and not any(path.rglob("*.jsonl"))


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python3 -m harness.ci.gather`."""
    parser = Parser("python3 -m harness.ci.gather", description="The results of many jobs, gathered.")
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of `gather`, or 2 for wrong arguments."""
    try:
        return gather(parser().parse_args(argv))
    except UserError as error:
        print(f"moe-harness: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
