"""Rows in which every two options meet: most faults that depend on options need one or two of them.

The smallest set of such rows is hard to find; a greedy choice comes close (Cohen et al. 1997, "The AETG system", IEEE
TSE 23(7)). Deterministic: the same options give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product

from harness.problem.case import Case, DescriptorError


def pairwise(why: str, **options: Iterable[str]) -> dict[str, str]:
    """Rows that cover every pair of values of two options, if the pair can stand in one descriptor.

    A value is one or more tokens; "" drops the option. Options with required tokens have no "".
    """
    values = {name: list(each) for name, each in options.items()}
    missing = [
        {(first, a), (second, b)}
        for first, second in combinations(values, 2)
        for a, b in product(values[first], values[second])
    ]
    rows = {}
    while missing:
        chosen = dict(missing[0])
        if not _possible(chosen, values):
            missing.pop(0)
            continue
        for name in [name for name in values if name not in chosen]:
            held = set(chosen.items())
            worth = {v: sum(pair <= held | {(name, v)} for pair in missing) for v in values[name]}
            best_first = sorted(values[name], key=lambda v: -worth[v])
            chosen[name] = next(v for v in best_first if _possible({**chosen, name: v}, values))
        held = set(chosen.items())
        missing = [pair for pair in missing if not pair <= held]
        rows[_text(chosen, values)] = why
    return rows


def _text(chosen: dict[str, str], values: dict[str, list[str]]) -> str:
    return "-".join(chosen[name] for name in values if chosen.get(name))


def _possible(chosen: dict[str, str], values: dict[str, list[str]]) -> bool:
    """Whether some descriptor has these options, for some values of the required ones that are missing."""
    required = [name for name in values if name not in chosen and "" not in values[name]]
    for rest in product(*(values[name] for name in required)):
        try:
            Case.parse(_text({**chosen, **dict(zip(required, rest))}, values))
        except DescriptorError:
            continue
        return True
    return False
