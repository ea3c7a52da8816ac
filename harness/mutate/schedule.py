"""The order in which a bug's cases run, and the sample of the entries for a short run.

Nothing here depends on the outcomes of an earlier run.
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

SEEDS = 20  #: the cases of controls have seeds 0 to 19
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Candidate:
    """A row, and the properties that decide its position."""

    row: CaseRow
    text: str
    tokens: frozenset[str]  #: of the descriptor, and the beginnings of tokens with dots
    kind: tuple[Hashable, ...]
    size: int


def by_relevance(bug: Bug, device: Device) -> list[CaseRow]:
    """Return every row of the suite, the rows that match most of the entry's `reveals` first.

    Among equally relevant rows the families, and in each family the kinds of case, take turns, the smallest case of a
    kind first. A word matches a token of the descriptor, or the beginning of one: "e4m3" matches "e4m3.block.group".
    """
    words = set(bug.words)

    def relevance(candidate: _Candidate) -> tuple[int, int]:
        hits = len(words & candidate.tokens)
        return (-(candidate.row.family == bug.family) * (1 + hits), -hits)

    ranked = sorted(((relevance(c), c) for c in _candidates(device)), key=lambda pair: pair[0])
    turns = _in_turn(ranked, lambda pair: (pair[0], pair[1].kind, pair[1].row.case.scenario))
    turns = _in_turn(turns, lambda pair: (pair[0], pair[1].row.family))
    return [candidate.row for _, candidate in sorted(turns, key=lambda pair: pair[0])]


def spread(name: str, device: Device) -> list[CaseRow]:
    """Return every row of the suite: the families take turns, and in each family its fills and dtypes.

    The order is pseudo-random, and depends on `name` alone.
    """
    shuffled = sorted(_candidates(device), key=lambda candidate: _digest(f"{name} {candidate.text}"))
    turns = _in_turn(_in_turn(shuffled, lambda c: c.kind), lambda c: c.row.family)
    return [candidate.row for candidate in turns]


def seeded(rows: Iterable[CaseRow]) -> list[CaseRow]:
    """Return the same rows with the seeds 0 to SEEDS - 1 in turn."""
    return [CaseRow(row.case.change(seed=n % SEEDS), row.family, row.why) for n, row in enumerate(rows)]


def sample(bugs: dict[str, Bug], one_in: int) -> dict[str, Bug]:
    """Return one in `one_in` of the entries, chosen by their names alone, and at least one of every class."""
    chosen = {name for name in bugs if _digest(name) % one_in == 0}
    for kind in {bug.kind for bug in bugs.values()}:
        names = [name for name, bug in bugs.items() if bug.kind == kind]
        if not chosen & set(names):
            chosen.add(min(names, key=_digest))
    return {name: bug for name, bug in bugs.items() if name in chosen}


def _candidates(device: Device) -> list[_Candidate]:
    """Return every row of the suite for this device, small ones first."""
    if device not in _cache:
        rows = [row for module in families.untimed() for row in families.rows(module, device.on_cpu)]
        _cache[device] = sorted(map(_candidate, rows), key=lambda candidate: candidate.size)
    return _cache[device]


_cache: dict[Device, list[_Candidate]] = {}


def _candidate(row: CaseRow) -> _Candidate:
    text, p = str(row.case), row.case.problem
    tokens = {
        ".".join(parts[:n]) for parts in (t.split(".") for t in text.split("-")) for n in range(1, len(parts) + 1)
    }
    kind = (row.family, row.case.fill, p.dtype, p.quant is None)
    size = (p.tokens * p.top_k + p.local_experts) * p.hidden_size * p.intermediate_size
    return _Candidate(row, text, frozenset(tokens), kind, size)


def _in_turn(items: list[Item], group: Callable[[Item], Hashable]) -> list[Item]:
    """Return the first item of every group, then the second of every group that has one, and so on."""
    seen: Counter[Hashable] = Counter()
    rank = []
    for item in items:
        rank.append(seen[group(item)])
        seen[group(item)] += 1
    return [items[n] for n in sorted(range(len(items)), key=rank.__getitem__)]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
