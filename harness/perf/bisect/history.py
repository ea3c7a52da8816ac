"""The history that is searched: its commits in words, its first-parent chain, and `git bisect run` over it.

A bisection's state belongs to a worktree. Ours gets an empty worktree of its own, so that neither the user's checkout
nor a bisection that they are in the middle of notices anything.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.base.errors import UserError
from harness.base.processes import environment
from harness.perf.bisect.git_step import ABORT
from harness.perf.versions.checkout import WORKTREE, Checkouts

GOOD, BAD, SKIP = 0, 1, 125  #: answers that `git bisect run` understands; ABORT ends it


@dataclass(frozen=True)
class Commit:
    """How a commit is shown."""

    sha: str
    subject: str
    date: str  #: of the author, YYYY-MM-DD
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What git says. commits: the culprit, or all that it may be, oldest first; complete unless it was aborted."""

    commits: list[str]
    complete: bool


class History:
    """The commits between a good and a bad one, given as full names. Wrong unless good is an ancestor of bad."""

    def __init__(self, checkouts: Checkouts, good: str, bad: str) -> None:
        for option, commit in (("--good", good), ("--bad", bad)):
            if commit == WORKTREE:
                raise UserError(
                    f"{option} {WORKTREE}: a commit is needed; commit the changes, or use moe-harness compare"
                )
        self.checkouts, self.good, self.bad = checkouts, good, bad
        if good == bad:
            raise UserError(f"--good and --bad are the same commit, {good[:10]}")
        if not self._ancestor(good, bad):
            hint = "; the other way round it would be" if self._ancestor(bad, good) else ""
            raise UserError(f"--good {good[:10]} is no ancestor of --bad {bad[:10]}{hint}")

    def _git(self, *arguments: str) -> str:
        done = self.checkouts.git(*arguments)
        if done.returncode:
            raise RuntimeError(f"git {shlex.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def _ancestor(self, old: str, new: str) -> bool:
        return self.checkouts.git("merge-base", "--is-ancestor", old, new).returncode == 0

    @property
    def common_directory(self) -> Path:
        """The git directory that all worktrees of the repository share."""
        found = Path(self._git("rev-parse", "--git-common-dir").strip())
        return found if found.is_absolute() else self.checkouts.repo / found

    def commit(self, sha: str) -> Commit:
        """What is shown of a commit."""
        subject, date, parents = self._git("show", "-s", "--format=%s%n%as%n%P", sha).split("\n")[:3]
        return Commit(sha, subject, date, tuple(parents.split()))

    def between(self) -> int:
        """How many commits may be the culprit."""
        return int(self._git("rev-list", "--count", f"{self.good}..{self.bad}"))

    def chain(self) -> list[str]:
        """The good commit and, oldest first, all that followed on the bad one's first-parent line: a merge is one
        commit, which stands for all that it brought in."""
        listed = self._git("rev-list", "--reverse", "--first-parent", f"{self.good}..{self.bad}").split()
        return [self.good, *listed]

    def bisect_run(self, judge: Callable[[str], int]) -> Found:
        """`git bisect run`, judge(commit) answering GOOD, BAD, SKIP or ABORT for each commit that git chooses."""
        with tempfile.TemporaryDirectory(prefix="moe-harness-bisect-") as temporary:
            tree = Path(temporary) / "empty"
            hooks = ("-c", f"core.hooksPath={os.devnull}")
            self._git(*hooks, "worktree", "add", "--detach", "--no-checkout", str(tree), self.bad)
            try:
                return self._bisect_in(tree, judge)
            finally:
                self._git("worktree", "remove", "--force", "--force", str(tree))

    def _bisect_in(self, tree: Path, judge: Callable[[str], int]) -> Found:
        self._git("-C", str(tree), "bisect", "start", "--no-checkout", self.bad, self.good)
        if found := self._found(tree):  # a single candidate: nothing is left to ask
            return found
        ours, theirs = socket.socketpair()
        step = [sys.executable, "-m", "harness.perf.bisect.git_step", str(theirs.fileno())]
        variables = {n: v for n, v in environment().items() if not n.startswith("GIT_")} | {"LC_ALL": "C"}
        with ours, (tree / "output").open("w+") as output:
            with theirs:
                process = subprocess.Popen(
                    ["git", "bisect", "run", *step], cwd=tree, env=variables, pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
            aborted = False
            try:
                with ours.makefile("r") as questions:
                    for line in questions:
                        answer = judge(line.strip())
                        aborted = aborted or answer == ABORT
                        ours.sendall(f"{answer}\n".encode())
            except BaseException:
                process.kill()
                raise
            finally:
                process.wait()
            if found := self._found(tree):
                return found
            if not aborted:
                output.seek(0)
                raise RuntimeError(f"git bisect run ended with {process.returncode}:\n{output.read()}")
        known_good = self._git("-C", str(tree), "for-each-ref", "--format=^%(objectname)", "refs/bisect/good-*").split()
        left = self._git("-C", str(tree), "rev-list", "--reverse", "--topo-order", "refs/bisect/bad", *known_good)
        return Found(left.split(), False)

    def _found(self, tree: Path) -> Found | None:
        log = self._git("-C", str(tree), "bisect", "log")
        if culprit := re.findall(r"^# first bad commit: \[(\w+)\]", log, re.MULTILINE):
            return Found(culprit, True)
        if possible := set(re.findall(r"^# possible first bad commit: \[(\w+)\]", log, re.MULTILINE)):
            order = self._git("rev-list", "--reverse", "--topo-order", f"{self.good}..{self.bad}").split()
            return Found([sha for sha in order if sha in possible], True)
        return None
