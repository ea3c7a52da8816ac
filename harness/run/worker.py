"""The worker: a process that runs cases, one after another, for its supervisor (supervisor.py).

It owns nothing that must outlive it. Its standard output is a file of the supervisor, its verdicts go through a pipe as
JSON, which, unlike a pickle, runs no code in the process that reads it.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import importlib
import json
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from harness import backend as backends
from harness import device as devices
from harness.base.progress import PROGRESS, SIZE
from harness.device import Device, DeviceLost
from harness.problem.case import Case
from harness.results.verdict import Verdict
from harness.run import leftovers

CLOSED = 78  #: exit code of a worker whose pipe was closed in its own process
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  #: of <sys/prctl.h>


@dataclass(frozen=True)
class Start:
    """Where a worker finds what it shares with its supervisor, and how it begins."""

    folder: str  #: holds the files below
    devices: tuple[str, ...]  #: the names of the devices that it runs on
    threads: int = 0  #: of torch; 0: as many as torch chooses
    path: tuple[str, ...] = ()  #: sys.path

    @property
    def output(self) -> Path:
        """What backends print."""
        return Path(self.folder) / "output"

    @property
    def stacks(self) -> Path:
        """Where every thread was when a signal ended the worker."""
        return Path(self.folder) / "stacks"

    @property
    def progress(self) -> Path:
        """The memory of PROGRESS."""
        return Path(self.folder) / "progress"


def serve(pipe: Connection, start: Start, loaded: Mapping[str, Any]) -> NoReturn:
    """Run the cases that come through the pipe until it closes, and end the process.

    loaded: {spec: backend} of those that are loaded already.
    """
    try:
        _serve(pipe, start, dict(loaded))
    except EOFError:  # the supervisor has closed its end
        os._exit(0)
    except BaseException as error:  # an error of the harness, which the supervisor raises
        if isinstance(error, OSError) and error.errno == errno.EBADF:  # or a backend has closed our end
            os._exit(CLOSED)
        _send(pipe, error=traceback.format_exc())
    os._exit(1)


def _serve(pipe: Connection, start: Start, loaded: dict[str, Any]) -> None:
    own = os.getpid()
    sys.path[:] = start.path
    _detach()
    output = _own_output(start.output)
    stacks = start.stacks.open("w")
    faulthandler.enable(stacks)
    with start.progress.open("r+b") as file:
        PROGRESS.attach(mmap.mmap(file.fileno(), SIZE), lambda reason: _send(pipe, failed=reason))
    devices.start(set(start.devices))
    import_all()
    if start.threads:
        torch.set_num_threads(start.threads)
    _send(pipe, ready=True)
    while True:
        task = json.loads(pipe.recv_bytes())
        _print_into(output)
        if task["spec"] not in loaded:
            loaded[task["spec"]] = backends.load(task["spec"])
        threads, children = leftovers.threads(), leftovers.children()
        PROGRESS.start()
        verdict = _verdict(task, loaded[task["spec"]])
        if os.getpid() != own:
            os._exit(leftovers.COPY)  # a call has forked: only the original answers
        alive = leftovers.await_threads(threads)
        verdict.notes += [f"left the thread {name} behind, which was ended with its process" for name in alive]
        verdict.notes += leftovers.end_children(children)
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
        _send(pipe, verdict=vars(verdict), retires=bool(alive))


def import_all() -> None:
    """Import what every case needs: seconds, which would count as the first case's, and once in each forked worker."""
    importlib.import_module("harness.run.case")
    importlib.import_module("torch._dynamo")  # torch does so at the first call that is traced


def _verdict(task: dict[str, Any], backend: Any) -> Verdict:
    from harness.run.case import run_case  # after devices.start: it imports what defines kernels

    device = Device(task["device"], task["emulated"])
    try:
        return run_case(Case.parse(task["case"]), backend, device, task["family"], task["spec"])
    except DeviceLost as error:
        verdict = Verdict(task["case"], backend.name, str(device), "crashed", task["family"], spec=task["spec"])
        verdict.reason, verdict.report = f"device lost: {error}", traceback.format_exc()
        verdict.error_type, verdict.device_lost = type(error).__name__, True
        return verdict


def _send(pipe: Connection, **message: Any) -> None:
    pipe.send_bytes(json.dumps(message, default=str).encode(errors="backslashreplace"))


def _own_output(path: Path) -> int:
    """Make a file the standard output and error of this process, and return its descriptor; its input is empty."""
    output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]
    _open_streams()
    _print_into(output)
    return output


def _open_streams() -> None:
    streams = [open(fd, "w", buffering=1, errors="backslashreplace", closefd=False) for fd in (1, 2)]
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]


def _print_into(output: int) -> None:
    """Make file descriptors 1 and 2 write into a file, also after a backend has closed or replaced them."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    if sys.stdout.closed or sys.stderr.closed:
        _open_streams()


def _detach() -> None:
    """Leave the supervisor's process group: the terminal's Ctrl-C is for the supervisor, which ends this one.

    On Linux the process also ends with its supervisor, and adopts the orphans of its children, to end them too.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def main(words: list[str]) -> NoReturn:
    """`python3 -m harness.run.worker FD`: serve the pipe at this file descriptor; its first message is the Start."""
    pipe = Connection(int(words[0]))
    start = json.loads(pipe.recv_bytes())
    serve(pipe, Start(start["folder"], tuple(start["devices"]), start["threads"], tuple(start["path"])), {})


if __name__ == "__main__":
    main(sys.argv[1:])
