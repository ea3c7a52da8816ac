"""Which commit changed a metric of a case: both ends are looked at first, then exactly or by statistics.

    exact metric   git bisect run over the whole history (perf/bisect/history.py)
    timed metric   Bayesian search over the first-parent chain (perf/bisect/search.py)

A commit that cannot be built, imported or measured is skipped; where that leaves several, the answer is a range.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from harness.perf.bisect import search
from harness.perf.bisect.history import ABORT, BAD, GOOD, SKIP, History
from harness.perf.bisect.measure import Measurements, ReferenceLost, Unmeasurable
from harness.perf.count.differences import differences
from harness.perf.metrics import METRICS, STRUCTURE, Metric

SITTINGS = 300  #: that a timed search may take, if no budget is given
LEAST = math.log(1.005)  #: a change of the time that is smaller is not looked for
Say = Callable[[str], None]


class Refused(Exception):
    """There is nothing to bisect; the message says what was found at the ends. incorrect: the bad end is not right.
    stopped: the budget ended the comparison of the ends."""

    def __init__(self, message: str, incorrect: bool = False, stopped: bool = False) -> None:
        super().__init__(message)
        self.incorrect, self.stopped = incorrect, stopped


@dataclass(frozen=True)
class Outcome:
    """What was found. commits: the culprit, or all that it may be, oldest first; certain unless the budget ended it.

    old, new: the metric before and after. interval: of new / old - 1, None where the metric is exact. credible: as
    many commits as hold 95 % of the probability. skipped: commit -> why. trace: what else changed, in sentences.
    rest: what the bad end has lost besides, if it is worse than the culprit.
    """

    metric: Metric
    commits: list[str]
    certain: bool
    probability: float
    old: float
    new: float
    interval: tuple[float, float] | None
    credible: list[str]
    skipped: dict[str, str]
    trace: list[str]
    rest: str
    measurements: int
    fresh: int
    seconds: float


def worse(metric: Metric, value: float, than: float) -> bool:
    """Whether a value is on the bad side of another."""
    return value > than if metric.higher_is_worse else value < than


def choose_metric(gauge: Measurements, good: str, bad: str, say: Say) -> Metric:
    """The first structural metric that is worse at the bad end; correctness if that is what it lost; else a time."""
    device_us = METRICS["device_us"]
    try:
        before = gauge.structure(good)["metrics"]
    except Unmeasurable as reason:
        raise Refused(f"the good end {good[:10]} cannot be measured: {reason}") from reason
    try:
        after = gauge.structure(bad)["metrics"]
    except Unmeasurable as reason:
        if not str(reason).startswith("incorrect"):
            raise Refused(f"the bad end {bad[:10]} cannot be measured: {reason}") from reason
        say(f"--metric correct: the bad end is not ({reason})")
        return METRICS["correct"]
    changed = [n for n in STRUCTURE if worse(METRICS[n], after[n], before[n])]
    if not changed:
        say(f"--metric {device_us.name}: no structural metric is worse at the bad end")
        return device_us
    each = ", ".join(f"{name} {before[name]} -> {after[name]}" for name in changed)
    say(f"--metric {changed[0]}: the first that is worse at the bad end ({each})")
    return METRICS[changed[0]]


def bisect(
    gauge: Measurements, history: History, *, confidence: float = search.CONFIDENCE, budget: int | None = None,
    say: Say = lambda line: None,
) -> Outcome:  # fmt: skip
    """Refused if the ends do not differ, for the worse. budget: measurements in all (of a time: sittings), those from
    the log included."""
    started = time.perf_counter()
    if gauge.question.metric.exact:
        outcome = _exact(gauge, history, budget, say)
    else:
        outcome = _timed(gauge, history, confidence, budget, say)
    outcome = replace(outcome, trace=_trace(gauge, history, outcome))
    return replace(outcome, fresh=gauge.fresh, seconds=time.perf_counter() - started)


# -- exact ------------------------------------------------------------------------------------------------------------
def _exact(gauge: Measurements, history: History, budget: int | None, say: Say) -> Outcome:
    metric = gauge.question.metric
    values: dict[str, int] = {}
    skipped: dict[str, str] = {}

    def judge(commit: str) -> int:
        if budget is not None and commit not in values and len(values) + len(skipped) >= budget:
            return ABORT
        try:
            values[commit] = gauge.value(commit)
        except Unmeasurable as reason:
            skipped[commit] = str(reason)
            say(_skipped(history, commit, reason))
            return SKIP
        verdict = BAD if worse(metric, values[commit], values.get(history.good, values[commit])) else GOOD
        say(_line(history, commit, "bad" if verdict == BAD else "good", f"{metric.name} {values[commit]}"))
        return verdict

    for end, commit in (("good", history.good), ("bad", history.bad)):
        if judge(commit) == SKIP:
            incorrect = end == "bad" and skipped[commit].startswith("incorrect")
            raise Refused(f"the {end} end {commit[:10]} cannot be measured: {skipped[commit]}", incorrect)
    good, bad = values[history.good], values[history.bad]
    if not worse(metric, bad, good):
        how = "the same at both ends" if good == bad else "better at the bad end: --good and --bad may be swapped"
        raise Refused(f"{metric.name} is {how}: {good} at {history.good[:10]}, {bad} at {history.bad[:10]}")
    between = history.between()
    say(f"{between} commits, about {max(1, math.ceil(math.log2(between)))} more to be measured by git bisect run")
    found = history.bisect_run(judge)
    try:
        old = gauge.value(history.commit(found.commits[0]).parents[0])
    except Unmeasurable:
        old = good
    new = values.get(found.commits[-1], bad)
    rest = f"{metric.name} {new} -> {bad}" if worse(metric, bad, new) else ""
    certain = found.complete and len(found.commits) == 1
    return Outcome(
        metric, found.commits, found.complete, 1.0 if certain else 1 / len(found.commits), old, new, None,
        found.commits, skipped, [], rest, len(values) + len(skipped), 0, 0.0,
    )  # fmt: skip


# -- timed ------------------------------------------------------------------------------------------------------------
def _timed(gauge: Measurements, history: History, confidence: float, budget: int | None, say: Say) -> Outcome:
    chain = history.chain()
    metric, skipped = gauge.question.metric, {}  # type: Metric, dict[str, str]

    def measure(number: int, count: int) -> list[float] | None:
        commit = chain[number]
        try:
            return gauge.ratios(commit, count)
        except Unmeasurable as reason:
            if commit == history.bad:
                incorrect = str(reason).startswith("incorrect")
                raise Refused(f"the bad end {commit[:10]} cannot be timed: {reason}", incorrect) from reason
            skipped[commit] = str(reason)
            say(_skipped(history, commit, reason))
            return None

    def told(state: search.Search) -> None:
        answer = state.answer()
        likely = _line(history, chain[answer.last], "likely", f"{answer.probability:.1%}")
        say(f"{state.samples:6} sittings{likely}")

    say(f"{len(chain) - 1} commits; first the ends, against each other, in turn")
    try:
        ends, answer = search.find(
            len(chain), measure, confidence=confidence, budget=SITTINGS if budget is None else budget,
            least=LEAST, told=told,
        )  # fmt: skip
    except ReferenceLost as reason:
        raise Refused(f"the good end {history.good[:10]} cannot be timed: {reason}") from reason
    old = median(gauge.times())
    if answer is None:
        least = math.expm1(max(ends.smallest, LEAST))
        raise Refused(
            f"{metric.name}: no change between the ends for certain: {old:.4g} -> {old * math.exp(ends.change):.4g} "
            f"{metric.unit} ({math.expm1(ends.change):+.2%}, p = {ends.p:.2g}), {ends.samples} sittings; "
            f"a change of {least:.2%} would have been found with a probability of {search.POWER:.0%}",
            stopped=ends.more,
        )
    low, high = map(math.expm1, answer.interval)
    return Outcome(
        metric, chain[answer.first : answer.last + 1], answer.certain, answer.probability, old,
        old * math.exp(answer.change), (low, high), [chain[c] for c in answer.credible], skipped, [], "",
        answer.samples, 0, 0.0,
    )  # fmt: skip


# -- what else changed ------------------------------------------------------------------------------------------------
def _trace(gauge: Measurements, history: History, outcome: Outcome) -> list[str]:
    """What one call does differently since the culprit, or why that cannot be said."""
    parent, last = history.commit(outcome.commits[0]).parents[0], outcome.commits[-1]
    if outcome.metric.source == "verdict":
        try:
            return [f"{gauge.verdict(last)['status']}: {gauge.verdict(last)['reason']}"]
        except Unmeasurable as reason:
            return [f"no verdict: {reason}"]
    try:
        return differences(gauge.structure(parent), gauge.structure(last)) or ["nothing that is counted has changed"]
    except Unmeasurable as reason:
        return [f"not compared: {reason}"]


def _skipped(history: History, commit: str, reason: Unmeasurable) -> str:
    return f"  {commit[:10]} skipped  {history.commit(commit).subject[:60]}: {reason}"


def _line(history: History, commit: str, state: str, what: str) -> str:
    return f"  {commit[:10]} {state:8} {what:22} {history.commit(commit).subject[:60]}".rstrip()
