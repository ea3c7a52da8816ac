"""The simplest example that fails: Hypothesis behind one function, and the same for the same seed in every process.

Hypothesis mixes constants that it finds in the source of whatever modules are loaded into the integers that it draws.
`pick` draws from where no constant lies: what a seed stands for does not depend on the process, or on the kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

FAR = 9_007_199_254_741_003  #: from here on no constant of anybody's source is to be expected
#: Examples of one search by Hypothesis: from the eleventh on it asks for variations of those that it asked already.
ROUND = 10
T = TypeVar("T")


class _Ended(BaseException):
    """Carries an exception past Hypothesis, which would take it for a failure, and shrink it."""


def missing() -> str | None:
    """None, or why there is no searching here."""
    return None if find_spec("hypothesis") else "the package hypothesis is not installed (pip install hypothesis)"


@cache
def place(count: int) -> Any:
    """A strategy for FAR, FAR + 1, ..., so many."""
    from hypothesis import strategies

    return strategies.integers(FAR, FAR + count - 1)


def pick(options: Sequence[Any]) -> Any:
    """A strategy for one of these; a failing example shrinks towards the first."""
    return place(len(options)).map(lambda place: options[place - FAR])


def find_minimal(
    strategy: Any, ask: Callable[[Any], T | None], *, seed: int, examples: int, shrinks: int
) -> tuple[Any, T] | None:
    """(example, what ask() told of it) for the simplest example of a strategy that fails, or None.

    ask(example) returns None for a good example, which must be hashable. It is asked once about each, and after the
    first that failed at most `shrinks` times more. Whatever it raises ends the search.
    """
    import hypothesis
    from hypothesis.errors import NoSuchExample

    told: dict[Hashable, T | None] = {}
    left = examples + shrinks  # all that may be asked; from the first failure on, the shrinks

    def fails(example: Hashable) -> bool:
        nonlocal left
        if example not in told:
            if left == 0:
                return False
            left -= 1
            try:
                told[example] = ask(example)
            except Exception as error:
                raise _Ended from error
            if told[example] is not None:
                left = min(left, shrinks)
        return told[example] is not None

    rules = hypothesis.settings(
        max_examples=min(examples, ROUND), database=None, deadline=None, derandomize=False,
        verbosity=hypothesis.Verbosity.quiet, phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    rng = random.Random(seed)
    while left > shrinks:
        before = left
        try:
            found = hypothesis.find(strategy, fails, settings=rules, random=rng)
        except NoSuchExample:
            if left == before:
                return None  # everything that there is has been asked
            continue
        except _Ended as ended:
            assert ended.__cause__ is not None
            raise ended.__cause__ from None
        failure = told[found]
        assert failure is not None
        return found, failure
    return None
