"""`moe-harness summary`: the results of many runs and machines, gathered into one verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.ci import gather


def register(add: Callable[..., Any]) -> None:
    """Declare the command's arguments."""
    gather.add_arguments(add(gather.gather, "summary", "Results of many runs as one: what failed, what is missing."))
