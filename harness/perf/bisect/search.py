"""Find which of n commits changed a noisy number: Bayesian search with a continuous, robust likelihood.

    commits   0 (known good) ... n - 1 (known bad), one step between two levels
    hypothesis c in 1 .. n - 1: commit c is the first with the new level
    sample    y = log(measured / reference). The reference is commit 0, measured next to it, which cancels drift. Each
              sample has processes of its own (perf/bisect/measure.py), or samples would share the offset of a process.

    y at commit j ~ base (+ change if j >= c) + scale * Student t with DEGREES of freedom

base, change and scale are unknown. They are summed out over a grid around the samples; no point estimate replaces them.
The heavy tails of Student's distribution limit the weight of an outlier. The samples of the ends are used like all
others; they alone determine the size of the change when the search starts.

A commit that cannot be measured may still be the culprit. It and its successor cannot be distinguished then, and the
answer is a range. `ends` first tests whether there is a change to search for.

This module knows neither git nor a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

DEGREES = 3.0  #: of freedom: one sample in eleven lies beyond three scales
CONFIDENCE = 0.99
CREDIBLE = 0.95
POINTS = (7, 15, 7)  #: of the grid over base, change and scale
REACH = 4.0  #: standard deviations from the middle of the grid to its ends
OUTCOMES = 29  #: values of a next sample over which its information is averaged
#: False alarms in histories without a change, all looks together. Far below the required 1 in 100, so that a test with
#: 100 histories can assert that.
ALPHA = 0.002
LOOKS = (6, 9, 13, 19, 28, 42, 63)  #: samples of the bad end after which the ends are compared
LEAST_BUDGET = LOOKS[0] * 3 // 2  #: samples of the first look: half as many of the good end
POWER = 0.8

Measure = Callable[[int, int], "Sequence[float] | None"]


@dataclass(frozen=True)
class Ends:
    """The comparison of both ends. `change` and `smallest` are log ratios."""

    differ: bool
    more: bool  #: undecided so far, and another look is due
    p: float  #: one-sided, of Student's t, for the last look
    change: float
    smallest: float  #: minimum detectable effect: as many samples find it with a probability of POWER
    samples: int


def ends(good: Sequence[float], bad: Sequence[float], least: float = 0.0) -> Ends:
    """Test whether the bad end is clearly worse than the good one: Student's t-test, with a share of ALPHA each look.

    good: log ratios of commit 0 to itself. bad: log ratios of commit n - 1 to commit 0. least: the smallest change that
    counts. Without a change a ratio is as likely above 1 as below, for any noise, because the order alternates. An
    outlier makes the test more conservative.
    """
    from scipy import stats

    alpha = ALPHA / len(LOOKS)
    change = float(np.median(bad) - np.median(good))
    error, freedom = float(np.std(bad, ddof=1) / np.sqrt(len(bad))), len(bad) - 1
    p = float(stats.ttest_1samp(bad, 0.0, alternative="greater").pvalue) if error else float(change <= 0)
    smallest = float(stats.t.isf(alpha, freedom) + stats.t.isf(1 - POWER, freedom)) * error
    differ = p < alpha and change > least
    return Ends(differ, not differ and len(bad) < LOOKS[-1], p, change, smallest, len(good) + len(bad))


def _spread(values: np.ndarray) -> float:
    """Standard deviation of the bulk: 1.4826 times the median distance from the median (of normal values)."""
    return max(1e-6, float(1.4826 * np.median(np.abs(values - np.median(values)))))


@dataclass(frozen=True)
class SearchResult:
    """The culprit is in commits first .. last: one commit, or a range that cannot be distinguished."""

    first: int
    last: int
    probability: float
    credible: list[int]  #: the fewest commits that hold CREDIBLE of the probability, in order
    change: float  #: log ratio, mean of the posterior
    interval: tuple[float, float]  #: CREDIBLE of the change
    samples: int
    certain: bool  #: the probability reached the confidence


@dataclass
class Search:
    """The posterior over commits 1 .. n - 1, given all samples so far."""

    n: int
    weights: Sequence[float] | None = None  #: prior of each of the n commits; uniform if None
    confidence: float = CONFIDENCE
    values: dict[int, list[float]] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"n={self.n}: 2 commits or more")
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}: above 0.5 and below 1")
        prior = np.ones(self.n) if self.weights is None else np.array(self.weights, float)
        prior[0] = 0.0
        if prior.shape != (self.n,) or not (prior >= 0).all() or not prior.sum() > 0:
            raise ValueError(f"weights: {self.n} numbers, none negative, and one of the last {self.n - 1} positive")
        with np.errstate(divide="ignore"):
            self._log_prior = np.log(prior[1:] / prior.sum())
        self._grid_at = 0  # number of samples when the grid was laid
        self._joint = np.empty(0)

    @property
    def samples(self) -> int:
        return sum(map(len, self.values.values()))

    def skip(self, commit: int) -> None:
        """Mark a commit that cannot be measured. Raises ValueError for the ends."""
        if commit in (0, self.n - 1):
            raise ValueError(f"commit {commit}: both ends must be measured")
        self.skipped.add(commit)

    def add(self, commit: int, values: Sequence[float]) -> None:
        """Add samples of a commit. The grid needs samples of both ends."""
        self.values.setdefault(commit, []).extend(values)
        if not {0, self.n - 1} <= self.values.keys():
            return
        if not self._grid_at:
            self._lay(*self._guess())
        elif self.samples >= 2 * self._grid_at:
            self._lay(*self._moments())  # a narrower posterior needs a finer grid
        else:
            self._count(commit, values)
        self._update()

    # -- the grid -----------------------------------------------------------------------------------------------------
    def _guess(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and deviations of (base, change, log scale), from the samples of the ends."""
        good, bad = (np.asarray(self.values[j]) for j in (0, self.n - 1))
        scale = _spread(np.concatenate([good - np.median(good), bad - np.median(bad)])) / 1.2  # of t: wider than normal
        errors = [1.5 * scale / np.sqrt(len(side)) for side in (good, bad)]
        means = np.array([np.median(good), np.median(bad) - np.median(good), np.log(scale)])
        return means, np.array([errors[0], np.hypot(*errors), 1.2 / np.sqrt(len(good) + len(bad))])

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """The same, from the posterior. A deviation is at least half a step of the grid, which resolves no less."""
        means, deviations = [], []
        for axis, points in enumerate(self._axes):
            mass = self._joint.sum(axis=tuple(a for a in range(4) if a != axis + 1))
            mean = float(mass @ points)
            means.append(mean)
            deviations.append(max(float(np.sqrt(mass @ (points - mean) ** 2)), (points[1] - points[0]) / 2))
        return np.array(means), np.array(deviations)

    def _lay(self, means: np.ndarray, deviations: np.ndarray) -> None:
        self._grid_at = self.samples
        self._axes = [m + d * np.linspace(-REACH, REACH, p) for m, d, p in zip(means, deviations, POINTS)]
        base, change, log_scale = np.meshgrid(*self._axes, indexing="ij")
        self._levels = np.stack([base, base + change])  # [2, grid]: old, new
        self._log_scale = log_scale
        self._likelihood = np.zeros((2, self.n, *POINTS))  # [2, n, grid]: old, new
        for commit, values in self.values.items():
            self._count(commit, values)

    def _density(self, values: np.ndarray) -> np.ndarray:
        """[values, 2, grid] log density of each value at the old and at the new level, without the constant."""
        z = (values[:, None, None, None, None] - self._levels) * np.exp(-self._log_scale)
        return -(DEGREES + 1) / 2 * np.log1p(z * z / DEGREES) - self._log_scale

    def _count(self, commit: int, values: Sequence[float]) -> None:
        self._likelihood[:, commit] += self._density(np.asarray(values, float)).sum(0)

    def _update(self) -> None:
        old, new = self._likelihood
        log = np.cumsum(old, axis=0)[:-1] + np.cumsum(new[::-1], axis=0)[::-1][1:]  # hypotheses 1 .. n - 1
        log += self._log_prior[:, None, None, None]
        joint = np.exp(log - log.max())
        self._joint = joint / joint.sum()

    # -- results ------------------------------------------------------------------------------------------------------
    @property
    def posterior(self) -> np.ndarray:
        """[n] probabilities that a commit is the first with the new level; that of commit 0 is 0."""
        return np.concatenate([[0.0], self._joint.sum(axis=(1, 2, 3))])

    def groups(self) -> list[tuple[int, int]]:
        """(first, last) of each range that can be distinguished. c and c + 1 cannot if commit c is skipped."""
        edges = [c for c in range(1, self.n) if c not in self.skipped]
        return list(zip([1] + [c + 1 for c in edges[:-1]], edges))

    def result(self) -> SearchResult:
        """The most probable range, and the change, given the samples so far."""
        posterior = self.posterior
        mass = {group: float(posterior[group[0] : group[1] + 1].sum()) for group in self.groups()}
        first, last = max(mass, key=lambda group: mass[group])
        order = np.argsort(-posterior, kind="stable")
        needed = int(np.searchsorted(np.cumsum(posterior[order]), CREDIBLE)) + 1
        points, change = self._axes[1], self._joint.sum(axis=(0, 1, 3))
        below = np.cumsum(change) - change / 2
        low, high = np.interp([(1 - CREDIBLE) / 2, (1 + CREDIBLE) / 2], below, points)
        return SearchResult(
            first, last, mass[first, last], sorted(map(int, order[:needed])), float(change @ points),
            (float(low), float(high)), self.samples, mass[first, last] >= self.confidence,
        )  # fmt: skip

    def next(self) -> int:
        """The commit whose next sample is expected to leave the least entropy.

        Of several such commits, the one nearest to the median of the posterior.
        """
        gain = self._information()
        gain[sorted(self.skipped)] = -1.0
        best = np.flatnonzero(gain >= gain.max() - 1e-9)
        middle = int(np.searchsorted(np.cumsum(self.posterior), 0.5))
        return int(best[np.argmin(np.abs(best - middle + 0.5))])

    def _information(self) -> np.ndarray:
        """[n] expected decrease of the entropy of c, in nats, by one sample y of each commit j.

            information[j] = H(c) - sum over y of p(y) H(c | y) = H(c) + sum over c, y of p(c, y) log(p(c, y) / p(y))

        A sample of commit j is drawn from the new level if c <= j, and from the old one otherwise. With new[c, y] and
        old[c, y], the joint probabilities p(c, y) at both levels, the sums over c for all j are cumulative sums.
        """
        base, change, log_scale = self._axes
        wide = 3 * np.exp(log_scale[len(log_scale) // 2])
        middle = base[len(base) // 2]
        y = np.linspace(middle - wide, middle + max(0.0, change[len(change) // 2]) + wide, OUTCOMES)
        density = np.exp(self._density(y)).reshape(OUTCOMES, 2, -1)
        density /= density.sum(axis=0)  # over y: the outcomes have a total probability of 1
        joint = self._joint.reshape(self.n - 1, -1)
        # [n - 1, OUTCOMES]: p(c, y). einsum, as BLAS would start threads on a machine that is measuring.
        old, new = (np.einsum("cg,yg->cy", joint, density[:, level]) for level in (0, 1))

        def upto(p: np.ndarray) -> np.ndarray:  # sums over c <= j, for j = 0 .. n - 1
            return np.concatenate([np.zeros((1, OUTCOMES)), np.cumsum(p, axis=0)])

        p_y = upto(new) + old.sum(0) - upto(old)  # [j, y]: new for c <= j, old for the others
        p_log_p = upto(_xlogx(new)) + _xlogx(old).sum(0) - upto(_xlogx(old))  # [j, y]: sum over c
        left = (_xlogx(p_y) - p_log_p).sum(1)  # [j]: sum over y of p(y) H(c | y)
        return -_xlogx(joint.sum(1)).sum() - left


def _xlogx(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.maximum(p, 1e-300))


def find(
    n: int,
    measure: Measure,
    *,
    weights: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
    budget: int = 1000,
    each: int = 1,
    least: float = 0.0,
    progress: Callable[[Search], None] = lambda search: None,
) -> tuple[Ends, SearchResult | None]:
    """Compare both ends, then search for the culprit. The result is None if the ends do not differ clearly.

    measure(commit, k) returns k log ratios to commit 0, or None if the commit cannot be measured. It is called for
    `each` samples at a time, and for at most `budget` samples. `progress` is called after each step. The search depends
    on the values of `measure` alone: the same values lead to the same requests, so that a log can resume it.
    """
    if budget < LEAST_BUDGET:
        raise ValueError(f"budget={budget}: {LEAST_BUDGET} samples or more, or the ends cannot be compared")
    good, bad = list(_must(measure, 0, LOOKS[0] // 2)), []  # type: list[float], list[float]
    compared = Ends(False, True, 1.0, 0.0, float("inf"), len(good))
    for look in LOOKS:
        if not compared.more or len(good) + look > budget:
            break
        bad += _must(measure, n - 1, look - len(bad))
        good += _must(measure, 0, look // 2 - len(good))
        compared = ends(good, bad, least)
    if not compared.differ:
        return compared, None
    search = Search(n, weights, confidence)
    search.add(0, good)
    search.add(n - 1, bad)
    while not search.result().certain and search.samples + each <= budget:
        commit = search.next()
        values = measure(commit, each)
        if values is None:
            search.skip(commit)
        else:
            search.add(commit, values)
        progress(search)
    return compared, search.result()


def _must(measure: Measure, commit: int, k: int) -> list[float]:
    values = measure(commit, k) if k > 0 else []
    if values is None:
        raise ValueError(f"commit {commit}: both ends must be measured")
    return list(values)
