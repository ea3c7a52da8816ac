"""Try an action in a copy of this process first: it may end the process, or never return."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from harness.base.processes import describe_exit, fork, kill_group

RETURNED = 79  #: exit code of a copy whose action returned or raised
STEP = 0.005  #: seconds between two looks at the copy


def how_it_ends(action: Callable[[], object], seconds: float) -> str:
    """ "" if an action returns or raises, otherwise what it does to its process: "ends the process with SIGSEGV".

    seconds: until it counts as hanging. What it prints is lost.
    """
    pid = fork()
    if pid == 0:
        _try(action)
    deadline = time.monotonic() + seconds
    try:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return _ending(os.waitstatus_to_exitcode(status))
            if time.monotonic() > deadline:
                return f"does not return in {seconds:g} s"
            time.sleep(STEP)
    finally:
        _end_group(pid)


def _try(action: Callable[[], object]) -> None:
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        action()
    finally:  # whatever it raises, it raises again in the caller
        os._exit(RETURNED)


def _ending(code: int) -> str:
    return "" if code == RETURNED else f"ends the process with {describe_exit(code)}"


def _end_group(pid: int) -> None:
    kill_group(pid)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass  # it has been waited for
