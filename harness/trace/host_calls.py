"""Python functions that one call runs: the host overhead, as a number that is the same on every machine.

Counted with sys.setprofile, in a pass of its own. What Triton does is left out, with all below it: interpreting a
kernel, or looking up a compiled one, is not the backend's code, and the first would hide it a thousandfold.
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
    """functions: "module.function" -> calls; synchronizes: explicit waits for the device."""

    functions: Counter[str] = field(default_factory=Counter)
    synchronizes: int = 0


def count(call: Callable[[], Any]) -> HostCalls:
    """What this thread runs in call(), itself included. Not counted: all below a function of Triton; other threads.

    The garbage collector is off meanwhile: what it would finalize is not the call's doing.
    """
    found = HostCalls()
    triton = _home("triton")
    outermost: FrameType | None = None  # of Triton, or of a synchronize: what it calls is not counted again
    names: dict[CodeType, str] = {}

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal outermost
        if outermost is not None:
            if event == "return" and frame is outermost:
                outermost = None
        elif event == "call":
            code = frame.f_code
            if code.co_filename.startswith(triton):
                if code.co_name in _WRAPPERS:  # a kernel made anew is compiled anew
                    found.functions[f"triton.{code.co_name}"] += 1
                outermost = frame
                return
            if code not in names:
                names[code] = f"{frame.f_globals.get('__name__', '?')}.{code.co_name}"
            found.functions[names[code]] += 1
            if code.co_name == "synchronize" and names[code].startswith("torch."):
                found.synchronizes += 1
                outermost = frame
        elif event == "c_call" and getattr(argument, "__name__", "") in ("synchronize", "_cuda_synchronize"):
            found.synchronizes += 1

    collecting, before = gc.isenabled(), sys.getprofile()
    gc.disable()
    # Triton is left out by its files alone; that the interpreter is not slowed down is what shielding is for.
    with shielding(lambda: sys.setprofile(None), lambda: sys.setprofile(profile)):
        try:
            sys.setprofile(profile)
            call()
        finally:
            sys.setprofile(before)
            if collecting:
                gc.enable()
    return found


def _home(package: str) -> str:
    """The directory of an imported package, or what no path begins with."""
    module = sys.modules.get(package)
    return str(Path(module.__file__).parent) if module is not None and module.__file__ else "\0"
