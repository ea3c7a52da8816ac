"""The command line, `moe-harness` or `python3 -m harness`: the parser and `main`.

A process uses either Triton's interpreter or a GPU, never both: a command for several devices starts one process each.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.base.arguments import Parser
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
    try:
        args = _parser().parse_args(argv)
        code = args.command(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"moe-harness: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `moe-harness list | head`
        _discard_stdout()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_stdout()
        print(f"moe-harness: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python prints another error when it flushes at exit


def _parser() -> argparse.ArgumentParser:
    parser = Parser("moe-harness", description="Is this fused MoE kernel right?")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Any, name: str, summary: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=summary, description=summary)
        subparser.set_defaults(command=command)
        return subparser

    for module in COMMANDS:
        module.register(add)
    return parser
