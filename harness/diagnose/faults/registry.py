"""A bank of wrong oracles: each computes the layer with one mistake that real kernels have made.

    @suspect("router weight applied twice")
    def _(o):
        return o(weights=o.weights**2)

A suspect takes an Oracle (oracle/stages.py) and returns the wrong Answer, or None where the mistake cannot be made;
where it makes no difference the right answer comes back. `@suspect` with values makes one suspect for each of them. Of
several that answer alike the one that stands first is named first: `routing`, `rows`, `layer`, `scales`, top down.
diagnose/match.py compares their answers with a kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

from harness.oracle.stages import Answer, Oracle

Fault = Callable[[Oracle], Answer | None]
FAULTS: dict[str, Fault] = {}
TILES = (16, 32, 64, 128)


def fault(template: str, /, **values: Iterable[Any]) -> Callable[[Callable], Callable]:
    """Register function(oracle, **values) under a name: the template, whose braces the values fill."""

    def register(function: Callable) -> Callable:
        for chosen in product(*values.values()):
            named = dict(zip(values, chosen))
            full = template.format(**named)
            if full in FAULTS:
                raise ValueError(f"suspect {full!r}: the bank has one of that name")
            FAULTS[full] = partial(function, **named)
        return function

    return register
