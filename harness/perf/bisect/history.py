"""The commits between a good and a bad one: their texts, their first-parent chain, and the bisection of all of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.base.errors import UserError
from harness.perf.versions.checkout import WORKTREE, Checkouts

#: What `judge` of History.bisect returns for a commit. SKIP: it cannot be measured. STOP: end the bisection here.
GOOD, BAD, SKIP, STOP = "good", "bad", "skip", "stop"


@dataclass(frozen=True)
class Commit:
    """A commit as it is printed."""

    sha: str
    subject: str
    date: str  #: author date, YYYY-MM-DD
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Culprits:
    """The culprit, or all commits that may be it, oldest first. complete: no commit is left that could be tested."""

    commits: list[str]
    complete: bool


class History:
    """The commits between a good and a bad one, both given as full names.

    Raises UserError unless good is an ancestor of bad.
    """

    def __init__(self, checkouts: Checkouts, good: str, bad: str) -> None:
        for option, commit in (("--good", good), ("--bad", bad)):
            if commit == WORKTREE:
                raise UserError(
                    f"{option} {WORKTREE}: a commit is needed; commit the changes, or use moe-harness compare"
                )
        self.checkouts, self.good, self.bad = checkouts, good, bad
        if good == bad:
            raise UserError(f"--good and --bad are the same commit, {good[:10]}")
        if not self._is_ancestor(good, bad):
            hint = "; the other way round it would be" if self._is_ancestor(bad, good) else ""
            raise UserError(f"--good {good[:10]} is no ancestor of --bad {bad[:10]}{hint}")

    def _git(self, *arguments: str) -> str:
        done = self.checkouts.git(*arguments)
        if done.returncode:
            raise RuntimeError(f"git {shlex.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def _is_ancestor(self, old: str, new: str) -> bool:
        return self.checkouts.git("merge-base", "--is-ancestor", old, new).returncode == 0

    @property
    def common_directory(self) -> Path:
        """The git directory that all worktrees of the repository share."""
        path = Path(self._git("rev-parse", "--git-common-dir").strip())
        return path if path.is_absolute() else self.checkouts.repo / path

    def commit(self, sha: str) -> Commit:
        """The commit of this full name."""
        subject, date, parents = self._git("show", "-s", "--format=%s%n%as%n%P", sha).split("\n")[:3]
        return Commit(sha, subject, date, tuple(parents.split()))

    def between(self) -> int:
        """The number of commits that may be the culprit."""
        return int(self._git("rev-list", "--count", f"{self.good}..{self.bad}"))

    def chain(self) -> list[str]:
        """The good commit and the first-parent line from it to the bad one, oldest first.

        A merge is one commit of the chain. It stands for all commits that it brought in.
        """
        line = self._git("rev-list", "--reverse", "--first-parent", f"{self.good}..{self.bad}").split()
        return [self.good, *line]

    def bisect(self, judge: Callable[[str], str]) -> Culprits:
        """Bisect over all commits, also those of merged branches. judge(commit) returns GOOD, BAD, SKIP or STOP.

        `git rev-list --bisect-all` lists the candidates, those first that split the rest into the most equal halves.
        The first of them that was not judged before is judged next.
        """
        good, bad, judged = [self.good], self.bad, {self.bad}
        while True:
            candidates = [bad, *(f"^{commit}" for commit in good)]
            best_first = re.findall(r"^\w+", self._git("rev-list", "--bisect-all", *candidates), re.MULTILINE)
            commit = next((name for name in best_first if name not in judged), None)
            answer = judge(commit) if commit else STOP
            if commit is None or answer == STOP:
                left = self._git("rev-list", "--reverse", "--topo-order", *candidates).split()
                return Culprits(left, complete=commit is None)
            judged.add(commit)
            if answer == GOOD:
                good.append(commit)
            elif answer == BAD:
                bad = commit
