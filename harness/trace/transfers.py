"""Copies between host and device, and waits for the device, of one call: derived from the operators it dispatches.

On a GPU the devices of operands and results decide. The CPU has one memory, so intentions are counted there: operators
that would copy or wait if the tensors lived on a device.

    host to device   a tensor made from Python data (torch.tensor([...]), x[[0, 2]], torch.from_numpy)
    device to host   .item(), bool(t), int(t), float(t); .tolist(), .cpu(), .numpy(), numpy.asarray(t)
    waits            results that the host needs to go on (nonzero, unique, a boolean mask as an index, .item(),
                     torch.equal), and copies that block

Invisible on the CPU: .to(device), which may go either way, and that a tensor belongs on the host, where its .tolist()
is free. Invisible everywhere: the inner work of operators, and other threads.
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

from harness.trace.launches import in_launch

#: Methods that read a tensor on the host; they dispatch no operator for a CPU tensor.
_READS = ("tolist", "cpu", "numpy", "__array__")
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass
class Transfers:
    """The names of the operators and methods, in order."""

    h2d: list[str] = field(default_factory=list)
    d2h: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


@contextmanager
def transfers(intended: bool) -> Iterator[Transfers]:
    """`with transfers(...) as seen:` records the transfers of this thread in `seen`.

    intended: the call runs on the CPU, and counts as if it ran on a device.
    """
    seen = Transfers()
    functions = _Functions(seen, intended)
    with functions, _Operators(seen, functions):
        yield seen


class _Functions(TorchFunctionMode):
    """Records methods of tensors that dispatch no operator; `current` is the method of a dispatched operator."""

    def __init__(self, seen: Transfers, intended: bool) -> None:
        super().__init__()
        self.seen = seen
        self.intended = intended
        self.current = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outer, self.current = self.current, getattr(func, "__name__", "")
        try:
            if self.intended and self.current in _READS and not in_launch():
                self.seen.d2h.append(self.current)
                self.seen.waits.append(self.current)
            return func(*args, **(kwargs or {}))
        finally:
            self.current = outer


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Transfers, functions: _Functions) -> None:
        super().__init__()
        self.seen = seen
        self.functions = functions

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if in_launch() or "meta" in {t.device.type for t in operands + results}:
            return result
        name = func.__name__
        direction = self._intended(name, results) if self.functions.intended else _actual(name, operands, results)
        if direction:
            getattr(self.seen, direction).append(name)
        on_device = self.functions.intended or any(t.device.type != "cpu" for t in operands)
        if (on_device and _decides(func, args, kwargs)) or (direction and not _non_blocking(name, args, kwargs)):
            self.seen.waits.append(name)
        return result

    def _intended(self, name: str, results: list[Tensor]) -> str:
        if name.startswith("_local_scalar_dense"):
            return "d2h"
        # x[0] = 1.0 makes a tensor of the number, which a device kernel takes as an argument: no copy.
        number = self.functions.current == "__setitem__" and bool(results) and results[0].dim() == 0
        return "h2d" if name.startswith("lift_fresh") and not number else ""


def _actual(name: str, operands: list[Tensor], results: list[Tensor]) -> str:
    """The direction of an operator's copy, by the devices of its tensors; "" for no copy."""
    if name.startswith("_local_scalar_dense"):
        return "d2h" if operands[0].device.type != "cpu" else ""
    copies = name.startswith(("copy_", "_to_copy"))
    # A CPU tensor without dimensions is passed as a number to an operator on a device.
    places = {t.device.type == "cpu" for t in operands if copies or t.dim()}
    if not results or len(places | {results[0].device.type == "cpu"}) < 2:
        return ""
    return "d2h" if results[0].device.type == "cpu" else "h2d"


def _decides(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host needs the result, or its size, to go on."""
    name = func.__name__
    if name.startswith(("index.", "index_put", "_index_put")):
        # The size of a result depends on masks, not on positions. Writing one number through a mask needs no size.
        masks = any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]))
        return masks and (name.startswith("index.") or args[2].numel() != 1)
    if name.startswith("repeat_interleave") and kwargs.get("output_size") is not None:
        return False
    return bool(_WAITS & set(func.tags))


def _non_blocking(name: str, args: Any, kwargs: Any) -> bool:
    if name.startswith("copy_") and len(args) > 2:
        return bool(args[2])
    return bool(kwargs.get("non_blocking", False))
