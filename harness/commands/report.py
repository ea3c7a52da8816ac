"""`moe-harness report`: one HTML page of any number of results files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.base.arguments import writable_file
from harness.base.errors import UserError
from harness.base.text import number
from harness.results import summary
from harness.results.file import now
from harness.results.merge import Merged, merge


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(report, "report", "One self-contained HTML file of any number of results files, from any machines.")
    sub.add_argument("results", nargs="+", metavar="RESULTS", help="a results file, a directory of them, or a pattern")
    sub.add_argument(
        "--out", type=writable_file, default=Path("report.html"), metavar="PATH", help="the page (report.html)"
    )
    sub.add_argument("--title", default="MoE kernels: verdicts", help="the page's title")


def report(args: argparse.Namespace) -> int:
    """Write the page. Returns 1 if the newest run of a place is not whole, or a record not valid.

    UserError: no record can be read, or the page cannot be written.
    """
    from harness.report import data, page

    merged = merge(args.results)
    for line in merged.remarks + merged.problems:
        print(f"moe-harness: {line}", file=sys.stderr)
    if not merged.records:
        raise UserError(f"{', '.join(args.results)}: no verdict in it that can be read")
    payload = data.payload(merged.records, merged.remarks, args.title, f"made {now()}", merged.problems)
    plain = [*merged.remarks, *payload["warnings"], *summary.totals(merged.records)]
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page.render(payload, plain), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error
    for warning in payload["warnings"][len(merged.problems) :]:
        print(f"moe-harness: {warning}", file=sys.stderr)
    megabytes = args.out.stat().st_size / 1e6
    print(f"{args.out}: {number(len(merged.records), 'record')}, {megabytes:.1f} MB")
    return 1 if merged.invalid or _unfinished(merged) else 0


def _unfinished(merged: Merged) -> bool:
    """Whether the newest run of a place, or a run without any verdict, is not whole."""
    from harness.report import history

    newest = {state.runs[-1].name for state in history.states(history.runs(merged.records)).values()}
    return any(run.name in newest or not run.verdicts for run in merged.runs if not (run.whole or run.replaced))
