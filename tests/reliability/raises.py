"""Faults that raise what backends do not raise, or answer what no backend may answer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.reliability.faults import add

RAISES, ANSWERS = "raises", "answers"


class OwnBase(BaseException):
    """An exception that `except Exception` does not see."""


class Mute(Exception):
    """An exception that cannot be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class NoName(type):
    """A metaclass whose classes have no name."""

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class Nameless(Exception, metaclass=NoName):
    """An exception whose class has no name."""


def _raise(make: Any) -> Any:
    def act() -> None:
        raise make()

    return act


def _group() -> BaseException:
    if sys.version_info < (3, 11):
        return RuntimeError("no exception groups in this Python")
    return BaseExceptionGroup("two", [ValueError("one"), KeyboardInterrupt()])  # noqa: F821


def _chain() -> None:
    """Raise an exception that is its own context, through another."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def _recurse() -> None:
    _recurse()


for make in (SystemExit, KeyboardInterrupt, GeneratorExit, OwnBase, StopIteration, StopAsyncIteration, MemoryError):
    add(RAISES, make.__name__, _raise(make))
add(RAISES, "SystemExit(0)", _raise(lambda: SystemExit(0)))
add(RAISES, "SystemExit in supports()", _raise(SystemExit), where="supports")
add(RAISES, "KeyboardInterrupt in prepare()", _raise(KeyboardInterrupt), where="prepare")
add(RAISES, "BrokenPipeError", _raise(BrokenPipeError))
add(RAISES, "EOFError", _raise(EOFError))
add(RAISES, "RecursionError", _recurse)
add(RAISES, "an exception group with KeyboardInterrupt", _raise(_group))
add(RAISES, "an exception whose str() raises", _raise(Mute))
add(RAISES, "an exception whose class has no name", _raise(Nameless))
add(RAISES, "an exception of 10 MB", _raise(lambda: ValueError("x" * 10_000_000)))
add(RAISES, "an exception with a lone surrogate", _raise(lambda: ValueError("\ud800 \0")))
add(RAISES, "an exception that is its own cause", _chain)
add(RAISES, "a failed assertion", _raise(AssertionError))
add(RAISES, "pytest.skip()", lambda: pytest.skip("not today"))
add(RAISES, "pytest.xfail()", lambda: pytest.xfail("as expected"))
add(RAISES, "pytest.fail()", lambda: pytest.fail("no"))
add(RAISES, "pytest.exit(0)", lambda: pytest.exit("enough", returncode=0))
add(RAISES, "more memory than there is", lambda: torch.empty(2**48, dtype=torch.uint8))

RED = ("crashed", "failed")
for answer in (True, 7, "no keyword", b"dtype: bytes", ["dtype: a list"]):
    add(ANSWERS, f"supports() is {answer!r}", lambda answer=answer: answer, where="supports", answers=True)
for answer in (7, "x", [7], [{"bad": 1}], [{"act": "nowhere"}]):
    add(ANSWERS, f"plans() is {answer!r}", lambda answer=answer: answer, where="plans", answers=True)
for answer in (None, 7):
    add(ANSWERS, f"prepare() is {answer!r}", lambda answer=answer: answer, where="prepare", answers=True)
for answer in (None, 7, "x", []):
    add(ANSWERS, f"the output is {answer!r}", lambda answer=answer: answer, *RED, answers=True)
for name, make in {
    "on the device meta": lambda: torch.empty(1, 32, device="meta"),
    "of another shape": lambda: torch.zeros(3, 3),
    "sparse": lambda: torch.zeros(1, 32).to_sparse(),
    "of objects that compare as equal": lambda: type("Equal", (), {"__eq__": lambda *_: True, "__hash__": id})(),
}.items():
    add(ANSWERS, f"the output is {name}", make, *RED, answers=True)
