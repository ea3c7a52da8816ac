"""Whole comparisons with known truth, simulated: `python3 -m tests.perf.calibration.simulate_compare [RUNS]`.

The machine simulated: 2 % noise, one sample in twenty 10 % slower, a drift of 3 % over the run with waves in it, and
processes that are 0.5 % apart for as long as they live.
"""

from __future__ import annotations

import math
import sys

import numpy as np

from harness.perf.compare import statistics
from harness.perf.compare.statistics import IMPROVED, LOOKS, ORDERS, REGRESSED, SAME, SIDES, UNDECIDED

CASES = 8
THRESHOLD = 0.01
BLOCKS, SAMPLES = 2 * len(ORDERS), 3


def generation(rng, when, change, apart=0.005, head_apart=1.0):
    """The blocks of a generation that begins at a time from 0 to 1 of the run, HEAD being slower by `change`."""
    noise = rng.normal(0, 0.02, (BLOCKS, 3, SAMPLES))
    noise += np.log(1.1) * (rng.random(noise.shape) < 0.05)
    process = {side: rng.normal(0, apart * (head_apart if side == "head" else 1)) for side in SIDES}
    process["head"] += math.log1p(change)
    blocks = []
    for number, order in enumerate(ORDERS * (BLOCKS // len(ORDERS))):
        block = {}
        for place, side in enumerate(order):
            now = number + place / 3
            drift = 0.03 * (when + now / BLOCKS / CASES / LOOKS[-1]) + 0.005 * math.sin(40 * when + now)
            block[side] = list(100 * np.exp(noise[number, place] + process[side] + drift))
        blocks.append(block)
    return blocks


def comparison(rng, changes, **machine):
    """A whole comparison of cases that are slower by `changes`, until all are answered or the last look has been:
    the answers, and the number of generations of each case."""
    answers, levels, estimates = [UNDECIDED] * len(changes), [[] for _ in changes], [None] * len(changes)
    done = 0
    for look, due in enumerate(LOOKS):
        for case, change in enumerate(changes):
            if answers[case] == UNDECIDED:
                for number in range(done, due):
                    when = (number + case / len(changes)) / LOOKS[-1]
                    levels[case].append(statistics.levels(generation(rng, when, change, **machine)))
                estimates[case] = statistics.estimate(levels[case], look)
        done = due
        answers = statistics.judge(estimates, answers, look, THRESHOLD)
    return answers, [len(found) for found in levels]


def main(runs: int) -> None:
    rng = np.random.default_rng(1)
    alike = [comparison(rng, [0.0] * CASES)[0] for _ in range(runs)]
    accused, praised = (sum(word in answers for answers in alike) for word in (REGRESSED, IMPROVED))
    print(
        f"{runs} comparisons of {CASES} cases with themselves: {accused} accused, {praised} called improved", flush=True
    )
    print(f"one case of the {CASES} slower by   regressed       same  undecided  generations")
    for change in (0.01, 0.015, 0.02, 0.03, 0.05):
        found = [comparison(rng, [change] + [0.0] * (CASES - 1)) for _ in range(max(20, runs // 8))]
        shares = [sum(answers[0] == word for answers, _ in found) / len(found) for word in (REGRESSED, SAME, UNDECIDED)]
        generations = np.mean([counts[0] for _, counts in found])
        print(f"{change:28.1%} {shares[0]:11.0%} {shares[1]:10.0%} {shares[2]:10.0%} {generations:12.1f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
