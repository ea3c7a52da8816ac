"""Faults that print, that leave threads and processes behind, or that damage files."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from typing import Any

from tests.reliability.faults import add, folder, leave

PRINTS, LEAVES, FILES = "prints", "leaves behind", "damages files"
MARKS = "\n::error::owned\n##[error]owned\n\x1b[2Jowned \u202eowned\u2028::error::owned\r\n::stop-commands::owned\n"


def _print_much() -> None:
    block = b"x" * 999_999 + b"\n"
    for _ in range(200):
        os.write(1, block)
    raise RuntimeError("after 200 MB")


def _print_marks() -> None:
    print(MARKS)
    print(MARKS, file=sys.stderr)
    raise RuntimeError(MARKS)


def _close_output() -> None:
    os.close(1)
    os.close(2)


def _replace_output() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _fork(then: Any) -> Any:
    def act() -> None:
        if pid := os.fork():
            leave(pid)
        else:
            then()

    return act


def _daemon() -> None:
    """Start a process whose parent has ended, in a session of its own."""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    leave(os.getpid())
    time.sleep(10_000)
    os._exit(0)


def _thread_left() -> None:
    threading.Thread(target=time.sleep, args=(10_000,), name="left over").start()


def _thread_exits_later() -> None:
    """Leave a thread that ends the process in the middle of another case."""
    threading.Timer(1.0, os._exit, (0,)).start()


add(PRINTS, "200 MB of output, and raises", _print_much)
add(PRINTS, "commands of CI and escape sequences, and raises", _print_marks)
add(PRINTS, "closes its output", _close_output, "passed")
add(PRINTS, "replaces its output", _replace_output, "passed")
add(LEAVES, "a process", lambda: leave(subprocess.Popen(["sleep", "10000"])), "passed", notes=True)
add(LEAVES, "a daemon", _daemon, "passed", notes=True)
add(LEAVES, "a fork that returns in the child, too", _fork(lambda: None), "passed", notes=True)
add(LEAVES, "a fork that raises in the child", _fork(lambda: 1 / 0), "passed")
add(LEAVES, "a thread", _thread_left, "passed", notes=True)
add(LEAVES, "a thread that calls os._exit(0) a second later", _thread_exits_later, "passed", "crashed")
add(LEAVES, "all objects frozen (gc.freeze)", gc.freeze, "passed", "failed")


def _results() -> Any:
    return list(folder().rglob("*.jsonl"))


def _delete() -> None:
    for path in _results():
        path.unlink()


def _truncate() -> None:
    for path in _results():
        os.truncate(path, 10)


def _replace() -> None:
    for path in _results():
        new = path.with_suffix(".new")
        new.write_text("")
        os.replace(new, path)


def _overwrite() -> None:
    for path in _results():
        with path.open("r+b") as file:
            file.write(b"\0" * 100)


add(FILES, "deletes the results file", _delete, "passed")
add(FILES, "cuts the results file", _truncate, "passed")
add(FILES, "replaces the results file by an empty one", _replace, "passed")
add(FILES, "overwrites the results file", _overwrite, "passed")
