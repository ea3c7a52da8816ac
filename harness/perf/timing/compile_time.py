"""The time that Triton compiles, from its own listener, which sees every compilation of the process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class CompileTime:
    """Compilations of this process."""

    seconds: float = 0.0  #: for kernels that were not in the cache
    kernels: int = 0  #: number of these kernels
    cached: int = 0  #: number of kernels from the cache


@contextmanager
def compiling() -> Iterator[CompileTime]:
    """`with compiling() as compiled:` sums up the compilations. Calls a listener that was set before, too."""
    compiled = CompileTime()
    if importlib.util.find_spec("triton") is None:
        yield compiled
        return
    import triton

    knobs = triton.knobs.compilation
    before = knobs.listener

    def listen(*, times: Any, cache_hit: bool, **rest: Any) -> None:
        if cache_hit:
            compiled.cached += 1
        else:
            compiled.kernels += 1
            compiled.seconds += times.total / 1e6
        if before is not None:
            before(times=times, cache_hit=cache_hit, **rest)

    knobs.listener = listen
    try:
        yield compiled
    finally:
        knobs.listener = before
