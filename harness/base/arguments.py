"""Additions to argparse: checked types, and positional arguments after options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence


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


def seconds(text: str) -> float:
    """The argparse type of a time limit: 0 or more seconds, finite. ArgumentTypeError: it is something else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: seconds, 0 or more")
    return value
