"""Which cases a bug is asked, and in which order; and which bugs stand for all of them in a short run.

Nothing here looks at what came of an earlier run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from harness.device import Device
from harness.mutate.bugs import Bug
from harness.problem import families
from harness.problem.families import CaseRow

SEEDS = 20  #: of the cases that controls are asked: 0 to 19
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Question:
    """A row, and what of it decides when it is its turn."""

    row: CaseRow
    text: str
    tokens: frozenset[str]  #: of the descriptor, and the beginnings of those with dots
    kind: tuple[Hashable, ...]
    size: int


def order(bug: Bug, device: Device) -> list[CaseRow]:
    """Every row of the suite: those first that have most of what the entry says it takes, then all the others. Among
    equals every kind of case has its turn, with its smallest case first.

    Words count by descriptor token, or by the beginning of one: "e4m3" is in "e4m3.block.group"."""
    words = set(bug.words)

    def relevance(question: _Question) -> tuple[int, int]:
        hits = len(words & question.tokens)
        return (-(question.row.family == bug.family) * (1 + hits), -hits)

    found = sorted(((relevance(question), question) for question in _questions(device)), key=lambda pair: pair[0])
    turns = _in_turn(found, lambda pair: (pair[0], pair[1].kind, pair[1].row.case.scenario))
    turns = _in_turn(turns, lambda pair: (pair[0], pair[1].row.family))
    return [question.row for _, question in sorted(turns, key=lambda pair: pair[0])]


def spread(name: str, device: Device) -> list[CaseRow]:
    """Every row of the suite: each family in turn, and in each family each fill and dtype, in this name's own order."""
    questions = sorted(_questions(device), key=lambda question: _digest(f"{name} {question.text}"))
    turns = _in_turn(_in_turn(questions, lambda q: q.kind), lambda q: q.row.family)
    return [question.row for question in turns]


def seeded(rows: Iterable[CaseRow]) -> list[CaseRow]:
    """The same rows, with SEEDS seeds dealt over them."""
    return [CaseRow(row.case.change(seed=n % SEEDS), row.family, row.why) for n, row in enumerate(rows)]


def part(bugs: dict[str, Bug], one_in: int) -> dict[str, Bug]:
    """One in so many of the entries, by their names alone, and at least one of every kind."""
    chosen = {name for name in bugs if _digest(name) % one_in == 0}
    for kind in {bug.kind for bug in bugs.values()}:
        names = [name for name, bug in bugs.items() if bug.kind == kind]
        if not chosen & set(names):
            chosen.add(min(names, key=_digest))
    return {name: bug for name, bug in bugs.items() if name in chosen}


def _questions(device: Device) -> list[_Question]:
    """Every row, small ones first."""
    if device not in _known:
        rows = [row for module in families.untimed() for row in families.rows(module, device.on_cpu)]
        _known[device] = sorted(map(_question, rows), key=lambda question: question.size)
    return _known[device]


_known: dict[Device, list[_Question]] = {}


def _question(row: CaseRow) -> _Question:
    text, p = str(row.case), row.case.problem
    tokens = {
        ".".join(parts[:n]) for parts in (t.split(".") for t in text.split("-")) for n in range(1, len(parts) + 1)
    }
    kind = (row.family, row.case.fill, p.dtype, p.quant is None)
    size = (p.tokens * p.top_k + p.local_experts) * p.hidden_size * p.intermediate_size
    return _Question(row, text, frozenset(tokens), kind, size)


def _in_turn(items: list[Item], group: Callable[[Item], Hashable]) -> list[Item]:
    """The first item of every group, then the second of every group that has one, and so on."""
    seen: Counter[Hashable] = Counter()
    rank = []
    for item in items:
        rank.append(seen[group(item)])
        seen[group(item)] += 1
    return [items[n] for n in sorted(range(len(items)), key=rank.__getitem__)]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
