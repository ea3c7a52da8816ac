"""The simplest failing example: Hypothesis behind one function, with the same result for a seed in every process.

Hypothesis adds constants from the source of the loaded modules to the integers that it draws. `pick` draws from a range
without such constants, so the meaning of a seed does not depend on the process or on the kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

FAR = 9_007_199_254_741_003  #: above every constant that source code is likely to have
#: Examples of one search by Hypothesis: from the eleventh on it draws variations of earlier ones.
ROUND = 10
T = TypeVar("T")


class _Ended(BaseException):
    """Carries an exception past Hypothesis, which would treat it as a failure and shrink it."""


def missing() -> str | None:
    """None, or why no search is possible here."""
    return None if find_spec("hypothesis") else "the package hypothesis is not installed (pip install hypothesis)"


@cache
def place(count: int) -> Any:
    """A strategy for `count` integers from FAR on."""
    from hypothesis import strategies

    return strategies.integers(FAR, FAR + count - 1)


def pick(options: Sequence[Any]) -> Any:
    """A strategy for one of the options; a failing example shrinks towards the first."""
    return place(len(options)).map(lambda place: options[place - FAR])


def find_minimal(
    strategy: Any, ask: Callable[[Any], T | None], *, seed: int, examples: int, shrinks: int
) -> tuple[Any, T] | None:
    """(example, result of ask) of the simplest failing example of a strategy, or None if none fails.

    ask(example) returns None for a good example, otherwise a failure. Examples must be hashable. It is called once for
    each, and after the first failure at most `shrinks` times more. An exception of ask() ends the search.
    """
    import hypothesis
    from hypothesis.errors import NoSuchExample

    results: dict[Hashable, T | None] = {}
    left = examples + shrinks  # calls of ask() that remain; at most `shrinks` from the first failure on

    def fails(example: Hashable) -> bool:
        nonlocal left
        if example not in results:
            if left == 0:
                return False
            left -= 1
            try:
                results[example] = ask(example)
            except Exception as error:
                raise _Ended from error
            if results[example] is not None:
                left = min(left, shrinks)
        return results[example] is not None

    rules = hypothesis.settings(
        max_examples=min(examples, ROUND), database=None, deadline=None, derandomize=False,
        verbosity=hypothesis.Verbosity.quiet, phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    rng = random.Random(seed)
    while left > shrinks:
        before = left
        try:
            example = hypothesis.find(strategy, fails, settings=rules, random=rng)
        except NoSuchExample:
            if left == before:
                return None  # the strategy has no more examples
            continue
        except _Ended as ended:
            assert ended.__cause__ is not None
            raise ended.__cause__ from None
        failure = results[example]
        assert failure is not None
        return example, failure
    return None
