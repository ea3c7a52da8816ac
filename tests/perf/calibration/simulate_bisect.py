"""A simulated machine and history to compare searches on: `python3 -m tests.perf.calibration.simulate_bisect [RUNS]`.

The machine is noisy (2 %), has outliers (one measurement in twenty is 10 to 30 % slow) and drifts (a random walk of
0.3 % a measurement: several percent in the time that a search takes), and processes differ by 0.5 %. One commit of 64
is 3 % slower than its parent.
"""

from __future__ import annotations

import sys

import numpy as np

from harness.perf.bisect import search
from harness.perf.bisect.measure import PAIRS

COMMITS = 64
SLOWER = 0.03


class Machine:
    """Times of commits on a noisy machine; counts the measurements."""

    def __init__(
        self, seed, culprit, commits=COMMITS, slower=SLOWER, noise=0.02, outliers=0.05, drift=0.003, process=0.005
    ):
        self.random = np.random.default_rng(seed)
        self.culprit, self.commits, self.slower = culprit, commits, slower
        self.noise, self.outliers, self.drift, self.process = noise, outliers, drift, process
        self.walk, self.measurements, self.paired_runs = 0.0, 0, 0

    def time(self, commit: int, process: float = 0.0) -> float:
        """One measurement, in a process that is slower by this (a logarithm)."""
        self.measurements += 1
        self.walk += self.drift * self.random.normal()
        time = 100.0 * np.exp(self.walk + process + self.noise * self.random.normal())
        if self.random.random() < self.outliers:
            time *= 1 + self.random.uniform(0.1, 0.3)
        return time * (1 + self.slower if self.culprit is not None and commit >= self.culprit else 1)

    def new_process(self) -> float:
        return self.process * self.random.normal()

    def ratios(self, commit: int, k: int) -> list[float]:
        """k log ratios to commit 0, each the median of PAIRS pairs of two new processes, in alternating order."""
        ratios = []
        for _ in range(k):
            self.paired_runs += 1
            processes = {commit: self.new_process()} | {-1: self.new_process()}
            pairs = []
            for pair in range(PAIRS):
                order = (commit, -1)[:: -1 if (self.paired_runs + pair) % 2 else 1]
                times = {which: self.time(max(which, 0), processes[which]) for which in order}
                pairs.append(np.log(times[commit] / times[-1]))
            ratios.append(float(np.median(pairs)))
        return ratios


def culprit_of(seed: int, commits: int = COMMITS) -> int:
    return int(np.random.default_rng(10**6 + seed).integers(1, commits))


def bayesian(machine: Machine, **options) -> int | None:
    """The culprit, or None where the search refuses."""
    answer = search.find(machine.commits, machine.ratios, **options)[1]
    return None if answer is None else answer.first


def plain(machine: Machine, k: int) -> int:
    """git bisect with a threshold halfway between the ends' means, k measurements a step."""

    def mean(commit):
        process = machine.new_process()
        return np.mean([machine.time(commit, process) for _ in range(k)])

    good, bad = 0, machine.commits - 1
    threshold = (mean(good) + mean(bad)) / 2
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if mean(middle) > threshold else (middle, bad)
    return bad


def paired(machine: Machine, k: int) -> int:
    """The same on the mean of k paired runs with the good end, which cancel drift."""
    good, bad = 0, machine.commits - 1
    threshold = np.mean(machine.ratios(bad, k)) / 2
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if np.mean(machine.ratios(middle, k)) > threshold else (middle, bad)
    return bad


def rate(find, runs: int, change: bool = True, **options) -> tuple[int, float, int]:
    """(runs that name the right commit, or any commit if nothing changed; mean and largest number of measurements)."""
    hits, counts = 0, []
    for seed in range(runs):
        culprit = culprit_of(seed) if change else None
        machine = Machine(seed, culprit, **options)
        answer = find(machine)
        hits += (answer is not None) if culprit is None else answer == culprit
        counts.append(machine.measurements)
    return hits, float(np.mean(counts)), max(counts)


def main(runs: int) -> None:
    print(f"{COMMITS} commits, noise 2 %, outliers, drift, processes; {runs} runs   right  measurements (mean, most)")

    def row(name, find, **options):
        hits, mean, most = rate(find, runs, **options)
        print(f"{name:60} {hits:6} {mean:8.0f} {most:6}", flush=True)

    row(f"one commit {SLOWER:.0%} slower: Bayesian search", bayesian)
    for k in (1, 3, 5, 10, 30, 100):
        row(f"  plain bisection, {k} measurements a step", lambda machine, k=k: plain(machine, k))
    for k in (1, 3, 10):
        row(f"  plain bisection, {k} paired runs with the good end a step", lambda machine, k=k: paired(machine, k))
    print(f"{'':60} accused")
    row("no change: Bayesian search", bayesian, change=False)
    row("  plain bisection (always accuses), 10 measurements a step", lambda machine: plain(machine, 10), change=False)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
