"""`moe-harness report`: one HTML page of any number of results files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.base.errors import UserError


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    sub = add(report, "report", "One self-contained HTML file of any number of results files, from any machines.")
    sub.add_argument("results", nargs="+", metavar="RESULTS", help="a results file, a directory of them, or a pattern")
    sub.add_argument("--out", type=Path, default=Path("report.html"), metavar="PATH", help="the page (report.html)")
    sub.add_argument("--title", default="MoE kernels: verdicts", help="the page's title")


def report(args: argparse.Namespace) -> int:
    """Write the page. UserError: no record can be read, or the page cannot be written."""
    from harness.base.text import number
    from harness.report import data, page
    from harness.results import merge, summary
    from harness.results.file import now

    records, remarks = merge.merge(args.results)
    for remark in remarks:
        print(f"moe-harness: {remark}", file=sys.stderr)
    if not records:
        raise UserError(f"{', '.join(args.results)}: no record in it that can be read")
    payload = data.payload(records, remarks, args.title, f"made {now()}")
    plain = [*remarks, *payload["warnings"], *summary.totals(records)]
    try:
        args.out.write_text(page.render(payload, plain), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error
    for warning in payload["warnings"]:
        print(f"moe-harness: {warning}", file=sys.stderr)
    megabytes = args.out.stat().st_size / 1e6
    print(f"{args.out}: {number(len(records), 'record')}, {megabytes:.1f} MB")
    return 0
