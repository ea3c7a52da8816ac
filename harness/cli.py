"""The command line, `moe-harness` or `python3 -m harness`: the parser and `main`.

A process uses either Triton's interpreter or a GPU, never both: a command for several devices starts one process each.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.base.errors import UserError
from harness.commands import (
    bisect,
    capabilities,
    compare,
    doctor,
    fuzz,
    list,
    matrix,
    mutate,
    report,
    run,
    structure,
    summary,
    verify,
)

#: In the order of --help.
COMMANDS = (
    doctor, list, run, verify, capabilities, structure, compare, bisect, matrix, mutate, fuzz, summary, report,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 all green, 1 something is not green, 2 wrong arguments."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a kernel author's own directory, for --backend package.module:object
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except UserError as error:
        print(f"moe-harness: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `moe-harness list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python prints another error when it flushes at exit
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("moe-harness", description="Is this fused MoE kernel right?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Any, name: str, summary: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=summary, description=summary)
        subparser.set_defaults(command=command)
        return subparser

    for module in COMMANDS:
        module.register(add)
    return parser
