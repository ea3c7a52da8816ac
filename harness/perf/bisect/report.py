"""What a search found, for a reader: the commit, the change, what else changed with it, and what to run next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from harness.perf.bisect.bisect import Outcome, Refused
from harness.perf.bisect.history import Commit, History
from harness.perf.bisect.measure import MetricRequest
from harness.perf.bisect.search import CREDIBLE


@dataclass(frozen=True)
class Command:
    """The command line, as far as the next ones share it."""

    question: MetricRequest
    repo: Path | None
    build: str | None

    def of(self, name: str, *first: str) -> str:
        """`name` for the same case, backend and repository."""
        words = ["python3", "-m", "harness", name, *first, self.question.case, "--backend", self.question.backend]
        words += ["--device", self.question.device]
        words += ["--repo", str(self.repo)] if self.repo else []
        words += ["--build", self.build] if self.build else []
        return shlex.join(words)

    def compare(self, old: str, new: str) -> str:
        """Everything that compare looks at by itself, or the metric if that is not among it."""
        metric = self.question.metric
        words = self.of("compare", old, new)
        return f"{words} --metric {metric.name}" if metric.source == "compiled" or metric.name == "host_us" else words

    def more(self, refusal: Refused, history: History) -> list[str]:
        """What to run after a refusal, to see more."""
        good, bad = history.good[:10], history.bad[:10]
        if refusal.incorrect:
            return [self.of("bisect", "--good", good, "--bad", bad, "--metric", "correct")]
        return [self.compare(good, bad)]

    @property
    def run(self) -> str:
        """The case in the directory where this is run."""
        q = self.question
        return shlex.join(["python3", "-m", "harness", "run", q.case, "--backend", q.backend, "--device", q.device])


def told(outcome: Outcome, history: History, command: Command) -> list[str]:
    """The whole answer, line by line."""
    commits = [history.commit(sha) for sha in outcome.commits]
    lines = [_found(outcome, commits)]
    if len(commits) > 1:
        lines += [f"    {_named(c)}" for c in commits[:20]]
        lines += [f"    and {len(commits) - 20} more"] if len(commits) > 20 else []
    lines += [f"  {outcome.metric.name:12} {_change(outcome)}", f"  confidence   {_confidence(outcome)}"]
    if len(outcome.credible) > len(commits):
        lines.append(f"  {CREDIBLE:.0%} within  " + ", ".join(c[:10] for c in outcome.credible))
    lines += [f"  trace        {sentence}" for sentence in outcome.trace]
    lines += [f"  skipped      {_named(history.commit(c))}: {why}" for c, why in outcome.skipped.items()]
    logged = outcome.measurements > outcome.fresh
    lines.append(
        f"  measured     {outcome.measurements} times"
        + (f", {max(0, outcome.measurements - outcome.fresh)} of them out of the log" if logged else "")
        + f"; {outcome.seconds:.0f} s"
    )
    if len(commits[-1].parents) > 1:
        lines.append("  a merge      it stands for all that it brought in")
    return [*lines, "", *next_commands(outcome, commits, history, command)]


def next_commands(outcome: Outcome, commits: list[Commit], history: History, command: Command) -> list[str]:
    """What a reader would run now."""
    first, last = commits[0], commits[-1]
    old, new = f"{first.sha[:10]}~1", last.sha[:10]
    git = shlex.join(["git", *(["-C", str(command.repo)] if command.repo else [])])
    metric = ["--metric", outcome.metric.name]
    lines = [f"{git} show {new}" if len(commits) == 1 else f"{git} log -p {old}..{new}"]
    lines.append(command.compare(old, new))
    lines.append(f"{git} worktree add /tmp/{new} {new} && cd /tmp/{new} && {command.run}")
    if len(last.parents) > 1:
        good, bad = f"$(git merge-base {new}^1 {new}^2)", f"{new}^2"
        lines.append(command.of("bisect") + f" {shlex.join(metric)} --good {good} --bad {bad}")
    if outcome.rest:
        rest = command.of("bisect", "--good", new, "--bad", history.bad[:10], *metric)
        lines.append(f"{rest}  # the rest: {outcome.rest}")
    return lines


def _found(outcome: Outcome, commits: list[Commit]) -> str:
    if not outcome.certain:
        return "not certain yet, " + (f"most likely: {_named(commits[0])}" if len(commits) == 1 else "one of:")
    if len(commits) == 1:
        return f"found: {_named(commits[0])}"
    return f"found: one of {len(commits)} commits, which cannot be told apart since some cannot be measured:"


def _named(commit: Commit) -> str:
    return f"{commit.sha[:10]} {commit.date} {commit.subject}"


def _change(outcome: Outcome) -> str:
    old, new, unit = outcome.old, outcome.new, outcome.metric.unit
    if outcome.metric.source == "verdict":
        return " -> ".join("passed" if value else "not correct" for value in (old, new))
    if outcome.interval is None:
        share = f", {(new - old) / old:+.1%}" if old else ""
        return f"{old:g} -> {new:g} {unit} ({new - old:+g}{share})"
    low, high = outcome.interval
    return f"{old:.4g} -> {new:.4g} {unit} ({new / old - 1:+.2%}; {CREDIBLE:.0%} interval {low:+.2%} to {high:+.2%})"


def _confidence(outcome: Outcome) -> str:
    if not outcome.metric.exact:
        return f"{outcome.probability:.2%}"
    if not outcome.certain:
        return "none: the budget ended the search"
    return "exact: every value on the way was counted, not timed"
