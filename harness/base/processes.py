"""pytest, and other commands, as processes of their own: the words that start them, and how they ended.

Needs nothing but the standard library, as harness/ci/ does.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  #: of the checkout


def environment() -> dict[str, str]:
    """The environment of a process that finds this harness, wherever it is started."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def pytest_words(device: str, path: Path) -> list[str]:
    """pytest on a device, its verdicts appended to the results file `path`."""
    # "=" in every option: pytest would take a loose path for one to look for its configuration in. -rN: our own
    # summary names the failures.
    words = [sys.executable, "-m", "pytest", "-rN", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    return [*words, f"--device={device}", f"--results={path}"]


def workers(count: int | None = None) -> list[str]:
    """pytest-xdist's options for so many workers, one for each core if None; none without pytest-xdist."""
    if not importlib.util.find_spec("xdist"):
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Each worker starts with one stretch of the items: those of one case come together, and what is drawn and computed
    # for it is kept in a process. With --dist=load they would be dealt out in small portions.
    return ["--dist=worksteal", "-n", str(count or cores)]


def exit_code(code: int) -> int:
    """What a process returned; a signal as a shell would say it."""
    return code if code >= 0 else 128 - code
