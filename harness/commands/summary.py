"""moe-harness summary: the results of many runs and machines, gathered into one verdict."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from harness.base.errors import UserError
from harness.ci import gather
from harness.ci.matrix import MatrixError


def register(add: Callable[..., Any]) -> None:
    """Declares the command's arguments."""
    gather.add_arguments(add(command, "summary", "Results of many runs as one: what failed, what is missing."))


def command(args: argparse.Namespace) -> int:
    try:
        return gather.gather(args)
    except MatrixError as error:
        raise UserError(str(error)) from error
