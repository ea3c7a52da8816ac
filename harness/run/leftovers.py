"""Threads and processes that a case leaves behind in its worker.

A thread may end the process later, in the middle of another case: the worker waits for it a moment, so that its death
is this case's, and is replaced if the thread lives on. A process that the case started is ended.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

LINGER = 0.5  #: seconds that a new thread of a case may need to end
COPY = 77  #: exit code of a copy of the worker: a call forked, and returned in the child too
#: Parts of command lines of processes that PyTorch and multiprocessing keep for later calls.
POOLS = ("torch._inductor", "multiprocessing.resource_tracker", "multiprocessing.forkserver")


def threads() -> set[threading.Thread]:
    """The Python threads of this process."""
    return set(threading.enumerate())


def await_threads(before: set[threading.Thread]) -> list[str]:
    """Wait up to LINGER seconds for the threads that were not there before; the names of those that live on."""
    new = threads() - before
    deadline = time.monotonic() + LINGER
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in new if thread.is_alive())


def children() -> dict[int, str]:
    """{pid: command} of the processes that this one has started; empty without /proc."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # far cheaper than reading /proc
    except (ChildProcessError, AttributeError):
        return {}
    pids = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return {int(pid): _command(pid) for pid in pids}


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def end_children(before: dict[int, str]) -> list[str]:
    """End the processes that were not there before; one line for each that was still running, or was a copy."""
    lines = []
    for pid, command in children().items():
        if pid in before or any(name in command for name in POOLS):
            continue
        try:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        except (ProcessLookupError, ChildProcessError):
            continue  # the backend waited for it in this moment
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == COPY:
            lines.append("forked, and returned from the call in the child too, which was ended")
        elif command:  # a process that has ended by itself has no command line
            lines.append(f"left process {pid} behind, which was ended: {command}")
    return lines
