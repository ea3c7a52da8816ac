"""The report of a failure: its parts, and the text that a terminal and a results file show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.base.table import LABEL, aligned, labelled

WORST = ("token", "column", "expected", "got", "off by", "experts of the token")


@dataclass(frozen=True)
class Report:
    """A failure in parts. Only the summary is there for a failure that is no wrong output."""

    summary: str  #: one line: what failed
    fields: Sequence[tuple[str, str]] = ()  #: (label, value): the budgets, the plan, the number of wrong outputs, notes
    cause: str = ""  #: the fault that the output looks like (match.py), "" if there is none
    matches: Sequence[tuple[str, str]] = ()  #: (label, value): the cause or a hint, and its alternatives
    stage: str = ""  #: the first stage that is wrong by itself (localise.py), "" if it is unknown
    replay: str = ""  #: one line about the replay of the stages
    patterns: Sequence[str] = ()  #: common properties of the wrong elements, the most telling first
    places: Sequence[tuple[str, str]] = ()  #: (label, value): the wrong tokens, columns and experts
    worst: Sequence[Sequence[str]] = ()  #: the worst elements, cells in the order of WORST
    details: Sequence[str] = ()  #: lines below the summary of a failure that has no such parts
    error_map: dict[str, Any] = field(default_factory=dict)  #: the errors by token and column (error_map.py)

    def lines(self) -> list[str]:
        """The report for a reader, the summary first."""
        pairs = [
            *self.fields,
            *self.matches,
            *([("stage", self.replay)] if self.replay else []),
            *(("pattern", pattern) for pattern in self.patterns),
            *self.places,
        ]
        return [self.summary, *self.details, *labelled(pairs), *self._worst_lines()]

    def _worst_lines(self) -> list[str]:
        if not self.worst:
            return []
        rows = [("worst", *WORST), *(("", *row) for row in self.worst)]
        numbers = range(1, len(WORST))  # the experts of a token stay to the left
        return aligned(rows, right=numbers, indent=2, widths=(LABEL - 1,))

    def __str__(self) -> str:
        return "\n".join(self.lines())
