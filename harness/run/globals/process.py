"""Globals of Python and of the process."""

from __future__ import annotations

import _locale
import _signal
import gc
import locale
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from functools import partial
from typing import Any

from harness.base.raised import describe_value, type_name
from harness.run.globals.rule import Global, changed_keys, describe_change

#: All but those that have no handler, and real-time signals.
_SIGNALS = tuple(int(n) for n in signal.Signals if n not in (signal.SIGKILL, signal.SIGSTOP) and n < 32)
_ITIMER_REAL = int(signal.ITIMER_REAL)


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None  # deleted


def _handlers() -> list[Any]:
    return list(map(_signal.getsignal, _SIGNALS))


def _set_handlers(handlers: list[Any]) -> None:
    for number, before, after in zip(_SIGNALS, handlers, _handlers()):
        if before != after:
            signal.signal(number, before)


def _describe_handlers(before: list[Any], after: list[Any]) -> str:
    return ", ".join(
        f"{signal.Signals(n).name}: {describe_change(a, b)}" for n, a, b in zip(_SIGNALS, before, after) if a != b
    )


def _set_alarm(timer: tuple[float, float]) -> None:
    signal.setitimer(signal.ITIMER_REAL, *timer)


def _same_alarm(before: tuple[float, float], after: tuple[float, float]) -> bool:
    """Whether both run, or none: the time that is left differs."""
    return (bool(before[0]), before[1]) == (bool(after[0]), after[1])


def _environment() -> dict[bytes, bytes]:
    copy: dict[bytes, bytes] = os.environ._data.copy()  # type: ignore[attr-defined]
    return copy


def _set_environment(values: dict[bytes, bytes]) -> None:
    now = _environment()
    for key in now.keys() - values.keys():
        del os.environb[key]
    os.environb.update({key: value for key, value in values.items() if now.get(key) != value})


def _filters() -> tuple[Any, ...]:
    module: Any = warnings
    filters = module.filters
    return id(filters), list(filters), filters, module.showwarning, module._showwarnmsg_impl


def _set_filters(values: tuple[Any, ...]) -> None:
    module: Any = warnings
    _, content, module.filters, module.showwarning, module._showwarnmsg_impl = values
    module.filters[:] = content
    module._filters_mutated()


def _describe_filters(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    new = [each for each in after[1] if each not in before[1]]
    return f"{len(before[1])} -> {len(after[1])} filters" + (f", new: {describe_value(new)}" if new else "")


def _describe_list(before: list[Any], after: list[Any]) -> str:
    added, removed = ([x for x in a if x not in b] for a, b in ((after, before), (before, after)))
    parts = (f"{what} {describe_value(each)}" for what, each in (("added", added), ("removed", removed)) if each)
    return ", ".join(parts) or "another order"


def _streams() -> list[Any]:
    return [sys.stdout, sys.stderr, sys.stdin]


def _set_streams(streams: list[Any]) -> None:
    sys.stdout, sys.stderr, sys.stdin = streams


def _same_streams(before: list[Any], after: list[Any]) -> bool:
    return all(a is b for a, b in zip(before, after))


def _describe_streams(before: list[Any], after: list[Any]) -> str:
    names = ("sys.stdout", "sys.stderr", "sys.stdin")
    return ", ".join(f"{n}: {type_name(a)} -> {type_name(b)}" for n, a, b in zip(names, before, after) if a is not b)


def _set_path(path: list[str]) -> None:
    sys.path[:] = path


_CONTEXT: Any = multiprocessing.get_start_method.__self__  # type: ignore[attr-defined]


def _set_start_method(context: Any) -> None:
    _CONTEXT._actual_context = context


def _hooks() -> list[Any]:
    return [sys.excepthook, sys.unraisablehook, threading.excepthook]


def _set_hooks(hooks: list[Any]) -> None:
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


PROCESS = (
    Global("os.getcwd()", _cwd, os.chdir),
    Global("os.environ", _environment, _set_environment, changed_keys, by_import=True),
    Global("os.umask()", _umask, os.umask),
    Global("signal.getsignal()", _handlers, _set_handlers, _describe_handlers, by_import=True),
    Global("signal.getitimer()", lambda: signal.getitimer(_ITIMER_REAL), _set_alarm, same=_same_alarm),
    Global("warnings.filters", _filters, _set_filters, _describe_filters, by_import=True),
    Global("sys.path", lambda: list(sys.path), _set_path, _describe_list, by_import=True),
    Global("sys.stdout, sys.stderr, sys.stdin", _streams, _set_streams, _describe_streams, _same_streams),
    Global("sys.getrecursionlimit()", sys.getrecursionlimit, sys.setrecursionlimit),
    Global("sys.getswitchinterval()", sys.getswitchinterval, sys.setswitchinterval),
    Global("sys.gettrace()", sys.gettrace, sys.settrace),
    Global("sys.getprofile()", sys.getprofile, sys.setprofile),
    Global("sys.excepthook, sys.unraisablehook, threading.excepthook", _hooks, _set_hooks, by_import=True),
    Global("gc.isenabled()", gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
    Global("gc.get_threshold()", gc.get_threshold, lambda values: gc.set_threshold(*values), by_import=True),
    Global(
        "locale.setlocale()",
        partial(_locale.setlocale, _locale.LC_ALL),
        lambda name: locale.setlocale(locale.LC_ALL, name),
        by_import=True,
    ),
    Global("multiprocessing.get_start_method()", lambda: _CONTEXT._actual_context, _set_start_method, by_import=True),
)
