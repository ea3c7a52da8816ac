"""Exceptions of foreign code as text: whatever their classes do, a text comes back, and it has a bounded length."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

LINE = 200  #: characters of the message in one line, at most
BLOCK = 200_000  #: characters of a whole traceback, at most


def type_name(value: object) -> str:
    """The name of a value's class, whatever its metaclass does."""
    return str(type.__dict__["__name__"].__get__(type(value)))


def describe_error(error: BaseException) -> str:
    """ "ValueError: the first line of its message", or "SystemExit" for one without a message."""
    line = _line(lambda: str(error), "str")
    return f"{type_name(error)}: {line}" if line else type_name(error)


def describe_value(value: object) -> str:
    """repr(value) in one line, cut; the class of a value that has none."""
    return _line(lambda: repr(value), f"{type_name(value)}: repr")


def _line(text: Callable[[], str], what: str) -> str:
    try:
        whole = text()
    except BaseException as error:  # of a foreign __str__ or __repr__: the text says so
        return f"<{what}() raised {type_name(error)}>"
    head = str.__getitem__(whole, slice(LINE * 10))  # 10 MB are not split into lines, nor do methods of a subclass run
    line = next((line.strip() for line in head.splitlines() if line.strip()), "")
    return line if len(line) <= LINE else line[:LINE] + "..."


def format_error(error: BaseException) -> str:
    """The whole traceback, with those of the causes; its middle is left out if it is long."""
    try:
        text = "".join(traceback.format_exception(error))
    except BaseException as second:  # a hostile class, or groups nested too deep: where it was raised is still known
        where = "".join(traceback.format_tb(traceback_of(error)))
        text = f"Traceback (the exception itself cannot be formatted: {type_name(second)}):\n{where}"
        text += describe_error(error)
    if len(text) <= BLOCK:
        return text
    half = BLOCK // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters more ...\n{text[-half:]}"


def traceback_of(error: BaseException) -> TracebackType | None:
    """Its __traceback__, whatever its class defines under this name."""
    descriptor: Any = BaseException.__dict__["__traceback__"]
    found: TracebackType | None = descriptor.__get__(error)
    return found


def modules_of(error: BaseException) -> Iterator[str]:
    """The modules of the frames that it passed through; the last one raised it."""
    link = traceback_of(error)
    while link is not None:
        yield str(link.tb_frame.f_globals.get("__name__", ""))
        link = link.tb_next
