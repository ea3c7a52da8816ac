"""Random kills: SIGKILL to a whole run at a random moment, a thousand times.

After each, every verdict of a case that had ended must be in the results file, and `summary` must not be green. That a
case had ended is known from the backend itself: it notes when a case begins, and so the one before has its verdict.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from harness import cli
from tests.reliability import warm
from tests.reliability.faults import COUNTED, STARTS
from tests.reliability.ways import CASES, SIZES, new_folder, read

ROWS = {f"t{n}-{SIZES}-exact": "" for n in range(1, 31)}


@dataclass
class Kills:
    """What came of the kills of short runs."""

    kills: int = 0  #: that ended a run before its end was recorded
    before: int = 0  #: of these: before the results file had its plan
    verdicts: int = 0  #: that were in the files
    lost: int = 0  #: beyond the case in flight
    cut: int = 0  #: of these files end in the middle of a line
    green: int = 0  #: for `summary`
    tracebacks: int = 0  #: of `summary`
    seconds: float = 0.0  #: of a run that is not killed

    def __add__(self, other: Kills) -> Kills:
        both = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Kills)}
        return Kills(**both | {"seconds": max(self.seconds, other.seconds)})


def _begin(folder: Path) -> int:
    words = [CASES, "--device=cpu", f"--backend={COUNTED}", f"--results={folder / 'results.jsonl'}", "-q"]
    return warm.start(warm.pytest_run(words), folder / "log", folder)


def duration(root: Path) -> float:
    """The median of the seconds of three runs that are not killed."""
    seconds = []
    for n in range(3):
        folder = new_folder(root, f"whole {n}", ROWS)
        started = time.monotonic()
        code, _ = warm.wait(_begin(folder), 60)
        seconds.append(time.monotonic() - started)
        recorded = read(folder / "results.jsonl")
        assert code == 0 and recorded.whole and len(recorded.verdicts) == len(ROWS), (folder / "log").read_text()
        assert len((folder / STARTS).read_bytes()) == len(ROWS)
    return statistics.median(seconds)


def kill(count: int, seed: int, root: Path) -> Kills:
    """Kill `count` runs, at moments that are uniform over a run's duration."""
    root.mkdir()
    rng, found = random.Random(seed), Kills(seconds=duration(root))
    while found.kills < count:
        folder = new_folder(root, f"kill {found.kills}", ROWS)
        pid = _begin(folder)
        time.sleep(rng.uniform(0.0, found.seconds))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _look(found, folder)
        shutil.rmtree(folder)
    return found


def _look(found: Kills, folder: Path) -> None:
    """Add what a killed run has left."""
    path = folder / "results.jsonl"
    data = path.read_bytes() if path.exists() else b""
    if b'"kind": "end"' in data:
        return  # it had ended before: no kill of a run
    starts = (folder / STARTS).read_bytes() if (folder / STARTS).exists() else b""
    recorded = read(path) if data else None
    verdicts = len(recorded.verdicts) if recorded else 0
    found.kills += 1
    found.before += b'"kind": "plan"' not in data
    found.cut += bool(data) and not data.endswith(b"\n")
    found.verdicts += verdicts
    found.lost += max(0, len(starts) - 1 - verdicts)
    code, text = summary([str(path)])
    found.green += code == 0
    found.tracebacks += "Traceback" in text


def summary(paths: Iterable[str]) -> tuple[int, str]:
    """(exit code, output) of `moe-harness summary` in this process."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = cli.main(["summary", *paths])
    return code, text.getvalue()
