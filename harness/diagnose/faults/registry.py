"""The registry of faults: wrong oracles, each of which computes the layer with one mistake that real kernels have made.

    @fault("router_weight.twice", "router weight applied twice", flag="router_weight_on_input", effect="doubled")
    def _(o):
        return o(weights=o.weights**2)

A fault takes an Oracle (oracle/stages.py) and returns the wrong Answer, or None where the mistake is impossible; where
the mistake makes no difference it returns the right answer. `@fault` with values registers one fault for each of them.
The id is stable and for code; the text is for readers and may be improved. diagnose/match.py compares the answers with
a kernel's output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from harness.oracle.stages import Answer, Oracle

EFFECTS = ("", "ignored", "doubled")
TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Fault:
    """One mistake, and the oracle that makes it. Call it with an Oracle for the wrong Answer, or None."""

    id: str  #: dotted lower-case words, unique in the bank
    text: str  #: the mistake in English, unique in the bank
    answer: Callable[[Oracle], Answer | None]
    effect: str = ""  #: "ignored", "doubled", or "" for any other mistake
    flag: str = ""  #: the field of a descriptor (problem/case.py) that is ignored or applied twice, if it is a field
    calls_ago: int = 0  #: of leftovers: how many calls back the data is from, 1 for the previous call; otherwise 0

    def __post_init__(self) -> None:
        unnamed = self.effect == "ignored" and not self.flag
        if self.effect not in EFFECTS or unnamed or (self.flag and not self.effect):
            raise ValueError(f"fault {self.id!r}: flag={self.flag!r} with effect={self.effect!r}")

    def __call__(self, o: Oracle) -> Answer | None:
        return self.answer(o)


#: Every fault by its id. Of several that give the same answer the first one is named first.
FAULTS: dict[str, Fault] = {}


def fault(id_: str, text: str, /, *, flag: str = "", effect: str = "", **values: Iterable[Any]) -> Callable:
    """Register function(oracle, **values) as one fault for each combination of values.

    The values fill the braces of `id_` and of `text`; in an id they are reduced to lower-case words. ValueError if the
    bank has the id or the text already.
    """

    def register(function: Callable) -> Callable:
        for chosen in product(*values.values()):
            named = dict(zip(values, chosen))
            words = {name: _word(value) for name, value in named.items()}
            add(Fault(id_.format(**words), text.format(**named), partial(function, **named), effect, flag))
        return function

    return register


def add(new: Fault) -> None:
    """Add a fault to the bank. ValueError if the bank has its id or its text already."""
    if new.id in FAULTS:
        raise ValueError(f"fault {new.id!r}: the bank has one with that id")
    if new.text in _IDS:
        raise ValueError(f"fault {new.id!r}: the bank has one with the text {new.text!r}")
    FAULTS[new.id], _IDS[new.text] = new, new.id


def with_text(text: str) -> Fault | None:
    """The fault of the bank with this text, or None: records hold texts."""
    return FAULTS.get(_IDS.get(text, ""))


_IDS: dict[str, str] = {}  #: by the faults' texts


def _word(value: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(value).lower()).strip("_")
