"""Commands in forked children of this process, which has imported what they need: a start takes milliseconds.

The process must not have used torch's threads: a child would wait for them for ever.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import cli
from harness.base.processes import ROOT
from harness.device import Device
from harness.problem.case import Case
from tests.reliability.faults import FOLDER

BROKEN = 97  #: exit code of a child whose command raised an exception


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), its output, its seconds; late: it had to be killed."""

    code: int
    text: str
    seconds: float
    late: bool = False


def load(cases: Iterable[str]) -> None:
    """Import what the commands of children need, run these cases once, and keep torch to one thread."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import harness.plugin
    import harness.run.fuzz
    import harness.run.supervisor  # noqa: F401
    from harness import device
    from harness.run.case import run_case
    from tests.support.emulated import Emulated

    torch.set_num_threads(1)
    device.start({"cpu"})
    for descriptor in cases:  # their inputs and expected outputs stay in memory
        verdict = run_case(Case.parse(descriptor), Emulated(), Device("cpu"))
        assert verdict.status == "passed", verdict.report
    for plugin in metadata.entry_points(group="pytest11"):
        if plugin.name != "hypothesispytest":  # it would warn of every search
            plugin.load()
    gc.collect()
    gc.freeze()  # pytest collects garbage at its end: not ours, in every child


def start(function: Callable[[], Any], log: Path, folder: Path | None = None) -> int:
    """The pid of a child that leads a process group, writes into `log`, and exits with function()."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = BROKEN
        try:
            os.setpgid(0, 0)
            _redirect(log)
            if folder:
                os.environ[FOLDER] = str(folder)
                os.chdir(folder)
            code = int(function() or 0)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(code & 255)
    try:
        os.setpgid(pid, pid)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended, or has done it itself
    return pid


def _redirect(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed, or replaced: what it held is lost, as at the end of any process


def wait(pid: int, seconds: float) -> tuple[int, bool]:
    """(exit code, whether it had to be killed) of a child that may run for so many seconds."""
    deadline = time.monotonic() + seconds
    late = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), late
        if time.monotonic() > deadline and not late:
            late = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)


def command(function: Callable[[], Any], folder: Path, seconds: float = 60.0, name: str = "log") -> Ended:
    """Run a function in a child, in the folder; its output is the folder's file `name`."""
    log = folder / name
    started = time.monotonic()
    code, late = wait(start(function, log, folder), seconds)
    text = log.read_text(errors="replace") if log.exists() else ""
    return Ended(code, text, time.monotonic() - started, late)


def harness(words: list[str]) -> Callable[[], int]:
    """The function of `moe-harness WORDS`."""

    def run() -> int:
        return cli.main(words)

    return run


def pytest_run(words: list[str]) -> Callable[[], int]:
    """The function of `pytest WORDS` with this checkout's configuration."""

    def run() -> int:
        import pytest

        own = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", "-p", "no:cacheprovider", "-rN"]
        return int(pytest.main([*own, *words]))

    return run
