"""Triton's interpreter as a sanitizer: memory faults of interpreted kernels that show only with other sizes.

outside    An active lane reads or writes outside the memory of the tensor from which its pointer is derived. Fences
           (trace/fence.py) are not part of that memory. The sanitizer masks such lanes off.
too wide   An active lane uses an offset, computed in 32 bits, that reaches a limit: it overflows with larger tensors.
           Real overflow begins at 2^31 elements, too many for an interpreter. A smaller limit, with tensors to match,
           is a model of it.

A pointer carries its tensor, and a number or pointer its too wide lanes, through every operator that derives another
value from it. The content of masked lanes does not matter. An addition, product, quotient, left shift or conversion of
an offset is an offset; a remainder, right shift or bitwise operation of it is another number.
"""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from harness.trace.tracing import Trace

_MEMORY, _WIDE = "moe_harness_memory", "moe_harness_wide"  #: attributes of the interpreter's tensors
#: Operators whose result is a view of their first tensor.
_VIEWS = (
    "create_expand_dims", "create_broadcast", "create_reshape", "create_trans", "create_unsplat", "create_bitcast",
    "create_int_to_ptr", "create_ptr_to_int",
)  # fmt: skip
_CASTS = ("create_int_cast",)
_GROWS = ("create_add", "create_sub", "create_mul", "create_shl")
_KEEPS = ("create_sdiv", "create_udiv", "create_idiv", "create_minsi", "create_minui", "create_maxsi", "create_maxui")
_MANY = 8  #: faults that are kept


@dataclass(frozen=True)
class MemoryFault:
    """A line of a kernel with a fault; `text` describes the first one there."""

    kernel: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.place}: {self.text}"


@dataclass(frozen=True)
class _Memory:
    """The addresses of a tensor, from `first` to before `end`."""

    name: str
    first: int
    end: int


@dataclass(frozen=True)
class _Wide:
    """The lanes (bool, of the value's shape) derived from a too wide 32-bit offset; one such offset and its place."""

    lanes: np.ndarray
    value: int
    place: str


@contextmanager
def guarding(trace: Trace, limit: int | None = None) -> Iterator[list[MemoryFault]]:
    """`with guarding(trace) as faults:` records the memory faults of kernels interpreted in it, at most one a line.

    trace: has the fences, and the current kernel as its last launch. limit: the number of elements from which a 32-bit
    offset is too wide; None: no limit. Only one guard may be active in a process.
    """
    from triton.runtime import interpreter

    guard = _Guard(trace, limit, interpreter)
    builder = interpreter.InterpreterBuilder
    shipped = {name: getattr(builder, name) for name in guard.operators if hasattr(builder, name)}  # fewer in 3.4
    convert = interpreter._implicit_cvt
    for name, function in shipped.items():
        setattr(builder, name, guard.operators[name](function))
    interpreter._implicit_cvt = guard.argument(convert)
    try:
        yield guard.faults
    finally:
        interpreter._implicit_cvt = convert
        for name, function in shipped.items():
            setattr(builder, name, function)


class _Guard:
    """The replaced operators of the interpreter, and the faults that they find."""

    def __init__(self, trace: Trace, limit: int | None, interpreter: Any) -> None:
        self.trace, self.limit, self.interpreter = trace, limit, interpreter
        self.faults: list[MemoryFault] = []
        self.operators: dict[str, Callable[[Callable], Callable]] = dict.fromkeys(_VIEWS, self._view)
        self.operators |= {
            "create_splat": self._splat, "create_addptr": self._addptr, "create_masked_load": self._load,
            "create_masked_store": self._store, "create_atomic_rmw": self._atomic_rmw,
            "create_atomic_cas": self._atomic_cas, "create_select": self._select,
        }  # fmt: skip
        if limit is not None:
            self.operators |= dict.fromkeys(_GROWS, functools.partial(self._number, grows=True))
            self.operators |= dict.fromkeys(_KEEPS, functools.partial(self._number, grows=False))
            self.operators |= dict.fromkeys(_CASTS, self._cast)

    # -- pointers get their memory ------------------------------------------------------------------------------------
    def argument(self, convert: Callable) -> Callable:
        def implicit_cvt(arg: Any) -> Any:
            made = convert(arg)
            if isinstance(arg, Tensor):
                made.handle.attr[_MEMORY] = self._memory(arg)
            return made

        return implicit_cvt

    def _memory(self, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        first = storage.data_ptr()
        for name, before, behind in self.trace.fences:
            if before.untyped_storage().data_ptr() == first:
                return _Memory(name, first + before.numel() * before.element_size(), behind.data_ptr())
        kind = str(tensor.dtype).removeprefix("torch.")
        return _Memory(f"a tensor of its own, {kind} {tuple(tensor.shape)}", first, first + storage.nbytes())

    # -- derived values inherit it ------------------------------------------------------------------------------------
    def _view(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def operator(builder: Any, source: Any, *rest: Any) -> Any:
            made = as_shipped(builder, source, *rest)
            if source.attr:
                self._inherit(made, source, lambda lanes: as_shipped(builder, lanes, *rest))
            return made

        return operator

    def _splat(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def operator(builder: Any, kind: Any, source: Any) -> Any:
            made = as_shipped(builder, kind, source)
            if source.attr:
                self._inherit(made, source, lambda lanes: as_shipped(builder, kind, lanes))
            return made

        return operator

    def _inherit(self, made: Any, source: Any, change: Callable) -> None:
        if memory := source.attr.get(_MEMORY):
            made.attr[_MEMORY] = memory
        if wide := source.attr.get(_WIDE):
            if wide.lanes.shape != made.data.shape:
                marks = self.interpreter.TensorHandle(wide.lanes, self.interpreter.tl.int1)
                wide = _Wide(change(marks).data, wide.value, wide.place)
            made.attr[_WIDE] = wide

    def _select(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def operator(builder: Any, condition: Any, left: Any, right: Any) -> Any:
            made = as_shipped(builder, condition, left, right)
            memory = left.attr.get(_MEMORY)
            if memory and memory == right.attr.get(_MEMORY):
                made.attr[_MEMORY] = memory
            chosen = {True: left.attr.get(_WIDE), False: right.attr.get(_WIDE)}
            for wanted, wide in chosen.items():
                if wide:
                    lanes = wide.lanes & (condition.data == wanted)
                    self._mark(made, _Wide(lanes, wide.value, wide.place))
            return made

        return operator

    def _addptr(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def create_addptr(builder: Any, pointer: Any, offset: Any) -> Any:
            made = as_shipped(builder, pointer, offset)
            if memory := pointer.attr.get(_MEMORY):
                made.attr[_MEMORY] = memory
            for operand in (pointer, offset):
                if wide := operand.attr.get(_WIDE):
                    self._mark(made, wide)
            self._mark_if_too_wide(made, offset)
            return made

        return create_addptr

    def _number(self, as_shipped: Callable, grows: bool) -> Callable:
        @functools.wraps(as_shipped)
        def operator(builder: Any, left: Any, right: Any) -> Any:
            made = as_shipped(builder, left, right)
            for operand in (left, right):
                if wide := operand.attr.get(_WIDE):
                    self._mark(made, wide)
            if grows:
                self._mark_if_too_wide(made, made)
            return made

        return operator

    def _cast(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def operator(builder: Any, source: Any, kind: Any, signed: Any) -> Any:
            made = as_shipped(builder, source, kind, signed)
            if wide := source.attr.get(_WIDE):
                made.attr[_WIDE] = wide
            self._mark_if_too_wide(made, made)
            return made

        return operator

    def _mark_if_too_wide(self, made: Any, number: Any) -> None:
        if self.limit is None or number.dtype.scalar.name not in ("int32", "uint32"):
            return
        size = np.abs(number.data.astype(np.int64))
        if (size >= self.limit).any():
            self._mark(made, _Wide(size >= self.limit, int(size.max()), _place()))

    @staticmethod
    def _mark(made: Any, wide: _Wide) -> None:
        old = made.attr.get(_WIDE)
        lanes = wide.lanes if old is None else old.lanes | wide.lanes
        first = old or wide
        made.attr[_WIDE] = _Wide(np.broadcast_to(lanes, made.data.shape), first.value, first.place)

    # -- accesses are checked -----------------------------------------------------------------------------------------
    def _load(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def create_masked_load(builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
            return as_shipped(builder, pointers, self._checked(pointers, mask, "reads"), other, *rest)

        return create_masked_load

    def _store(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def create_masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return as_shipped(builder, pointers, value, self._checked(pointers, mask, "writes"), *rest)

        return create_masked_store

    def _atomic_rmw(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def create_atomic_rmw(builder: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return as_shipped(builder, kind, pointers, value, self._checked(pointers, mask, "writes"), *rest)

        return create_atomic_rmw

    def _atomic_cas(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def create_atomic_cas(builder: Any, pointers: Any, *rest: Any) -> Any:
            handle = self.interpreter.TensorHandle
            everywhere = handle(np.ones(pointers.data.shape, bool), self.interpreter.tl.int1)
            if not self._checked(pointers, everywhere, "writes").data.all():
                raise IndexError(str(self.faults[-1]))  # without a mask, no lane can be left out
            return as_shipped(builder, pointers, *rest)

        return create_atomic_cas

    def _checked(self, pointers: Any, mask: Any, does: str) -> Any:
        """The mask without the lanes that leave the pointers' memory. does: "reads" or "writes"."""
        if wide := pointers.attr.get(_WIDE):
            if (wide.lanes & mask.data).any():
                times = 2**31 // (self.limit or 1)
                text = f"{does} at an int32 offset of {wide.value} elements ({wide.place}); it would overflow"
                self._report(f"{text} with tensors of {times} times the size")
        memory = pointers.attr.get(_MEMORY)
        if memory is None:
            return mask
        first, end = np.uint64(memory.first), np.uint64(memory.end - _bytes(pointers))
        inside = (pointers.data >= first) & (pointers.data <= end)
        if inside.all():
            return mask
        outside = np.broadcast_to(mask.data, inside.shape) & ~inside
        if not outside.any():
            return mask
        lane = int(pointers.data[outside].flat[0])
        size = _bytes(pointers)
        away = f"{(lane - memory.end) // size + 1} elements behind" if lane >= memory.end else ""
        away = away or f"{-(-(memory.first - lane) // size)} elements before"
        self._report(f"{does} {int(outside.sum())} elements outside of {memory.name}, the first {away} it")
        return self.interpreter.TensorHandle(mask.data & inside, mask.dtype)

    def _report(self, text: str) -> None:
        kernel, place = (self.trace.launches or ["a kernel"])[-1], _place()
        known = {(fault.kernel, fault.place) for fault in self.faults}
        if len(self.faults) < _MANY and (kernel, place) not in known:
            self.faults.append(MemoryFault(kernel, place, text))


def _bytes(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _place() -> str:
    """The current line of the interpreted kernel: "gemm.py:98 `a_ptrs = ...`"."""
    frame, skipped = sys._getframe(1), (f"{Path('triton', 'language')}", f"{Path('triton', 'runtime')}")
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not any(part in name for part in skipped) and "interpreter.py" not in name:
            return f"{Path(name).name}:{frame.f_lineno} `{linecache.getline(name, frame.f_lineno).strip()}`"
        frame = frame.f_back  # type: ignore[assignment]
    return "somewhere"
