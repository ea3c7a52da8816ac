"""Is HEAD slower than BASE? What samples say, with what error: pure functions over numbers.

The unit is a process: its memory layout shifts all that it measures (T. Mytkowicz et al., "Producing Wrong Data Without
Doing Anything Obviously Wrong!", ASPLOS 2009), so a thousand samples of one process are no more than one observation. A
*generation* is three processes: BASE, BASE again and HEAD. They are sampled in turn, in *blocks* of all six orders, so
that drift meets each alike. In a generation, a side's *level* is the median over its blocks of

    log(median of its samples) - mean over the sides of the same

and levels follow a randomized block design with two treatments (D. Montgomery, Design and Analysis of Experiments,
chapter 4): level = generation + effect [HEAD only] + process. What two processes of BASE differ by is noise for
certain: it tells the spread of processes, along with HEAD's, and is the noise floor.

A comparison is looked at after LOOKS generations, and ends for a case at the first look that answers it. The error
allowed is spent over the looks by Pocock's function (K. Lan and D. DeMets, Biometrika 70, 1983, p. 659). Each look has
an increment of its own to use, so the sum bounds the error however much the looks have in common. At a look the false
discovery rate over all cases is controlled (Y. Benjamini and Y. Hochberg, J. R. Stat. Soc. B 57, 1995, p. 289).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from statistics import fmean, median

SIDES = ("base", "again", "head")
ORDERS = tuple(
    permutations(SIDES)
)  #: of the blocks in a generation: each side is first, and after each other, as often
LOOKS = (3, 6, 12)  #: generations after which there is a look
ALPHA = 0.005  #: false discovery rate of all looks together, for regressions and for improvements each
MISSED = 0.05  #: error of each bound of the interval, all looks together; so also of "same"
POWER = 0.8  #: with which the detectable effect is found

REGRESSED, IMPROVED, SAME, UNDECIDED = "regressed", "improved", "same", "undecided"

Levels = tuple[float, float, float]  #: of base, again, head: logarithms, sum 0


@dataclass(frozen=True)
class Estimate:
    """What a case's generations say. Changes are relative: 0.03 is 3 % slower."""

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
    """The levels of a generation from its blocks: side -> samples, in any unit, above 0."""
    centred = []
    for block in blocks:
        logs = [math.log(median(block[side])) for side in SIDES]
        centre = fmean(logs)
        centred.append([value - centre for value in logs])
    base, again, head = (median(column) for column in zip(*centred, strict=True))
    centre = (base + again + head) / 3
    return base - centre, again - centre, head - centre


def share(look: int) -> float:
    """The part of the allowed error that look 0, 1, ... may use: the increment of ln(1 + (e - 1) t), t from 0 to 1."""

    def spent(generations: int) -> float:
        return math.log(1 + (math.e - 1) * generations / LOOKS[-1])

    return spent(LOOKS[look]) - (spent(LOOKS[look - 1]) if look else 0.0)


def estimate(found: Sequence[Levels], look: int) -> Estimate:
    """The change of HEAD against BASE from the levels of two generations or more, at this look.

    Ordinary least squares. HEAD's processes may be noisier than BASE's: if they alone say so, their error is taken.
    """
    from scipy.stats import t

    n = len(found)
    if n < 2:
        raise ValueError(f"generations={n}: two or more say how much processes differ")
    against = [head - (base + again) / 2 for base, again, head in found]  # variance 3/2 of a process's
    itself = [again - base for base, again, _ in found]  # variance 2 of a process's
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
    """The answer for each case at a look; `before`: those of the last one, of which all but undecided are kept.

    regressed, improved: significant among all cases, and larger than both the threshold and the noise floor.
    same: the whole interval lies within the threshold, 0.01 for 1 %.
    """
    from scipy.stats import false_discovery_control

    if not estimates:
        return []
    allowed = ALPHA * share(look)
    # A case that is known to be the same is no candidate: nor may it lend weight to others.
    slower, faster = (
        false_discovery_control([1.0 if was == SAME else getattr(e, side) for e, was in zip(estimates, before)])
        for side in ("slower", "faster")
    )
    answers = []
    for e, was, p_slower, p_faster in zip(estimates, before, slower, faster, strict=True):
        least = max(threshold, e.floor)
        if was != UNDECIDED:
            answers.append(was)
        elif p_slower <= allowed and e.change > least:
            answers.append(REGRESSED)
        elif p_faster <= allowed and 1 / (1 + e.change) - 1 > least:
            answers.append(IMPROVED)
        elif -threshold < e.low and e.high < threshold:
            answers.append(SAME)
        else:
            answers.append(UNDECIDED)
    return answers


def detectable(e: Estimate, cases: int, look: int, threshold: float) -> float:
    """The least change that a look like this finds with POWER, were it the only one among so many cases.

    The sum of two quantiles times the standard error (H. Bloom, Evaluation Review 19, 1995, p. 547).
    """
    found = _quantile(POWER, e.freedom) * e.error
    significant = _quantile(1 - ALPHA * share(look) / cases, e.freedom) * e.error
    return math.expm1(found + max(significant, math.log1p(max(threshold, e.floor))))


@lru_cache(maxsize=1024)
def _quantile(p: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(p, freedom))
