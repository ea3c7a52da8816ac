"""Faults that end the process, or never answer."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

from tests.reliability.faults import add

ENDS, HANGS, BEYOND = "ends the process", "never answers", "ends the supervisor"
FOREVER = 10_000  #: seconds


def _recurse_in_c() -> None:
    """Call back from C without end: the stack overflows."""
    sys.setrecursionlimit(10**9)
    kind = ctypes.CFUNCTYPE(None)

    def again() -> None:
        callback()

    callback = kind(again)
    callback()


def _divide_by_zero() -> None:
    signal.raise_signal(signal.SIGFPE)


def _limit_memory() -> Any:
    """Allocate beyond a limit of the address space, as in a container without memory."""
    resource.setrlimit(resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))
    return bytearray(2**28)


def _limit_files() -> None:
    """Lower the limit on open files, and open too many."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    open(os.devnull)


def _exit_in_finalizer() -> None:
    class Exits:
        def __del__(self) -> None:
            os._exit(0)

    Exits()


def _exit_in_signal_handler() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.01)


def _kill(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


def _thread(function: Any, *arguments: Any, after: float = 0.0) -> Any:
    def act() -> None:
        threading.Timer(after, function, arguments).start()

    return act


add(ENDS, "os._exit(0)", lambda: os._exit(0))
add(ENDS, "os._exit(1)", lambda: os._exit(1))
add(ENDS, "os._exit(3)", lambda: os._exit(3))
add(ENDS, "os._exit(0) in prepare()", lambda: os._exit(0), where="prepare")
add(ENDS, "os._exit(0) in supports()", lambda: os._exit(0), where="supports")
add(ENDS, "os._exit(0) in plans()", lambda: os._exit(0), where="plans")
add(ENDS, "exit(0) of C", lambda: ctypes.CDLL(None).exit(0))
add(ENDS, "_exit(0) of C", lambda: ctypes.CDLL(None)._exit(0))
add(ENDS, "os.abort()", os.abort)
add(ENDS, "a null pointer is read", lambda: ctypes.string_at(0))
add(ENDS, "a null pointer is written", lambda: ctypes.memset(0, 1, 8))
add(ENDS, "a stack overflow in C", _recurse_in_c)
add(ENDS, "SIGKILL, as the OOM killer sends it", _kill(signal.SIGKILL))
add(ENDS, "SIGTERM", _kill(signal.SIGTERM))
add(ENDS, "SIGHUP", _kill(signal.SIGHUP))
add(ENDS, "SIGPIPE with its default action", lambda: _default_then_kill(signal.SIGPIPE))
add(ENDS, "SIGFPE", _divide_by_zero)
add(ENDS, "SIGILL", _kill(signal.SIGILL))
add(ENDS, "SIGBUS", _kill(signal.SIGBUS))
add(ENDS, "SIGINT to its own process", _kill(signal.SIGINT), "passed", "crashed")
add(ENDS, "SIGKILL to its process group", lambda: os.killpg(0, signal.SIGKILL))
add(ENDS, "os._exit(0) in a signal handler", _exit_in_signal_handler)
add(ENDS, "os._exit(0) in a finalizer", _exit_in_finalizer)
add(ENDS, "os._exit(0) in a thread", _thread(os._exit, 0))
add(ENDS, "os._exit(0) in a thread, 0.1 s after the call", _thread(os._exit, 0, after=0.1))
add(ENDS, "a null pointer in a thread", _thread(ctypes.string_at, 0))
add(ENDS, "an alarm in a second", lambda: signal.alarm(1), "failed", "crashed")
add(ENDS, "atexit calls os._exit(0)", lambda: atexit.register(os._exit, 0), "passed")
add(ENDS, "all file descriptors are closed", lambda: os.closerange(0, 256))
add(ENDS, "all file descriptors but the standard ones are closed", lambda: os.closerange(3, 256))
add(ENDS, "no memory is left", _limit_memory)
add(ENDS, "no file can be opened", _limit_files)
add(ENDS, "exec of another program", lambda: os.execv("/bin/true", ["true"]))


def _default_then_kill(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _loop() -> None:
    while True:
        pass


def _sleep() -> None:
    while True:
        time.sleep(1)


def _deadlock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _deaf(hang: Any) -> Any:
    """Hang with every signal blocked that can be, and without the handler that prints stacks."""

    def act() -> None:
        faulthandler.disable()
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        hang()

    return act


def _catch_all() -> None:
    """Swallow every exception, such as one that a time limit raises in the call."""
    while True:
        try:
            time.sleep(FOREVER)
        except BaseException:
            pass


add(HANGS, "sleeps in Python", _sleep, "hung")
add(HANGS, "computes in Python", _loop, "hung")
add(HANGS, "sleeps in native code", lambda: ctypes.CDLL(None).sleep(FOREVER), "hung")
add(HANGS, "sleeps in native code, with the GIL", lambda: ctypes.PyDLL(None).sleep(FOREVER), "hung")
add(HANGS, "waits for its own lock", _deadlock, "hung")
add(HANGS, "stops itself with SIGSTOP", _kill(signal.SIGSTOP), "hung")
add(HANGS, "sleeps with all signals blocked", _deaf(_sleep), "hung")
add(HANGS, "catches everything and sleeps on", _catch_all, "hung")
add(HANGS, "sleeps in supports()", _sleep, "hung", where="supports")
add(HANGS, "sleeps in prepare()", _sleep, "hung", where="prepare")

# What no supervisor survives: the exit code says it, and `summary` is red.
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
    add(BEYOND, f"{number.name} to its parent", lambda number=number: (os.kill(os.getppid(), number), _sleep()))
