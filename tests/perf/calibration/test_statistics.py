"""perf/compare/statistics.py: whole comparisons simulated with known truth, and its parts against scipy."""

import math

import numpy as np
import pytest
import scipy.stats

from harness.perf.compare import statistics
from harness.perf.compare.statistics import IMPROVED, LOOKS, ORDERS, REGRESSED, SAME, SIDES, UNDECIDED, Estimate
from tests.perf.calibration.simulate_compare import CASES, THRESHOLD, comparison, generation


# -- what the whole gets wrong, and what it finds ---------------------------------------------------------------------
def test_a_version_against_itself_is_accused_in_at_most_1_of_100_comparisons():
    rng = np.random.default_rng(1)
    runs = [comparison(rng, [0.0] * CASES)[0] for _ in range(300)]
    assert sum(REGRESSED in answers for answers in runs) <= 3
    assert sum(IMPROVED in answers for answers in runs) <= 3
    cases = [answer for answers in runs for answer in answers]
    assert cases.count(SAME) > 0.8 * len(cases)  # and it is found to be the same, not only left open


def test_a_head_whose_processes_are_noisier_is_not_accused_either():
    rng = np.random.default_rng(2)
    runs = [comparison(rng, [0.0] * CASES, head_apart=2)[0] for _ in range(100)]
    assert sum(REGRESSED in answers for answers in runs) <= 3


def test_one_slow_case_among_many_is_found_and_never_called_the_same():
    rng = np.random.default_rng(3)
    found, generations = {}, {}
    for change in (0.01, 0.02, 0.03, 0.05):
        runs = [comparison(rng, [change] + [0.0] * (CASES - 1)) for _ in range(20)]
        found[change] = [answers[0] for answers, _ in runs]
        generations[change] = np.mean([counts[0] for _, counts in runs])
    assert found[0.03] == found[0.05] == [REGRESSED] * 20
    assert found[0.02].count(REGRESSED) >= 18 and SAME not in found[0.02]
    assert found[0.01].count(SAME) <= 3  # it is just at the threshold
    assert generations[0.05] < generations[0.03] < generations[0.02] < generations[0.01]


def test_a_faster_head_is_improved():
    rng = np.random.default_rng(4)
    for _ in range(5):
        answers, _ = comparison(rng, [-0.03] + [0.0] * (CASES - 1))
        assert answers[0] == IMPROVED


def test_processes_that_differ_by_more_raise_the_floor_and_what_is_detectable():
    rng = np.random.default_rng(5)
    measured = []
    for apart in (0.002, 0.02):
        levels = [statistics.levels(generation(rng, 0, 0, apart=apart)) for _ in range(12)]
        found = statistics.estimate(levels, 2)
        measured.append((found.floor, statistics.detectable(found, CASES, 2, THRESHOLD), found.high - found.low))
    assert all(wide > 3 * narrow for narrow, wide in zip(measured[0], measured[1]) if narrow < 0.005)
    assert measured[1] > measured[0] and measured[0][1] > THRESHOLD


def test_a_detectable_change_is_detected():
    """At the detectable change about 80 % of comparisons of a single look regress: between 60 and 95 % of 200."""
    rng = np.random.default_rng(6)

    def levels(change):
        draws = rng.normal(0, 0.005, (12, 3)) + [0, 0, math.log1p(change)]
        return [tuple(row - row.mean()) for row in draws]

    typical = np.median([statistics.detectable(statistics.estimate(levels(0), 2), 1, 2, 0.0001) for _ in range(50)])
    found = [statistics.judge([statistics.estimate(levels(typical), 2)], [UNDECIDED], 2, 0.0001) for _ in range(200)]
    assert 120 <= found.count([REGRESSED]) <= 190


# -- parts ------------------------------------------------------------------------------------------------------------
def test_shares_of_the_error_add_up_to_all_of_it():
    shares = [statistics.share(look) for look in range(len(LOOKS))]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0.2


def test_every_side_is_first_and_last_as_often_in_a_round():
    for place in range(3):
        assert sorted(order[place] for order in ORDERS) == sorted(SIDES * 2)
    followed = [pair for order in ORDERS for pair in zip(order, order[1:])]
    assert len(set(followed)) == 6 and all(followed.count(pair) == 2 for pair in followed)


def test_levels_ignore_the_unit_drift_between_blocks_and_a_spoilt_block():
    blocks = [{"base": [u] * 3, "again": [u, u, 9 * u], "head": [1.1 * u] * 3} for u in (1.0, 2.0, 50.0, 51.0, 52.0)]
    blocks[2]["head"] = [900.0] * 3
    base, again, head = statistics.levels(blocks)
    assert base == pytest.approx(again) and head - base == pytest.approx(math.log(1.1))
    assert base + again + head == pytest.approx(0)


def test_estimate_is_least_squares():
    """Against numpy's: levels ~ generation + HEAD, t intervals with 2 n - 1 degrees of freedom."""
    rng = np.random.default_rng(7)
    n = 6
    table = rng.normal(0, 0.01, (n, 3)) * [1, 1.2, 0.4] + [0, 0, 0.02]
    design = np.zeros((3 * n, n + 1))
    for row in range(n):
        design[3 * row : 3 * row + 3, row] = 1
        design[3 * row + 2, n] = 1
    solution, (residual,), *_ = np.linalg.lstsq(design, table.ravel(), rcond=None)
    variance = residual / (2 * n - 1) * np.linalg.inv(design.T @ design)[n, n]
    found = statistics.estimate([tuple(row) for row in table], 1)
    assert math.log1p(found.change) == pytest.approx(solution[n])
    assert found.error == pytest.approx(math.sqrt(variance)) and found.freedom == 2 * n - 1
    expected = scipy.stats.t(2 * n - 1, solution[n], math.sqrt(variance))
    reached = statistics.MISSED * statistics.share(1)
    assert math.log1p(found.low) == pytest.approx(expected.ppf(reached))
    assert math.log1p(found.high) == pytest.approx(expected.ppf(1 - reached))
    assert found.slower == pytest.approx(expected.cdf(0)) and found.faster == pytest.approx(expected.sf(0))


def test_a_noisier_head_makes_the_error_its_own():
    steady = [(0.0, 0.0, d) for d in (-0.03, 0.01, 0.02, -0.01)]
    against = [d for _, _, d in steady]
    assert statistics.estimate(steady, 0).error == pytest.approx(scipy.stats.sem(against))


def test_samples_without_any_noise():
    assert statistics.estimate([(0.0, 0.0, 0.0)] * 3, 0).slower == pytest.approx(0.5)
    found = statistics.estimate([(0.0, 0.0, 0.05)] * 3, 0)
    assert found.slower < 1e-12 and [found.low, found.high] == pytest.approx([math.expm1(0.05)] * 2)
    with pytest.raises(ValueError, match="generations=1"):
        statistics.estimate([(0.0, 0.0, 0.0)], 0)


def made(change, p, width=0.002, floor=0.001):
    low, high = change - width, change + width
    return Estimate(change, low, high, p, 1 - p, floor, width / 3, 5, 3)


@pytest.mark.parametrize(
    "estimate, answer",
    [
        (made(0.03, 1e-9), REGRESSED),
        (made(0.03, 0.01), UNDECIDED),  # large, not significant
        (made(0.009, 1e-9), UNDECIDED),  # significant, small, and the interval reaches beyond the threshold
        (made(0.005, 1e-9), SAME),  # significant, and small for certain
        (made(0.03, 1e-9, floor=0.04), UNDECIDED),  # BASE shows as much against itself
        (made(-0.03, 1 - 1e-9), IMPROVED),
        (made(0.0, 0.5), SAME),
        (made(0.0, 0.5, width=0.02), UNDECIDED),
    ],
)
def test_an_answer_needs_significance_and_size(estimate, answer):
    assert statistics.judge([estimate], [UNDECIDED], 0, THRESHOLD) == [answer]


def test_more_cases_ask_for_more_significance():
    p = 0.9 * statistics.ALPHA * statistics.share(0)
    others = [made(0.0, 0.5)] * 7
    assert statistics.judge([made(0.03, p)], [UNDECIDED], 0, THRESHOLD) == [REGRESSED]
    assert statistics.judge([made(0.03, p), *others], [UNDECIDED] * 8, 0, THRESHOLD)[0] == UNDECIDED


def test_an_answer_is_kept():
    kept = statistics.judge([made(0.03, 1e-9)] * 3, [SAME, IMPROVED, REGRESSED], 1, THRESHOLD)
    assert kept == [SAME, IMPROVED, REGRESSED]
    assert statistics.judge([], [], 0, THRESHOLD) == []
