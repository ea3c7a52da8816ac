"""Find the commit that made a metric of a case worse: measure both ends, then search between them.

    exact metric   bisection over the whole history (perf/bisect/history.py)
    timed metric   Bayesian search over the first-parent chain (perf/bisect/search.py)

A commit that cannot be built, imported or measured is skipped. If the culprit may be one of several commits then, the
answer is a range.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from harness.perf.bisect import search
from harness.perf.bisect.history import BAD, GOOD, SKIP, STOP, History
from harness.perf.bisect.measure import Measurements, ReferenceLost, Unmeasurable
from harness.perf.count.differences import differences
from harness.perf.metrics import METRICS, STRUCTURE, Metric

PAIRED_RUNS = 300  #: budget of a timed search, if none is given
LEAST = math.log(1.005)  #: log ratio; a smaller change of the time is not searched for
Say = Callable[[str], None]


class Refused(Exception):
    """There is nothing to bisect. The message says what the ends show.

    incorrect: the bad end gives a wrong output. stopped: the budget ended the comparison of the ends.
    """

    def __init__(self, message: str, incorrect: bool = False, stopped: bool = False) -> None:
        super().__init__(message)
        self.incorrect, self.stopped = incorrect, stopped


@dataclass(frozen=True)
class BisectResult:
    """The result of a bisection."""

    metric: Metric
    commits: list[str]  #: the culprit, or all commits that may be it, oldest first
    certain: bool  #: False if the budget ended the search
    probability: float  #: that the culprit is among the commits
    old: float  #: the metric before the culprit
    new: float  #: and after it
    interval: tuple[float, float] | None  #: 95 % of new / old - 1; None if the metric is exact
    credible: list[str]  #: the fewest commits that hold 95 % of the probability
    skipped: dict[str, str]  #: commit -> reason
    trace: list[str]  #: other changes of the call since the culprit, one sentence each
    rest: str  #: a further loss between the culprit and the bad end, or ""
    measurements: int
    fresh: int  #: measurements that are not from the log
    seconds: float


def worse(metric: Metric, value: float, than: float) -> bool:
    """Whether one value of a metric is worse than another."""
    return value > than if metric.higher_is_worse else value < than


def choose_metric(measurements: Measurements, good: str, bad: str, say: Say) -> Metric:
    """The first structural metric that is worse at the bad end; "correct" if the bad end is wrong; else "device_us".

    Raises Refused if an end cannot be measured.
    """
    device_us = METRICS["device_us"]
    try:
        before = measurements.structure(good)["metrics"]
    except Unmeasurable as reason:
        raise Refused(f"the good end {good[:10]} cannot be measured: {reason}") from reason
    try:
        after = measurements.structure(bad)["metrics"]
    except Unmeasurable as reason:
        if reason.kind != "incorrect":
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
    measurements: Measurements, history: History, *, confidence: float = search.CONFIDENCE, budget: int | None = None,
    say: Say = lambda line: None,
) -> BisectResult:  # fmt: skip
    """Find the commit that made the metric of `measurements` worse. Raises Refused unless the bad end is worse.

    budget: the most measurements (of a time: paired runs), those from the log included. confidence: the probability at
    which a timed search ends. say: called with a line of progress.
    """
    started = time.perf_counter()
    if measurements.request.metric.exact:
        result = _exact(measurements, history, budget, say)
    else:
        result = _timed(measurements, history, confidence, budget, say)
    result = replace(result, trace=_trace(measurements, history, result))
    return replace(result, fresh=measurements.fresh, seconds=time.perf_counter() - started)


# -- exact ------------------------------------------------------------------------------------------------------------
def _exact(measurements: Measurements, history: History, budget: int | None, say: Say) -> BisectResult:
    metric = measurements.request.metric
    values: dict[str, int] = {}
    skipped: dict[str, Unmeasurable] = {}

    def judge(commit: str) -> str:
        if budget is not None and commit not in values and len(values) + len(skipped) >= budget:
            return STOP
        try:
            values[commit] = measurements.value(commit)
        except Unmeasurable as reason:
            skipped[commit] = reason
            say(_skipped_line(history, commit, reason))
            return SKIP
        answer = BAD if worse(metric, values[commit], values.get(history.good, values[commit])) else GOOD
        say(_line(history, commit, answer, f"{metric.name} {values[commit]}"))
        return answer

    for end, commit in (("good", history.good), ("bad", history.bad)):
        if judge(commit) == SKIP:
            incorrect = end == "bad" and skipped[commit].kind == "incorrect"
            raise Refused(f"the {end} end {commit[:10]} cannot be measured: {skipped[commit]}", incorrect)
    good, bad = values[history.good], values[history.bad]
    if not worse(metric, bad, good):
        how = "the same at both ends" if good == bad else "better at the bad end: --good and --bad may be swapped"
        raise Refused(f"{metric.name} is {how}: {good} at {history.good[:10]}, {bad} at {history.bad[:10]}")
    between = history.between()
    say(f"{between} commits, about {max(1, math.ceil(math.log2(between)))} more to be measured")
    culprits = history.bisect(judge)
    try:
        old = measurements.value(history.commit(culprits.commits[0]).parents[0])
    except Unmeasurable:
        old = good
    new = values.get(culprits.commits[-1], bad)
    rest = f"{metric.name} {new} -> {bad}" if worse(metric, bad, new) else ""
    certain = culprits.complete and len(culprits.commits) == 1
    return BisectResult(
        metric, culprits.commits, culprits.complete, 1.0 if certain else 1 / len(culprits.commits), old, new, None,
        culprits.commits, {c: str(r) for c, r in skipped.items()}, [], rest, len(values) + len(skipped), 0, 0.0,
    )  # fmt: skip


# -- timed ------------------------------------------------------------------------------------------------------------
def _timed(
    measurements: Measurements, history: History, confidence: float, budget: int | None, say: Say
) -> BisectResult:
    chain = history.chain()
    metric = measurements.request.metric
    skipped: dict[str, str] = {}

    def measure(number: int, count: int) -> list[float] | None:
        commit = chain[number]
        try:
            return measurements.ratios(commit, count)
        except Unmeasurable as reason:
            if commit == history.bad:
                message = f"the bad end {commit[:10]} cannot be timed: {reason}"
                raise Refused(message, reason.kind == "incorrect") from reason
            skipped[commit] = str(reason)
            say(_skipped_line(history, commit, reason))
            return None

    def progress(state: search.Search) -> None:
        likely = state.result()
        line = _line(history, chain[likely.last], "likely", f"{likely.probability:.1%}")
        say(f"{state.samples:6} paired runs{line}")

    say(f"{len(chain) - 1} commits; first the ends, against each other, in turn")
    try:
        ends, culprit = search.find(
            len(chain), measure, confidence=confidence, budget=PAIRED_RUNS if budget is None else budget,
            least=LEAST, progress=progress,
        )  # fmt: skip
    except ReferenceLost as reason:
        raise Refused(f"the good end {history.good[:10]} cannot be timed: {reason}") from reason
    old = median(measurements.times())
    if culprit is None:
        least = math.expm1(max(ends.smallest, LEAST))
        raise Refused(
            f"{metric.name}: no change between the ends for certain: {old:.4g} -> {old * math.exp(ends.change):.4g} "
            f"{metric.unit} ({math.expm1(ends.change):+.2%}, p = {ends.p:.2g}), {ends.samples} paired runs; "
            f"a change of {least:.2%} would have been found with a probability of {search.POWER:.0%}",
            stopped=ends.more,
        )
    low, high = map(math.expm1, culprit.interval)
    return BisectResult(
        metric, chain[culprit.first : culprit.last + 1], culprit.certain, culprit.probability, old,
        old * math.exp(culprit.change), (low, high), [chain[c] for c in culprit.credible], skipped, [], "",
        culprit.samples, 0, 0.0,
    )  # fmt: skip


# -- what else changed ------------------------------------------------------------------------------------------------
def _trace(measurements: Measurements, history: History, result: BisectResult) -> list[str]:
    """The differences of one call before and after the culprit, or the reason why they are not known."""
    parent, last = history.commit(result.commits[0]).parents[0], result.commits[-1]
    if result.metric.source == "verdict":
        try:
            verdict = measurements.verdict(last)
        except Unmeasurable as reason:
            return [f"no verdict: {reason}"]
        return [f"{verdict['status']}: {verdict['reason']}"]
    try:
        before, after = measurements.structure(parent), measurements.structure(last)
    except Unmeasurable as reason:
        return [f"not compared: {reason}"]
    return differences(before, after) or ["nothing that is counted has changed"]


def _skipped_line(history: History, commit: str, reason: Unmeasurable) -> str:
    return f"  {commit[:10]} skipped  {history.commit(commit).subject[:60]}: {reason}"


def _line(history: History, commit: str, state: str, what: str) -> str:
    return f"  {commit[:10]} {state:8} {what:22} {history.commit(commit).subject[:60]}".rstrip()
