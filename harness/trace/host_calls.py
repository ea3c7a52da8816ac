"""Python functions that one call runs: the host overhead, as a number that is the same on every machine.

Counted with sys.setprofile, in a separate pass. Triton's functions are left out, with all that they call: interpreting
a kernel, or looking up a compiled one, is not the backend's code, and the former makes a thousand times as many calls.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from harness.trace.launches import shielding

_WRAPPERS = ("jit", "autotune", "heuristics")


@dataclass
class HostCalls:
    """The counts of one call."""

    functions: Counter[str] = field(default_factory=Counter)  #: calls, by "module.function"
    synchronizes: int = 0  #: explicit waits for the device


def count(call: Callable[[], Any]) -> HostCalls:
    """Count the functions that this thread runs in call(), itself included.

    Not counted: functions of Triton and all that they call; other threads. The garbage collector is off meanwhile: its
    finalizers do not belong to the call.
    """
    calls = HostCalls()
    triton = _home("triton")
    outermost: FrameType | None = None  # of Triton, or a synchronize: its callees are not counted
    names: dict[CodeType, str] = {}

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal outermost
        if outermost is not None:
            if event == "return" and frame is outermost:
                outermost = None
        elif event == "call":
            code = frame.f_code
            if code.co_filename.startswith(triton):
                if code.co_name in _WRAPPERS:  # a kernel that is made again is compiled again
                    calls.functions[f"triton.{code.co_name}"] += 1
                outermost = frame
                return
            if code not in names:
                names[code] = f"{frame.f_globals.get('__name__', '?')}.{code.co_name}"
            calls.functions[names[code]] += 1
            if code.co_name == "synchronize" and names[code].startswith("torch."):
                calls.synchronizes += 1
                outermost = frame
        elif event == "c_call" and getattr(argument, "__name__", "") in ("synchronize", "_cuda_synchronize"):
            calls.synchronizes += 1

    collecting, before = gc.isenabled(), sys.getprofile()
    gc.disable()
    # The file names alone leave Triton out; shielding keeps the profiler from slowing the interpreter down.
    with shielding(lambda: sys.setprofile(None), lambda: sys.setprofile(profile)):
        try:
            sys.setprofile(profile)
            call()
        finally:
            sys.setprofile(before)
            if collecting:
                gc.enable()
    return calls


def _home(package: str) -> str:
    """The directory of an imported package, or a string with which no path begins."""
    module = sys.modules.get(package)
    return str(Path(module.__file__).parent) if module is not None and module.__file__ else "\0"
