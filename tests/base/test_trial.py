"""base/trial.py: an action that would end the process ends a copy of it."""

import ctypes
import os
import time

import pytest

from harness.base.trial import how_it_ends


def raises():
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("action", "ending"),
    [
        (lambda: None, ""),
        (raises, ""),  # the caller meets it itself
        (lambda: os._exit(0), "ends the process with exit code 0"),
        (lambda: ctypes.string_at(0), "ends the process with SIGSEGV"),
    ],
)
def test_the_end_of_the_process_is_told(action, ending):
    assert how_it_ends(action, 60) == ending


def test_an_action_that_does_not_return_is_told():
    assert how_it_ends(lambda: time.sleep(100), 0.5) == "does not return in 0.5 s"
