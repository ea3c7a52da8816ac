"""Is HEAD slower than BASE? Estimates from samples, and their errors: pure functions over numbers.

The unit of observation is a process. Its memory layout shifts all its times (T. Mytkowicz et al., "Producing Wrong Data
Without Doing Anything Obviously Wrong!", ASPLOS 2009), so a thousand samples of one process are one observation. A
*generation* is three processes: BASE, BASE again and HEAD. They are sampled in turn, in *blocks* of all six orders, so
that drift affects all three equally. In a generation, the *level* of a side is the median over its blocks of

    log(median of its samples) - mean of that logarithm over the sides

Levels follow a randomized block design with two treatments (D. Montgomery, Design and Analysis of Experiments,
chapter 4): level = generation + effect [HEAD only] + process. The difference between two processes of BASE is noise. It
gives the spread of processes, together with HEAD's, and the noise floor.

There is a look after each of LOOKS generations. A case ends at the first look that decides it. Pocock's function spends
the allowed error over the looks (K. Lan and D. DeMets, Biometrika 70, 1983, p. 659). Each look has an increment of its
own, so the sum bounds the error for any correlation of the looks. At a look the false discovery rate over all cases is
controlled (Y. Benjamini and Y. Hochberg, J. R. Stat. Soc. B 57, 1995, p. 289).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from statistics import fmean, median

SIDES = ("base", "again", "head")
#: Of the blocks in a generation. Each side is first, and follows each other side, equally often.
ORDERS = tuple(permutations(SIDES))
LOOKS = (3, 6, 12)  #: generations after which there is a look
ALPHA = 0.005  #: false discovery rate of all looks together, for regressions and for improvements each
MISSED = 0.05  #: error of each bound of the interval, all looks together, and therefore of "same"
POWER = 0.8  #: with which the detectable effect is found

REGRESSED, IMPROVED, SAME, UNDECIDED = "regressed", "improved", "same", "undecided"

Levels = tuple[float, float, float]  #: of base, again, head: logarithms, sum 0


@dataclass(frozen=True)
class Estimate:
    """The change of one timed metric, from all its generations. Changes are relative: 0.03 is 3 % slower."""

    change: float  #: of HEAD against BASE
    low: float  #: bounds of the change, each wrong with probability MISSED at most
    high: float
    slower: float  #: p-value of "HEAD is not slower"
    faster: float  #: p-value of "HEAD is not faster"
    floor: float  #: the noise floor: BASE against itself shows less than this in 95 of 100 comparisons
    error: float  #: standard error of log(1 + change)
    freedom: int  #: degrees of freedom of that error
    generations: int


def levels(blocks: Sequence[Mapping[str, Sequence[float]]]) -> Levels:
    """The levels of a generation. blocks: side -> samples, in any unit, above 0."""
    centred = []
    for block in blocks:
        logs = [math.log(median(block[side])) for side in SIDES]
        centre = fmean(logs)
        centred.append([value - centre for value in logs])
    base, again, head = (median(column) for column in zip(*centred, strict=True))
    centre = (base + again + head) / 3
    return base - centre, again - centre, head - centre


def share(look: int) -> float:
    """The part of the allowed error for look 0, 1, ...: the increment of ln(1 + (e - 1) t), t from 0 to 1."""

    def spent(generations: int) -> float:
        return math.log(1 + (math.e - 1) * generations / LOOKS[-1])

    return spent(LOOKS[look]) - (spent(LOOKS[look - 1]) if look else 0.0)


def estimate(generations: Sequence[Levels], look: int) -> Estimate:
    """The change of HEAD against BASE at a look, from the levels of two generations or more (else ValueError).

    Ordinary least squares. HEAD's processes may be noisier than BASE's: the error is the larger of that of all
    processes and that of the differences with HEAD alone.
    """
    from scipy.stats import t

    n = len(generations)
    if n < 2:
        raise ValueError(f"generations={n}: two or more show how much processes differ")
    against = [head - (base + again) / 2 for base, again, head in generations]  # variance: 3/2 of that of a process
    itself = [again - base for base, again, _ in generations]  # variance: 2 times that of a process
    effect = fmean(against)
    spread = sum((d - effect) ** 2 for d in against)
    freedom = 2 * n - 1
    variance = (spread / 1.5 + sum(a * a for a in itself) / 2) / freedom
    error = math.sqrt(max(1.5 * variance, spread / (n - 1)) / n)
    reach = error * _quantile(1 - MISSED * share(look), freedom)
    score = effect / error if error else math.copysign(math.inf, effect) if effect else 0.0
    return Estimate(
        change=math.expm1(effect),
        low=math.expm1(effect - reach),
        high=math.expm1(effect + reach),
        slower=float(t.sf(score, freedom)),
        faster=float(t.cdf(score, freedom)),
        floor=math.expm1(_quantile(0.975, n) * math.sqrt(fmean([a * a for a in itself]) / n)),
        error=error,
        freedom=freedom,
        generations=n,
    )


def judge(estimates: Sequence[Estimate], before: Sequence[str], look: int, threshold: float) -> list[str]:
    """The outcome of each case at a look. before: the outcomes of the last look; all but undecided are kept.

    regressed, improved: significant among all cases, and larger than both the threshold and the noise floor.
    same: the whole interval lies within the threshold (0.01 is 1 %).
    """
    from scipy.stats import false_discovery_control

    if not estimates:
        return []
    allowed = ALPHA * share(look)
    # A case that is known to be the same is no candidate, and must not lend weight to others.
    slower, faster = (
        false_discovery_control([1.0 if was == SAME else getattr(e, side) for e, was in zip(estimates, before)])
        for side in ("slower", "faster")
    )
    outcomes = []
    for e, was, p_slower, p_faster in zip(estimates, before, slower, faster, strict=True):
        least = max(threshold, e.floor)
        if was != UNDECIDED:
            outcomes.append(was)
        elif p_slower <= allowed and e.change > least:
            outcomes.append(REGRESSED)
        elif p_faster <= allowed and 1 / (1 + e.change) - 1 > least:
            outcomes.append(IMPROVED)
        elif -threshold < e.low and e.high < threshold:
            outcomes.append(SAME)
        else:
            outcomes.append(UNDECIDED)
    return outcomes


def detectable(e: Estimate, cases: int, look: int, threshold: float) -> float:
    """The least change that such a look detects with a probability of POWER if, of so many cases, no other changed.

    The sum of two quantiles times the standard error (H. Bloom, Evaluation Review 19, 1995, p. 547).
    """
    power = _quantile(POWER, e.freedom) * e.error
    significant = _quantile(1 - ALPHA * share(look) / cases, e.freedom) * e.error
    return math.expm1(power + max(significant, math.log1p(max(threshold, e.floor))))


@lru_cache(maxsize=1024)
def _quantile(p: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(p, freedom))
