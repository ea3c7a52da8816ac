"""Record one call: kernels launched, operators dispatched, tensors allocated. And poison uninitialised memory.

A torch dispatch mode sees every operator of the calling thread, for any backend. While it is active, uninitialised
memory (torch.empty and similar) is filled with NaN, or with a large number for integers: a kernel that reads elements
that were never written cannot be right by luck. That memory also lies between fences (trace/fence.py): a kernel that
reads past the end of a workspace computes NaN, and a write there is detected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.trace import fence
from harness.trace.fence import poison_
from harness.trace.launches import Launch, in_launch, watching

_EMPTY = ("empty.memory_format", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")


@dataclass
class Allocation:
    """One tensor that an operator returned in new memory."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass
class Trace:
    """The launches, operators and allocations of one call, in order."""

    launched: list[Launch] = field(default_factory=list)  #: Triton kernels
    ops: list[str] = field(default_factory=list)  #: torch operators
    allocations: list[Allocation] = field(default_factory=list)
    fences: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  #: (what, before, behind)

    @property
    def launches(self) -> list[str]:
        """The names of the Triton kernels launched."""
        return [launch.name for launch in self.launched]

    def fenced(self, like: Tensor, what: str) -> Tensor:
        """Poisoned memory of like's shape, strides, dtype and device, between fences that `overrun` checks."""
        made = fence.fenced(like)
        self.watch(made, what)
        return poison_(made)

    def watch(self, tensor: Tensor, what: str) -> None:
        """Add a tensor's fences, if it has any, to those that `overrun` checks. what: its name in messages."""
        if ends := fence.fences(tensor):
            self.fences.append((what, *ends))

    def overrun(self) -> str:
        """The names of the tensors past whose ends something was written, or ""."""
        if fence.intact([end for _, *ends in self.fences for end in ends]):
            return ""
        return ", ".join(what for what, *ends in self.fences if not fence.intact(ends))

    @property
    def allocated_bytes(self) -> int:
        return sum(a.nbytes for a in self.allocations)

    def summary(self) -> dict[str, Any]:
        """The counts, ready for a verdict's record."""
        return {
            "launches": self.launches,
            "operators": len(self.ops),
            "allocations": len(self.allocations),
            "allocated_bytes": self.allocated_bytes,
        }


class Tracing(TorchDispatchMode):
    """`with Tracing() as trace:` records the calls of this thread, and poisons uninitialised memory."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()

    def __enter__(self) -> Trace:  # type: ignore[override]
        super().__enter__()
        self._watching = watching(self.trace.launched.append)
        self._watching.__enter__()
        return self.trace

    def __exit__(self, *error: Any) -> None:
        self._watching.__exit__(None, None, None)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if in_launch():
            return result
        name = func.__name__
        self.trace.ops.append(name)
        operands = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() and _storage(tensor) not in operands:
                kind = str(tensor.dtype).removeprefix("torch.")
                size = tensor.numel() * tensor.element_size()
                self.trace.allocations.append(Allocation(name, tuple(tensor.shape), kind, size))
                if name.startswith(_EMPTY) and tensor.device.type != "meta":
                    return self.trace.fenced(tensor, f"a workspace of its own: {name} {tuple(tensor.shape)}")
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
