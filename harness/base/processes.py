"""Child processes: the words and the environment that start them, copies of this one, their ends and exit codes."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  #: the checkout


def environment() -> dict[str, str]:
    """Environment variables for a process that imports this harness from any directory."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def pytest_words(device: str, path: Path) -> list[str]:
    """A pytest command for a device that appends its verdicts to the results file `path`."""
    # "=" in every option: pytest would look for its configuration at a separate path. -rN: our own summary names the
    # failures.
    words = [sys.executable, "-m", "pytest", "-rN", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    return [*words, f"--device={device}", f"--results={path}"]


def workers(count: int | None = None) -> list[str]:
    """pytest-xdist's options for `count` workers, by default one for each core; [] without pytest-xdist."""
    if not importlib.util.find_spec("xdist"):
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Each worker starts with one stretch of the items. The items of a case are neighbours, so its inputs and expected
    # results are computed in one process. --dist=load would deal them out in small portions.
    return ["--dist=worksteal", "-n", str(count or cores)]


def exit_code(code: int) -> int:
    """The return code of a process as a shell reports it: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


def fork() -> int:
    """os.fork() without Python's warning of threads, which do not exist in the copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def kill_group(pid: int) -> None:
    """SIGKILL for a process and for all of the group that it leads; it may have ended, or lead no group yet."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def describe_exit(code: int) -> str:
    """ "SIGSEGV", or "exit code 3"."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
