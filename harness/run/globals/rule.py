"""What a global is: how it is read, restored and described."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import eq
from typing import Any

from harness.base.raised import describe_value


def describe_change(before: Any, after: Any) -> str:
    """ "old -> new"."""
    return f"{describe_value(before)} -> {describe_value(after)}"


@dataclass(frozen=True)
class Global:
    """One global. `read` returns what `restore` takes."""

    name: str
    read: Callable[[], Any]
    restore: Callable[[Any], object]
    describe: Callable[[Any, Any], str] = describe_change
    same: Callable[[Any, Any], bool] = eq
    by_import: bool = False  #: the import of a package may change it


def changed_keys(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> str:
    """The keys whose values differ: the values may be secret, or long."""
    missing = object()
    keys = {*before, *after}
    changed = [key for key in keys if before.get(key, missing) != after.get(key, missing)]
    return ", ".join(sorted(key.decode(errors="replace") if isinstance(key, bytes) else str(key) for key in changed))
