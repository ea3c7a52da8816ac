"""Backends whose calls do to their process what a kernel never should, chosen by the number of tokens."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

from tests.support.emulated import Emulated

PLANTED = {"lock": False}


def print_much():
    for _ in range(100):
        print("y" * 100_000)
    raise ValueError("too much")


def corrupt():
    PLANTED["lock"] = True


DEEDS = {
    1: lambda: os._exit(0),
    2: lambda: ctypes.string_at(0),
    3: lambda: os.kill(os.getpid(), signal.SIGTERM),
    4: lambda: threading.Timer(0.05, os._exit, [0]).start(),
    5: lambda: os.closerange(0, 256),
    6: lambda: ctypes.PyDLL(None).sleep(100),  # holds the GIL
    7: lambda: time.sleep(100),
    8: lambda: threading.Timer(100, print).start(),
    9: os.fork,
    10: lambda: subprocess.Popen(["sleep", "100"]),
    11: print_much,
    12: os.abort,
    13: corrupt,
    14: lambda: (sys.stdout.close(), sys.stderr.close()),
}


class Misbehaving(Emulated):
    """Right, but for the deed of the number of tokens. A corrupt process ends at its next batch of 20 tokens."""

    def run(self, layer, x, weights, ids, out=None):
        if len(x) == 20 and PLANTED["lock"]:
            os._exit(4)
        DEEDS.get(len(x), lambda: None)()
        return super().run(layer, x, weights, ids, out)


class AlwaysEnds(Emulated):
    """Ends its process at every call."""

    def run(self, layer, x, weights, ids, out=None):
        os._exit(5)


class Wrong(Emulated):
    """Returns zeros."""

    def run(self, layer, x, weights, ids, out=None):
        return super().run(layer, x, weights, ids, out) * 0
