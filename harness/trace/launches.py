"""Launches of Triton kernels: name, grid, and everything that compiling the same kernel again needs.

Every launch, interpreted or compiled, goes through the method `run` of the object that @triton.jit makes. The hooks are
installed only while a watcher is registered: at any other time, timings measure an unchanged Triton.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

#: The numbers that Triton passes as 32-bit integers.
_SMALL = range(-(2**31), 2**31)
_ODD, _WIDE = 7, 2**32  # representatives: not divisible by 16, and beyond 32 bits


@dataclass(frozen=True)
class Launch:
    """One launch, without its tensors: `arguments` holds what Triton specialises a kernel for, ready for JSON.

    kernel: "package.module:function", or "" for a kernel that was compiled by hand, of which only the name is known.
    grid: one to three numbers of program instances; () if unknown.
    arguments: by parameter, see `described`. options: num_warps, num_stages and the like.
    """

    name: str
    grid: tuple[int, ...] = ()
    kernel: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    constants: tuple[str, ...] = ()  #: the parameters that are constants for the compiler

    @property
    def programs(self) -> int:
        """Program instances of the grid."""
        count = 1
        for size in self.grid or (0,):
            count *= size
        return count

    def __str__(self) -> str:
        shown = list(self.grid)
        while len(shown) > 1 and shown[-1] == 1:
            shown.pop()
        return f"{self.name}[{','.join(map(str, shown)) or '?'}]"

    def spec(self) -> dict[str, Any]:
        """Everything but the grid, ready for JSON. Equal for two launches that run the same machine code."""
        return {
            "kernel": self.kernel, "arguments": self.arguments, "options": self.options,
            "constants": list(self.constants),
        }  # fmt: skip


@contextmanager
def watching(callback: Callable[[Launch], None]) -> Iterator[None]:
    """Call callback(launch) for every launch of this process, before the kernel runs."""
    with _lock:
        if not _watchers:
            _install()
        _watchers.append(callback)
    try:
        yield
    finally:
        with _lock:
            _watchers.remove(callback)
            if not _watchers:
                while _undo:
                    _undo.pop()()


@contextmanager
def shielding(pause: Callable[[], None], resume: Callable[[], None]) -> Iterator[None]:
    """Call pause() before and resume() after Triton's own work for each launch, compiled or interpreted."""
    from triton.runtime.jit import JITFunction

    def shielded(as_shipped: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            pause()
            try:
                return as_shipped(*args, **kwargs)
            finally:
                resume()

        return run

    kinds: list[Any] = [_interpreted(), JITFunction]
    shipped = [kind.run for kind in kinds]
    try:
        for kind in kinds:
            kind.run = shielded(kind.run)
        yield
    finally:
        for kind, run in zip(kinds, shipped):
            kind.run = run


_watchers: list[Callable[[Launch], None]] = []
_undo: list[Callable[[], None]] = []
_lock = threading.Lock()
_running = threading.local()  # .launch: of the compiled `run` that this thread is in; .depth: of `run`s it is in


def in_launch() -> bool:
    """Whether this thread is inside a watched launch: the interpreter's work there is not the backend's overhead."""
    return getattr(_running, "depth", 0) > 0


def _notify(launch: Launch) -> None:
    for callback in list(_watchers):
        callback(launch)


def _interpreted() -> Any:
    """InterpretedFunction; in Triton 3.4 patched so that its launches go through its `run`, as in later versions."""
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    kind: Any = InterpretedFunction
    if not hasattr(kind, "run"):

        def run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
            return GridExecutor(self.rewrite(), self.arg_names, grid)(*args, **kwargs)

        kind.run = run
        kind.__getitem__ = lambda self, grid: lambda *args, **kw: kind.run(self, *args, grid=grid, warmup=False, **kw)
    return kind


def _install() -> None:
    import triton
    from triton.runtime.jit import JITFunction

    def entered(metadata: Any) -> None:
        # A kernel that was compiled by hand starts without `run`: only its name is known.
        _notify(getattr(_running, "launch", None) or Launch(metadata.get()["name"]))
        _running.launch = None

    def set_running(launch: Launch) -> None:
        _running.launch = launch

    runtime = triton.knobs.runtime
    if (hooks := runtime.launch_enter_hook) is None:  # Triton 3.4 has one hook, or none; later ones have a chain
        runtime.launch_enter_hook = entered
        _undo.append(lambda: vars(runtime).pop("launch_enter_hook", None))  # the default is the class's
    else:
        hooks.add(entered)
        _undo.append(lambda: hooks.remove(entered))
    # `run` of a compiled kernel may only compile (warmup), so the hook reports the start. The interpreter has no hook.
    _replace(_interpreted(), _notify)
    _replace(JITFunction, set_running)


def _replace(kind: Any, callback: Callable[[Launch], None]) -> None:
    """Make kind.run call callback(launch) first."""
    as_shipped = kind.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        def reported(sizes: Any) -> Any:
            callback(_launch(self, sizes, args, kwargs))
            return sizes

        if warmup:
            return as_shipped(self, *args, grid=grid, warmup=warmup, **kwargs)
        # Triton itself calls a grid that is a function, with the bound arguments.
        watched = (lambda meta: reported(grid(meta))) if callable(grid) else reported(grid)
        _running.depth = getattr(_running, "depth", 0) + 1
        try:
            return as_shipped(self, *args, grid=watched, warmup=warmup, **kwargs)
        finally:
            _running.depth -= 1
            _running.launch = None

    kind.run = run
    _undo.append(lambda: setattr(kind, "run", as_shipped))


@dataclass(frozen=True)
class _Parameters:
    signature: inspect.Signature
    constants: tuple[str, ...]
    unspecialised: frozenset[str]


@lru_cache
def _parameters(function: Any, unspecialised: tuple) -> _Parameters:
    signature = inspect.signature(function)
    names = list(signature.parameters)
    constants = tuple(n for n, p in signature.parameters.items() if "constexpr" in str(p.annotation))
    return _Parameters(
        signature, constants, frozenset(names[n] if isinstance(n, int) else n for n in unspecialised)
    )  # fmt: skip


def _launch(kernel: Any, grid: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    function = kernel.fn
    declared = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize")
    parameters = _parameters(function, tuple(declared or ()))
    names = parameters.signature.parameters
    bound = parameters.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
    bound.apply_defaults()
    arguments = {
        name: described(value) if name in parameters.constants else specialised(value, name in parameters.unspecialised)
        for name, value in bound.arguments.items()
    }
    options = {k: described(v) for k, v in sorted(kwargs.items()) if k not in names}
    kernel_name = f"{function.__module__}:{function.__qualname__}"
    return Launch(
        function.__name__, tuple(int(n) for n in grid), kernel_name, arguments, options, parameters.constants
    )  # fmt: skip


def specialised(value: Any, unspecialised: bool = False) -> Any:
    """An argument as far as Triton specialises for it, ready for JSON: a number is replaced by one of its kind.

    int -> a representative: 1, 16 (a multiple of 16), 7 (any other), and the same beyond 32 bits; float -> 0.5.
    unspecialised: the kernel asks not to be compiled anew for 1 and for multiples of 16.
    """
    if isinstance(value, float):
        return 0.5
    if isinstance(value, bool) or not isinstance(value, int):
        return described(value)
    if value == 1 and not unspecialised:
        return 1
    offset = 0 if value in _SMALL else _WIDE
    return offset + (16 if value % 16 == 0 and not unspecialised else _ODD)


def described(value: Any) -> Any:
    """A value ready for JSON. None, bool, int, float and str stand for themselves; dictionaries of one key name others:

    {"tensor": dtype, "aligned": to 16 bytes, "small": storage below 2 GiB}, {"dtype": a Triton type},
    {"torch": a torch dtype}, {"tuple": [...]}, {"function": "module:name"}, {"descriptor": {...}}, or
    {"opaque": type} for any other value, which cannot be compiled again.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind.__name__ == "constexpr":
        return described(value.value)
    if isinstance(value, torch.dtype):
        return {"torch": str(value).removeprefix("torch.")}
    if hasattr(value, "data_ptr") and hasattr(value, "dtype"):
        storage = value.untyped_storage().nbytes() if hasattr(value, "untyped_storage") else 0
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": dtype, "aligned": value.data_ptr() % 16 == 0, "small": storage < 2**31}
    if kind.__name__ == "TensorDescriptor":
        parts = ("shape", "strides", "block_shape", "padding")
        return {
            "descriptor": {"base": described(value.base)} | {p: described(getattr(value, p, None)) for p in parts}
        }  # fmt: skip
    if isinstance(value, (tuple, list)):
        return {"tuple": [described(v) for v in value]}
    if kind.__module__.startswith("triton.language") and kind.__name__ == "dtype":
        return {"dtype": value.name}
    if hasattr(value, "fn") and hasattr(value.fn, "__qualname__"):
        return {"function": f"{value.fn.__module__}:{value.fn.__qualname__}"}
    return {"opaque": kind.__name__}
