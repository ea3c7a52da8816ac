"""Additions to argparse: checked types for options, and positional arguments after options.

A type raises ArgumentTypeError, and argparse puts the option's name before it: "argument --jobs: 0: ...".
"""

from __future__ import annotations

import argparse
import math
import os
import re
import stat
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.base.errors import UserError, bare
from harness.base.suggest import did_you_mean

LONGEST = 10_000_000  #: seconds, about four months: the most that an option takes
MOST_JOBS = 1024  #: processes
MOST_SEED = 2**64 - 1


# -- types ------------------------------------------------------------------------------------------------------------
def integer(least: int, most: int = 10**9) -> Callable[[str], int]:
    """A type: decimal digits of an integer from `least`, 0 or more, to `most`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most:
            return int(text)
        raise ArgumentTypeError(f"{bare(text)}: must be an integer from {least} to {most}")

    return parse


def number(least: float, most: float, above: bool = False) -> Callable[[str], float]:
    """A type: a finite number from `least` to `most`; above: larger than `least`."""

    def parse(text: str) -> float:
        value = float(text) if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?", text) else math.nan
        if least <= value <= most and not (above and value == least):
            return value
        between = f"above {least:.9g}, at most" if above else f"from {least:.9g} to"
        raise ArgumentTypeError(f"{bare(text)}: must be a number {between} {most:.9g}")

    return parse


def seconds(text: str) -> float:
    """A type: seconds, of which 0 often means no limit."""
    return number(0, LONGEST)(text)


def positive_seconds(text: str) -> float:
    """A type: seconds, more than 0."""
    return number(0, LONGEST, above=True)(text)


def writable_file(text: str) -> Path:
    """A type: a file that exists and can be written, or can be made. Nothing is written yet.

    It catches a wrong path before hours of work; the disk may still be full at the end.
    """
    mode = _mode(text)
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
        raise ArgumentTypeError(f"{bare(text)}: must be a file, new or writable")
    return _writable(text, mode, "file")


def folder(text: str) -> Path:
    """A type: a directory that exists and can be written, or can be made. Nothing is made yet."""
    mode = _mode(text)
    if mode is not None and not stat.S_ISDIR(mode):
        raise ArgumentTypeError(f"{bare(text)}: must be a directory, new or writable")
    return _writable(text, mode, "directory")


def _mode(text: str) -> int | None:
    """The mode of what stands at a path; None if nothing does."""
    try:
        return Path(text).stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise ArgumentTypeError(f"{bare(text)}: {getattr(error, 'strerror', error)}") from error


def _writable(text: str, mode: int | None, what: str) -> Path:
    path = Path(text)
    if mode is not None:
        ready = os.access(path, os.W_OK)
    else:
        nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        ready = not path.is_symlink() and os.access(nearest, os.W_OK | os.X_OK)
    if not ready:
        raise ArgumentTypeError(f"{bare(text)}: must be a {what}, new or writable")
    return path


# -- errors -----------------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, with a suggestion for a misspelt command or choice."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            words = did_you_mean(str(value), map(str, action.choices)) or f"; one of {', '.join(action.choices)}"
            raise argparse.ArgumentError(action, f"{bare(value)}: no such word{words}")


# -- order ------------------------------------------------------------------------------------------------------------
def positionals_after_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Let the positional argument `name`, the last of the parser and of nargs="*", take words after options.

    In `BASE HEAD --backend SPEC CASE` argparse matches the argument for CASE with the empty list after HEAD, and
    rejects CASE. Before Python 3.13 it does the same in `ROW --shard 1/2 -- -k x`. All words after "--" are values of
    `name`, also those that begin with "-".
    """
    parse = parser.parse_known_args

    def parse_known_args(words: Sequence[str], namespace: argparse.Namespace | None = None) -> object:
        words = list(words)
        cut = words.index("--") if "--" in words else len(words)
        args, unknown = parse(words[:cut], namespace)
        values = [word for word in unknown if not word.startswith("-")]
        setattr(args, name, [*getattr(args, name), *values, *words[cut + 1 :]])
        return args, [word for word in unknown if word.startswith("-")]

    parser.parse_known_args = parse_known_args  # type: ignore
