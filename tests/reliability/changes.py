"""Faults that change what belongs to the process: each is restored, and its own case is red; two are not noticed."""

from __future__ import annotations

import gc
import io
import locale
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from typing import Any

import numpy
import torch

from tests.reliability.faults import add

CHANGES, UNGUARDED = "changes a global", "changes what is not guarded"


def _elsewhere() -> None:
    """Go to a directory that does not exist any more."""
    path = tempfile.mkdtemp()
    os.chdir(path)
    os.rmdir(path)


def _inference_mode() -> None:
    mode = torch.inference_mode()
    mode.__enter__()
    _KEPT.append(mode)  # it ends with its object


_KEPT: list[Any] = []


def _set(holder: Any, name: str, value: Any) -> Any:
    return lambda: setattr(holder, name, value)


for name, act in {
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's random numbers": lambda: torch.manual_seed(7),
    "Python's random numbers": lambda: random.seed(7),
    "numpy's random numbers": lambda: numpy.random.seed(7),
    "grad mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "inference mode": _inference_mode,
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "precision of matrix products": lambda: torch.set_float32_matmul_precision("medium"),
    "the number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "subnormal numbers are flushed": lambda: torch.set_flush_denormal(True),
    "torch's print options": lambda: torch.set_printoptions(precision=1),
    "the working directory": lambda: os.chdir("/"),
    "the working directory, deleted": _elsewhere,
    "a variable of the environment": lambda: os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH="/nowhere"),
    "the whole environment": os.environ.clear,
    "a signal handler": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "an interval timer": lambda: signal.setitimer(signal.ITIMER_REAL, 3600),
    "filters of warnings": lambda: warnings.simplefilter("error"),
    "sys.path": sys.path.clear,
    "sys.stdout": _set(sys, "stdout", io.StringIO()),
    "sys.stderr is None": _set(sys, "stderr", None),
    "sys.excepthook": _set(sys, "excepthook", lambda *_: os._exit(0)),
    "the recursion limit": lambda: sys.setrecursionlimit(150),
    "the switch interval": lambda: sys.setswitchinterval(1.0),
    "garbage collection": gc.disable,
    "thresholds of garbage collection": lambda: gc.set_threshold(1),
    "a trace function": lambda: sys.settrace(lambda *_: None),
    "a profile function": lambda: sys.setprofile(lambda *_: None),
    "an excepthook of threads": _set(threading, "excepthook", lambda *_: os._exit(0)),
    "the locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
    "the umask": lambda: os.umask(0o777),
}.items():
    # Its own output may be what the change breaks.
    add(CHANGES, name, act, *(("failed", "crashed") if name == "autocast" else ("failed",)))

# Left out of the guard for its cost: only what follows in the same worker could notice.
add(UNGUARDED, "numpy's print options", lambda: numpy.set_printoptions(precision=1), "passed", "failed")
add(UNGUARDED, "numpy's errors", lambda: numpy.seterr(all="raise"), "passed", "failed")
