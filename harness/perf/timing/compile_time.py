"""How long Triton compiled: told by its own listener, so that it is counted wherever in a run it happens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Compiled:
    """seconds: of compiling kernels that were in no cache. kernels, cached: how many were compiled, how many found."""

    seconds: float = 0.0
    kernels: int = 0
    cached: int = 0


@contextmanager
def compiling() -> Iterator[Compiled]:
    """`with compiling() as compiled:` adds up what this process compiles. A listener that was there is told, too."""
    found = Compiled()
    if importlib.util.find_spec("triton") is None:
        yield found
        return
    import triton

    knobs = triton.knobs.compilation
    before = knobs.listener

    def listen(*, times: Any, cache_hit: bool, **rest: Any) -> None:
        if cache_hit:
            found.cached += 1
        else:
            found.kernels += 1
            found.seconds += times.total / 1e6
        if before is not None:
            before(times=times, cache_hit=cache_hit, **rest)

    knobs.listener = listen
    try:
        yield found
    finally:
        knobs.listener = before
