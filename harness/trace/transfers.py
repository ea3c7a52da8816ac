"""Copies between host and device, and waits for the device, of one call: seen from the operators it dispatches.

On a GPU the devices of operands and results tell. On the CPU there is one memory only, so intentions are counted: what
would be a copy or a wait if the tensors lived on a device.

    host to device   a tensor made from Python data (torch.tensor([...]), x[[0, 2]], torch.from_numpy)
    device to host   .item(), bool(t), int(t), float(t); .tolist(), .cpu(), .numpy(), numpy.asarray(t)
    waits            results that decide what comes next (nonzero, unique, a boolean mask as an index, .item(),
                     torch.equal), and copies that block

Not seen on the CPU: .to(device), for it may go either way; and that a tensor was meant to stay on the host, so that its
.tolist() is free. Not seen anywhere: what operators do inside, and other threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.trace.launches import inside

#: Methods that read a tensor on the host without dispatching an operator for it where it is there already.
_READS = ("tolist", "cpu", "numpy", "__array__")
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass
class Transfers:
    """Each list names what did it, in order."""

    h2d: list[str] = field(default_factory=list)
    d2h: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


@contextmanager
def transfers(intended: bool) -> Iterator[Transfers]:
    """`with transfers(...) as found:` fills found with what this thread does.

    intended: the call runs on the CPU, and what it would do on a device is counted.
    """
    found = Transfers()
    functions = _Functions(found, intended)
    with functions, _Operators(found, functions):
        yield found


class _Functions(TorchFunctionMode):
    """Sees the methods of tensors: those that dispatch nothing, and which of them a dispatched operator is part of."""

    def __init__(self, found: Transfers, intended: bool) -> None:
        super().__init__()
        self.found = found
        self.intended = intended
        self.current = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        outer, self.current = self.current, getattr(func, "__name__", "")
        try:
            if self.intended and self.current in _READS and not inside():
                self.found.d2h.append(self.current)
                self.found.waits.append(self.current)
            return func(*args, **(kwargs or {}))
        finally:
            self.current = outer


class _Operators(TorchDispatchMode):
    def __init__(self, found: Transfers, functions: _Functions) -> None:
        super().__init__()
        self.found = found
        self.functions = functions

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if inside() or "meta" in {t.device.type for t in operands + results}:
            return result
        name = func.__name__
        direction = self._intended(name, results) if self.functions.intended else _actual(name, operands, results)
        if direction:
            getattr(self.found, direction).append(name)
        there = self.functions.intended or any(t.device.type != "cpu" for t in operands)
        if (there and _decides(func, args, kwargs)) or (direction and not _non_blocking(name, args, kwargs)):
            self.found.waits.append(name)
        return result

    def _intended(self, name: str, results: list[Tensor]) -> str:
        if name.startswith("_local_scalar_dense"):
            return "d2h"
        # x[0] = 1.0 makes a tensor of a number that a kernel then takes as an argument.
        number = self.functions.current == "__setitem__" and bool(results) and results[0].dim() == 0
        return "h2d" if name.startswith("lift_fresh") and not number else ""


def _actual(name: str, operands: list[Tensor], results: list[Tensor]) -> str:
    """The direction of what an operator moves, by devices; "" for nothing."""
    if name.startswith("_local_scalar_dense"):
        return "d2h" if operands[0].device.type != "cpu" else ""
    copies = name.startswith(("copy_", "_to_copy"))
    # A tensor without dimensions is read as a number where it meets tensors of a device.
    places = {t.device.type == "cpu" for t in operands if copies or t.dim()}
    if not results or len(places | {results[0].device.type == "cpu"}) < 2:
        return ""
    return "d2h" if results[0].device.type == "cpu" else "h2d"


def _decides(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host must have the result, or its size, before it goes on."""
    name = func.__name__
    if name.startswith(("index.", "index_put", "_index_put")):
        # Indices are lists of positions, which decide nothing, or masks, which do: unless one number is written.
        masks = any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]))
        return masks and (name.startswith("index.") or args[2].numel() != 1)
    if name.startswith("repeat_interleave") and kwargs.get("output_size") is not None:
        return False
    return bool(_WAITS & set(func.tags))


def _non_blocking(name: str, args: Any, kwargs: Any) -> bool:
    if name.startswith("copy_") and len(args) > 2:
        return bool(args[2])
    return bool(kwargs.get("non_blocking", False))
