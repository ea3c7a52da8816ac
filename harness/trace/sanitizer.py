"""Triton's interpreter as a sanitizer: what interpreted kernels do to memory that only other sizes would show.

outside    a lane that is not masked off reads or writes outside of the memory of the tensor that its pointer came from:
           fences (trace/fence.py) do not belong to it. Such lanes are not carried out.
too wide   an offset computed in 32 bits that a lane follows is as large as a limit: with larger tensors it would
           overflow. Overflow proper begins at 2^31 elements, which no interpreter serves; the limit, and tensors to go
           with it, are a model of that on a smaller scale.

A pointer remembers the tensor it came from, and a number or pointer the lanes that were too wide, through every
operator that makes another of it; what a lane that is masked off holds is nobody's business. What follows from an
addition, a product, a quotient, a left shift or a conversion is still an offset; what a remainder, a right shift or a
bitwise operator makes of it is another number.
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

_ROOM, _WIDE = "moe_harness_room", "moe_harness_wide"
#: Operators whose first tensor the result is another view of.
_VIEWS = (
    "create_expand_dims", "create_broadcast", "create_reshape", "create_trans", "create_unsplat", "create_bitcast",
    "create_int_to_ptr", "create_ptr_to_int",
)  # fmt: skip
_CASTS = ("create_int_cast",)
_GROWS = ("create_add", "create_sub", "create_mul", "create_shl")
_KEEPS = ("create_sdiv", "create_udiv", "create_idiv", "create_minsi", "create_minui", "create_maxsi", "create_maxui")
_MANY = 8  #: faults that are kept


@dataclass(frozen=True)
class Fault:
    """One place in a kernel, and what it did there first."""

    kernel: str
    place: str
    told: str

    def __str__(self) -> str:
        return f"{self.kernel}, {self.place}: {self.told}"


@dataclass(frozen=True)
class _Room:
    """The addresses that belong to a tensor."""

    name: str
    first: int
    end: int


@dataclass(frozen=True)
class _Wide:
    """Which lanes hold, or came from, a 32-bit offset that was too wide; and one of them, and where it was made."""

    lanes: np.ndarray
    value: int
    place: str


@contextmanager
def guarding(trace: Trace, limit: int | None = None) -> Iterator[list[Fault]]:
    """`with guarding(trace) as faults:` finds what kernels interpreted in it do to memory; at most one fault a line.

    trace: knows the fences and, by its last launch, the kernel. limit: elements from which a 32-bit offset is too wide;
    None allows all. One at a time in a process.
    """
    from triton.runtime import interpreter

    guard = _Guard(trace, limit, interpreter)
    builder = interpreter.InterpreterBuilder
    shipped = {name: getattr(builder, name) for name in guard.operators if hasattr(builder, name)}  # 3.4 has fewer
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
    def __init__(self, trace: Trace, limit: int | None, interpreter: Any) -> None:
        self.trace, self.limit, self.interpreter = trace, limit, interpreter
        self.faults: list[Fault] = []
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

    # -- where pointers come from -------------------------------------------------------------------------------------
    def argument(self, convert: Callable) -> Callable:
        def implicit_cvt(arg: Any) -> Any:
            made = convert(arg)
            if isinstance(arg, Tensor):
                made.handle.attr[_ROOM] = self._room(arg)
            return made

        return implicit_cvt

    def _room(self, tensor: Tensor) -> _Room:
        storage = tensor.untyped_storage()
        first = storage.data_ptr()
        for name, before, behind in self.trace.fences:
            if before.untyped_storage().data_ptr() == first:
                return _Room(name, first + before.numel() * before.element_size(), behind.data_ptr())
        kind = str(tensor.dtype).removeprefix("torch.")
        return _Room(f"a tensor of its own, {kind} {tuple(tensor.shape)}", first, first + storage.nbytes())

    # -- what they become ---------------------------------------------------------------------------------------------
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
        if room := source.attr.get(_ROOM):
            made.attr[_ROOM] = room
        if wide := source.attr.get(_WIDE):
            if wide.lanes.shape != made.data.shape:
                marks = self.interpreter.TensorHandle(wide.lanes, self.interpreter.tl.int1)
                wide = _Wide(change(marks).data, wide.value, wide.place)
            made.attr[_WIDE] = wide

    def _select(self, as_shipped: Callable) -> Callable:
        @functools.wraps(as_shipped)
        def operator(builder: Any, condition: Any, left: Any, right: Any) -> Any:
            made = as_shipped(builder, condition, left, right)
            room = left.attr.get(_ROOM)
            if room and room == right.attr.get(_ROOM):
                made.attr[_ROOM] = room
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
            if room := pointer.attr.get(_ROOM):
                made.attr[_ROOM] = room
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

    # -- where they are followed --------------------------------------------------------------------------------------
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
                raise IndexError(str(self.faults[-1]))  # it has no mask that could leave a lane out
            return as_shipped(builder, pointers, *rest)

        return create_atomic_cas

    def _checked(self, pointers: Any, mask: Any, does: str) -> Any:
        """The mask, without the lanes that would leave the pointers' room."""
        if wide := pointers.attr.get(_WIDE):
            if (wide.lanes & mask.data).any():
                times = 2**31 // (self.limit or 1)
                told = f"{does} at an int32 offset of {wide.value} elements ({wide.place}); it would overflow"
                self._report(f"{told} with tensors of {times} times the size")
        room = pointers.attr.get(_ROOM)
        if room is None:
            return mask
        first, end = np.uint64(room.first), np.uint64(room.end - _bytes(pointers))
        inside = (pointers.data >= first) & (pointers.data <= end)
        if inside.all():
            return mask
        outside = np.broadcast_to(mask.data, inside.shape) & ~inside
        if not outside.any():
            return mask
        lane = int(pointers.data[outside].flat[0])
        size = _bytes(pointers)
        away = f"{(lane - room.end) // size + 1} elements behind" if lane >= room.end else ""
        away = away or f"{-(-(room.first - lane) // size)} elements before"
        self._report(f"{does} {int(outside.sum())} elements outside of {room.name}, the first {away} it")
        return self.interpreter.TensorHandle(mask.data & inside, mask.dtype)

    def _report(self, told: str) -> None:
        kernel, place = (self.trace.launches or ["a kernel"])[-1], _place()
        known = {(fault.kernel, fault.place) for fault in self.faults}
        if len(self.faults) < _MANY and (kernel, place) not in known:
            self.faults.append(Fault(kernel, place, told))


def _bytes(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _place() -> str:
    """The line of the kernel that is interpreted: "gemm.py:98 `a_ptrs = ...`"."""
    frame, skipped = sys._getframe(1), (f"{Path('triton', 'language')}", f"{Path('triton', 'runtime')}")
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not any(part in name for part in skipped) and "interpreter.py" not in name:
            return f"{Path(name).name}:{frame.f_lineno} `{linecache.getline(name, frame.f_lineno).strip()}`"
        frame = frame.f_back  # type: ignore[assignment]
    return "somewhere"
