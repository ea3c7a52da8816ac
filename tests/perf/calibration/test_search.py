"""perf/bisect/search.py on simulated machines.

The table for the documentation: python3 -m tests.perf.calibration.simulate_bisect"""

import math

import numpy as np
import pytest

from harness.perf.bisect import search
from tests.perf.calibration.simulate_bisect import Machine, bayesian, culprit_of, paired, plain, rate


def test_the_right_commit_of_64_in_98_of_100_runs_at_far_less_than_plain_bisection_needs():
    hits, mean, most = rate(bayesian, 100)
    assert hits >= 98 and mean < 700 and most < 1500, (hits, mean, most)
    for k in (1, 3, 5, 10, 30, 100):
        found, needed, _ = rate(lambda machine, k=k: plain(machine, k), 100)
        assert found < 50, (k, found, needed)
    # Bisection by paired runs is right less often at the same price, and more often than that only at twice the price.
    (found, needed, _), (twice, price, _) = (rate(lambda machine, k=k: paired(machine, k), 100) for k in (5, 10))
    assert found < 95 and needed > 0.9 * mean, (found, needed)
    assert twice > found and price > 1.8 * mean, (twice, price)


def test_a_history_without_a_change_is_not_accused():
    accused, _, most = rate(bayesian, 100, change=False)
    assert accused <= 1 and most < 2000


def test_no_confident_answer_where_there_is_no_change_even_if_the_ends_seem_to_differ():
    # As if the comparison of the ends had been fooled: samples of the bad end that happen to be high.
    machine = Machine(1, None, commits=16)
    find = search.Search(16)
    find.add(0, machine.ratios(0, 6))
    find.add(15, [0.02 + y for y in machine.ratios(15, 12)])
    for _ in range(60):
        commit = find.next()
        find.add(commit, machine.ratios(commit, 2))
    assert not find.result().certain or find.result().first == 15


def test_confidence_and_interval_mean_what_they_say():
    right = covered = within = 0
    for seed in range(60):
        culprit = culprit_of(2000 + seed, 16)
        machine = Machine(2000 + seed, culprit, commits=16, slower=0.05)
        answer = search.find(16, machine.ratios, confidence=0.8)[1]
        right += answer.first == culprit
        within += culprit in answer.credible
        covered += answer.interval[0] <= math.log1p(0.05) <= answer.interval[1]
    assert right >= 0.75 * 60 and within >= 0.88 * 60 and covered >= 0.88 * 60, (right, within, covered)


def test_the_posterior_is_bayes_rule_where_that_can_be_written_down():
    # With many samples of both ends the levels are known; then each sample multiplies by a ratio of two densities.
    draw = np.random.default_rng(3)
    scale, change = 0.02, 0.03
    find = search.Search(5)
    find.add(0, scale * draw.standard_t(search.DEGREES, 4000))
    find.add(4, change + scale * draw.standard_t(search.DEGREES, 4000))
    assert np.allclose(find.posterior, [0, 0.25, 0.25, 0.25, 0.25], atol=1e-6)
    sample = 0.028
    find.add(2, [sample])

    def density(level):
        return (1 + ((sample - level) / scale) ** 2 / search.DEGREES) ** (-(search.DEGREES + 1) / 2)

    new, old = density(change), density(0.0)
    expected = np.array([0, new, new, old, old]) / (2 * (new + old))
    assert np.allclose(find.posterior, expected, atol=0.01), (find.posterior, expected)


def test_an_outlier_moves_little():
    draw = np.random.default_rng(4)
    find = search.Search(5)
    find.add(0, 0.02 * draw.normal(size=40))
    find.add(4, 0.03 + 0.02 * draw.normal(size=40))
    find.add(2, [0.03])
    near = find.posterior[1:3].sum()
    find = search.Search(5)
    find.add(0, 0.02 * np.random.default_rng(4).normal(size=40))
    find.add(4, 0.03 + 0.02 * draw.normal(size=40))
    find.add(2, [0.5])
    assert 0.5 < find.posterior[1:3].sum() < near


def ends_of(commits, weights=None, skipped=()):
    """A search that knows both ends well, and no other commit."""
    find = search.Search(commits, weights)
    for commit in skipped:
        find.skip(commit)
    find.add(0, [-0.01, 0.0, 0.01, 0.0])
    find.add(commits - 1, [0.1, 0.11, 0.09, 0.1])
    return find


def test_the_next_commit_halves_the_probability():
    assert ends_of(65).next() in (31, 32)
    late = [0.0] * 48 + [1.0] * 16
    assert ends_of(64, late).next() in (55, 56)
    assert ends_of(65, skipped=range(25, 40)).next() in (24, 40)


def test_the_expected_information_is_what_brute_force_gives():
    find = ends_of(9)
    find.add(3, [0.04])
    find.add(5, [0.06])
    gain = find._information()
    base, change, log_scale = find._axes
    wide, middle = 3 * np.exp(log_scale[len(log_scale) // 2]), base[len(base) // 2]
    outcomes = np.linspace(middle - wide, middle + change[len(change) // 2] + wide, search.OUTCOMES)
    joint = find._joint.reshape(8, -1)
    density = np.exp(find._density(outcomes)).reshape(len(outcomes), 2, -1)
    density /= density.sum(0)

    def entropy(p):
        p = p[p > 0] / p.sum()
        return -(p * np.log(p)).sum()

    for j in range(9):
        left = 0.0
        for y in range(len(outcomes)):
            p = np.array([(joint[c - 1] * density[y, int(j >= c)]).sum() for c in range(1, 9)])
            left += p.sum() * entropy(p)
        assert gain[j] == pytest.approx(entropy(joint.sum(1)) - left, abs=1e-9), j


def test_a_skipped_culprit_is_found_as_a_range():
    machine = Machine(5, 9, commits=20, slower=0.1)

    def measure(commit, k):
        return None if commit in (9, 10) else machine.ratios(commit, k)

    answer = search.find(20, measure)[1]
    assert (answer.first, answer.last) == (9, 11) and answer.certain


def test_two_commits_need_no_search_and_a_budget_is_kept():
    machine = Machine(6, 1, commits=2, slower=0.2)
    ends, answer = search.find(2, machine.ratios)
    assert ends.differ and answer.first == 1 and answer.certain and machine.paired_runs == ends.samples
    machine = Machine(7, 20)
    ends, answer = search.find(64, machine.ratios, budget=22)
    assert machine.paired_runs <= 22 and answer is not None and not answer.certain
    assert 20 in answer.credible and len(answer.credible) < 64


def test_a_change_for_the_better_and_one_too_small_are_refused():
    machine = Machine(8, 30, slower=-0.1)
    assert search.find(64, machine.ratios)[1] is None
    machine = Machine(8, 30, slower=0.01, noise=0.001, outliers=0.0, drift=0.0)
    ends, answer = search.find(64, machine.ratios, least=0.02)
    assert answer is None and ends.p < search.ALPHA and ends.change == pytest.approx(0.01, abs=0.002)


def test_the_detectable_effect_is_detected():
    smallest = np.mean([search.find(64, Machine(s, None).ratios)[0].smallest for s in range(20)])
    assert 0.005 < smallest < 0.04
    found = sum(search.find(2, Machine(s, 1, commits=2, slower=smallest).ratios)[0].differ for s in range(200))
    assert found >= 0.7 * 200, found


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: search.Search(1), "n=1"),
        (lambda: search.Search(4, confidence=1.0), "confidence=1.0"),
        (lambda: search.Search(3, [0, 0, 0]), "weights"),
        (lambda: search.Search(3, [1, 1]), "weights"),
        (lambda: search.Search(3).skip(2), "both ends"),
        (lambda: search.find(3, lambda commit, k: [0.0] * k, budget=5), "budget=5"),
        (lambda: search.find(3, lambda commit, k: None), "commit 0: both ends"),
    ],
)
def test_invalid_arguments_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()
