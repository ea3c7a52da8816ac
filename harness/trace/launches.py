"""Launches of Triton kernels: each with its name, its grid, and all that compiling the same kernel again would need.

Interpreted or compiled, every launch goes through the `run` of what @triton.jit made. Watched it is only while somebody
watches: whoever measures time afterwards measures an unchanged Triton.
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

#: The type that a number has for Triton: 32 bits where it fits.
_SMALL = range(-(2**31), 2**31)
_ODD, _WIDE = 7, 2**32  # representatives: not divisible by 16, and beyond 32 bits


@dataclass(frozen=True)
class Launch:
    """One launch. No tensor is kept: `arguments` holds what Triton specialises a kernel for, ready for JSON.

    kernel: "package.module:function", or "" for a kernel that was compiled by hand, of which the name alone is known.
    grid: one to three numbers of program instances; () if unknown.
    arguments: by parameter, see `described`. options: num_warps, num_stages and the like, as given.
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
        """All but the grid, JSON-able: equal for two launches that run the same machine code."""
        return {
            "kernel": self.kernel, "arguments": self.arguments, "options": self.options,
            "constants": list(self.constants),
        }  # fmt: skip


@contextmanager
def watching(callback: Callable[[Launch], None]) -> Iterator[None]:
    """Call back with every launch of this process, before the kernel runs."""
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
    """Call pause() before and resume() after whatever Triton does for a launch, compiled or interpreted."""
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


def inside() -> bool:
    """Whether this thread is inside a launch that is watched: what the interpreter does there is nobody's overhead."""
    return getattr(_running, "depth", 0) > 0


def _tell(launch: Launch) -> None:
    for callback in list(_watchers):
        callback(launch)


def _interpreted() -> Any:
    """InterpretedFunction; in Triton 3.4 its launches are made to go through its `run`, as they do in later ones."""
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
        # A kernel that was compiled by hand is started without `run`: its name is all there is to see.
        _tell(getattr(_running, "launch", None) or Launch(metadata.get()["name"]))
        _running.launch = None

    def set_running(launch: Launch) -> None:
        _running.launch = launch

    runtime = triton.knobs.runtime
    if (hooks := runtime.launch_enter_hook) is None:  # Triton 3.4 has one hook, or none; later ones have a chain
        runtime.launch_enter_hook = entered
        _undo.append(lambda: setattr(runtime, "launch_enter_hook", None))
    else:
        hooks.add(entered)
        _undo.append(lambda: hooks.remove(entered))
    # Compiled, `run` may only compile (warmup): the hook tells when a kernel starts. The interpreter calls no hook.
    _replace(_interpreted(), _tell)
    _replace(JITFunction, set_running)


def _replace(kind: Any, found: Callable[[Launch], None]) -> None:
    as_shipped = kind.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        def told(sizes: Any) -> Any:
            found(_launch(self, sizes, args, kwargs))
            return sizes

        if warmup:
            return as_shipped(self, *args, grid=grid, warmup=warmup, **kwargs)
        # A function as a grid is called by Triton itself, with what it makes of the arguments.
        watched = (lambda meta: told(grid(meta))) if callable(grid) else told(grid)
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
    """An argument as Triton tells it from others, ready for JSON: of a number its kind is left, not its value.

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
    {"opaque": type} for what cannot be described; compiling it is then refused with that word.
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
