"""Globals that a case changed: restored, and the case's failure, so that no other case has them.

guard = Guard()  ->  the case  ->  guard.changes() -> what the case changed, all of it restored
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any

from harness.base.raised import describe_error
from harness.results.verdict import Verdict
from harness.run.globals import GLOBALS, Global

OWN = {"harness", "reference", "cases", "tests", "__main__", "__mp_main__"}  #: packages whose import excuses nothing


@cache
def _import_lazy_parts() -> None:
    """Import what torch's modes import at their first use, which would excuse what the first case changes."""
    import torch._dynamo  # noqa: F401


READS = [each.read for each in GLOBALS]  #: looked up once: both reads of all together take under 50 microseconds


class Guard:
    """The globals at the moment of its creation."""

    def __init__(self, guarded: Sequence[Global] = GLOBALS) -> None:
        _import_lazy_parts()
        self._guarded = guarded
        self._reads = READS if guarded is GLOBALS else [each.read for each in guarded]
        self._before = [read() for read in self._reads]
        self._modules = len(sys.modules)

    def changes(self) -> tuple[list[str], list[str]]:
        """(what was changed and is restored, notes on what was changed by an import and stays), one line each."""
        try:
            if self._before == [read() for read in self._reads]:
                return [], []
        except Exception:
            pass  # a mode of torch that was left behind may make its functions raise: the modes are restored first
        changed: list[str] = []
        notes: list[str] = []
        for each, before in zip(self._guarded, self._before):
            if not (line := _change(each, before)):
                continue
            if each.by_import and (package := self._imported()):
                notes.append(f"{line}, as {package} was imported")
            else:
                changed.append(line + _restored(each, before))
        return changed, notes

    def _imported(self) -> str:
        """A package that was imported since, outside the standard library and this project; "" if there is none."""
        new = islice(reversed(sys.modules), max(0, len(sys.modules) - self._modules))  # the last come first
        packages = (name.partition(".")[0] for name in new)
        return next((name for name in packages if name not in sys.stdlib_module_names and name not in OWN), "")


def _change(each: Global, before: Any) -> str:
    """What became of a global, or ""."""
    try:
        after = each.read()
        return "" if each.same(before, after) else f"changed {each.name}: {each.describe(before, after)}"
    except Exception as error:
        return f"changed {each.name}, which cannot be read: {describe_error(error)}"


def _restored(each: Global, before: Any) -> str:
    """Restore a global; "", or that it is not possible. The others must be restored all the same."""
    try:
        each.restore(before)
        why = "" if each.same(before, each.read()) else "it keeps its value"
    except Exception as error:
        why = describe_error(error)
    return f" (could not be restored: {why})" if why else ""


def accuse(verdict: Verdict, changed: list[str]) -> None:
    """Make the changes of globals the failure of a case, or a part of the report of one that failed already."""
    if not changed:
        return
    if verdict.green:
        verdict.status, verdict.reason, verdict.report = "failed", "; ".join(changed), "\n".join(changed)
    else:
        verdict.report = "\n".join([verdict.report.rstrip() or verdict.reason, "", "It also", *changed])
