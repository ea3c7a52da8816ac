"""The supervisor's share of the time of a run: the same cases with it, and in one process, in turns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from harness.base.processes import ROOT
from tests.reliability import warm
from tests.reliability.ways import new_folder

CASES = str(ROOT / "cases" / "test_weight_swap.py")
BACKEND = "kernels.grouped:GroupedMM"


@dataclass(frozen=True)
class Share:
    """Seconds of each run, from the start of pytest to its end; a Python that has imported everything."""

    supervised: list[float]
    alone: list[float]

    @property
    def extra(self) -> float:
        """The difference of the medians, as a share of the run in one process."""
        return statistics.median(self.supervised) / statistics.median(self.alone) - 1


def measure(turns: int, root: Path) -> Share:
    """Time both, in turns. The first turn fills caches of files, and is not counted."""
    seconds: dict[str, list[float]] = {"": [], "--in-process": []}
    for turn in range(turns + 1):
        for option, times in seconds.items():
            folder = new_folder(root, f"share {turn} {option}", {})
            words = [CASES, "--device=cpu", f"--backend={BACKEND}", f"--results={folder / 'results.jsonl'}"]
            words += ["-q", "-k", "not threads"]  # torch's pool of threads does not survive the warm fork
            ended = warm.command(warm.pytest_run([*words, *filter(None, [option])]), folder, 300)
            assert ended.code == 0, ended.text
            if turn:
                times.append(ended.seconds)
    return Share(*seconds.values())
