"""The result of a bisection as text: the commit, the change, what else changed, and the commands to run next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from harness.perf.bisect.bisect import BisectResult, Refused
from harness.perf.bisect.history import Commit, History
from harness.perf.bisect.measure import MetricRequest
from harness.perf.bisect.search import CREDIBLE


@dataclass(frozen=True)
class Command:
    """The options that the next command lines share with this one."""

    request: MetricRequest
    repo: Path | None
    build: str | None

    def line(self, name: str, *first: str) -> str:
        """The command `name` for the same case, backend and repository; `first`: its first arguments."""
        words = ["python3", "-m", "harness", name, *first, self.request.case, "--backend", self.request.backend]
        words += ["--device", self.request.device]
        words += ["--repo", str(self.repo)] if self.repo else []
        words += ["--build", self.build] if self.build else []
        return shlex.join(words)

    def compare(self, old: str, new: str) -> str:
        """compare between two commits. It names the metric only if compare does not look at it by default."""
        metric = self.request.metric
        words = self.line("compare", old, new)
        return f"{words} --metric {metric.name}" if metric.source == "compiled" or metric.name == "host_us" else words

    def more(self, refusal: Refused, history: History) -> list[str]:
        """The commands that show more after a refusal."""
        good, bad = history.good[:10], history.bad[:10]
        if refusal.incorrect:
            return [self.line("bisect", "--good", good, "--bad", bad, "--metric", "correct")]
        return [self.compare(good, bad)]

    @property
    def run(self) -> str:
        """The case, run in the current directory."""
        request = self.request
        words = ["run", request.case, "--backend", request.backend, "--device", request.device]
        return shlex.join(["python3", "-m", "harness", *words])


def result_lines(result: BisectResult, history: History, command: Command) -> list[str]:
    """The whole report, line by line."""
    commits = [history.commit(sha) for sha in result.commits]
    lines = [_heading(result, commits)]
    if len(commits) > 1:
        lines += [f"    {_commit(c)}" for c in commits[:20]]
        lines += [f"    and {len(commits) - 20} more"] if len(commits) > 20 else []
    lines += [f"  {result.metric.name:12} {_change(result)}", f"  confidence   {_confidence(result)}"]
    if len(result.credible) > len(commits):
        lines.append(f"  {CREDIBLE:.0%} within  " + ", ".join(c[:10] for c in result.credible))
    lines += [f"  trace        {sentence}" for sentence in result.trace]
    lines += [f"  skipped      {_commit(history.commit(c))}: {why}" for c, why in result.skipped.items()]
    logged = result.measurements > result.fresh
    lines.append(
        f"  measured     {result.measurements} times"
        + (f", {max(0, result.measurements - result.fresh)} of them out of the log" if logged else "")
        + f"; {result.seconds:.0f} s"
    )
    if len(commits[-1].parents) > 1:
        lines.append("  a merge      it stands for all commits that it brought in")
    return [*lines, "", *next_commands(result, commits, history, command)]


def next_commands(result: BisectResult, commits: list[Commit], history: History, command: Command) -> list[str]:
    """Commands that look closer at the culprit."""
    first, last = commits[0], commits[-1]
    old, new = f"{first.sha[:10]}~1", last.sha[:10]
    git = shlex.join(["git", *(["-C", str(command.repo)] if command.repo else [])])
    metric = ["--metric", result.metric.name]
    lines = [f"{git} show {new}" if len(commits) == 1 else f"{git} log -p {old}..{new}"]
    lines.append(command.compare(old, new))
    lines.append(f"{git} worktree add /tmp/{new} {new} && cd /tmp/{new} && {command.run}")
    if len(last.parents) > 1:
        good, bad = f"$(git merge-base {new}^1 {new}^2)", f"{new}^2"
        lines.append(command.line("bisect") + f" {shlex.join(metric)} --good {good} --bad {bad}")
    if result.rest:
        rest = command.line("bisect", "--good", new, "--bad", history.bad[:10], *metric)
        lines.append(f"{rest}  # the rest: {result.rest}")
    return lines


def _heading(result: BisectResult, commits: list[Commit]) -> str:
    if not result.certain:
        return "not certain yet, " + (f"most likely: {_commit(commits[0])}" if len(commits) == 1 else "one of:")
    if len(commits) == 1:
        return f"found: {_commit(commits[0])}"
    return f"found: one of {len(commits)} commits, indistinguishable since some cannot be measured:"


def _commit(commit: Commit) -> str:
    return f"{commit.sha[:10]} {commit.date} {commit.subject}"


def _change(result: BisectResult) -> str:
    old, new, unit = result.old, result.new, result.metric.unit
    if result.metric.source == "verdict":
        return " -> ".join("passed" if value else "not correct" for value in (old, new))
    if result.interval is None:
        share = f", {(new - old) / old:+.1%}" if old else ""
        return f"{old:g} -> {new:g} {unit} ({new - old:+g}{share})"
    low, high = result.interval
    return f"{old:.4g} -> {new:.4g} {unit} ({new / old - 1:+.2%}; {CREDIBLE:.0%} interval {low:+.2%} to {high:+.2%})"


def _confidence(result: BisectResult) -> str:
    if not result.metric.exact:
        return f"{result.probability:.2%}"
    if not result.certain:
        return "none: the budget ended the search"
    return "exact: every value on the way was counted, not timed"
