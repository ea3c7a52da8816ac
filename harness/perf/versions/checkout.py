"""Other versions of the kernels, each in a directory and a process of its own, measured by one frozen copy of this.

    repository --git worktree--> w<commit>/  \\
    this installation --copied--> frozen/     > PYTHONPATH of a Worker (perf/versions/worker.py)

A change of harness/, reference/ or cases/, while a comparison runs or between the compared commits, does not change the
measurement. All files are in one temporary directory, which is removed when the context ends.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.base.errors import UserError, bare
from harness.base.processes import ROOT

LONGEST = 1000  #: characters of a ref
WORKTREE = "worktree"  #: the word for the working tree with its uncommitted changes
FROZEN = ("harness", "reference", "cases")  #: the packages that measure
KINDS = ("unsupported", "incorrect", "crashed", "import", "died")
TAIL = 20  #: lines of a log that an error shows
PATIENCE = 600.0  #: seconds until a worker must have answered


class CannotBuild(Exception):
    """A commit that cannot be checked out, or whose --build command fails."""

    def __init__(self, commit: str, reason: str, log: str) -> None:
        super().__init__(f"{short(commit)}: {reason}" + (f"\n{log}" if log else ""))
        self.commit, self.reason, self.log = commit, reason, log


class WorkerError(Exception):
    """A request without a result. `kind`:

    unsupported  the commit lacks the backend, the backend does not support the case, or it cannot be timed here
    incorrect    the case fails, so that it is not measured
    crashed      the backend raised
    import       the commit's code cannot be imported, or code from elsewhere was imported
    died         the process ended, or did not answer in time; the worker cannot be used any more
    """

    def __init__(self, kind: str, message: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: one of {', '.join(KINDS)}")
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


def short(commit: str) -> str:
    """A short name of a commit, always of one length: it is part of paths, whose length shifts a process's memory."""
    return commit[:10].ljust(10, "-")


def first_line(text: str) -> str:
    """The first line of a text, stripped; "" for an empty text."""
    return (text.strip().splitlines() or [""])[0]


class Checkouts:
    """Worktrees of one repository, and workers in them; a context manager.

    repo: a directory in the repository. build: a shell command that is run once in each worktree. keep: the number of
    worktrees that are kept; those of living workers always are. Raises UserError without git or a repository.
    """

    def __init__(self, repo: Path = ROOT, build: str | None = None, keep: int = 8) -> None:
        self.build, self.keep = build, keep
        if not shutil.which("git"):
            raise UserError("there is no git here, and commits come from it")
        done = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"], cwd=_directory(repo), env=_git_environment(),
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"--repo {repo}: not in a git repository ({done.stderr.strip()})")
        self.repo = Path(done.stdout.strip())
        self._paths: dict[str, Path] = {}  #: by commit, the one used last at the end
        self._workers: list[Worker] = []
        self._temporary: Path | None = None

    def __enter__(self) -> Checkouts:
        self._temporary = Path(tempfile.mkdtemp(prefix="moe-harness-"))
        try:
            for package in FROZEN:
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / package, self.frozen / package, ignore=ignored)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, remove every worktree and the temporary directory."""
        for worker in self._workers:
            worker.dismiss()  # all at once; close() waits for one after the other
        for worker in self._workers:
            worker.close()
        for commit in list(self._paths):
            self._remove(commit)
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    @property
    def temporary(self) -> Path:
        if self._temporary is None:
            raise RuntimeError("Checkouts is a context manager: nothing is checked out outside of `with`")
        return self._temporary

    @property
    def frozen(self) -> Path:
        return self.temporary / "frozen"

    # -- commits ------------------------------------------------------------------------------------------------------
    def resolve(self, ref: str) -> str:
        """The full name of a commit; "worktree" for "worktree" and ".". Raises UserError if there is none."""
        if ref in (WORKTREE, "."):
            return WORKTREE
        may_be = ref.isprintable() and len(ref) <= LONGEST and not ref.startswith("-")
        done = self.git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}") if may_be else None
        if done is None or done.returncode:
            raise UserError(f"{bare(ref)}: no commit, tag or branch of {self.repo}, nor the word {WORKTREE!r}")
        return done.stdout.strip()

    def git(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run git in the repository. The caller checks the return code."""
        return subprocess.run(
            ["git", *arguments], cwd=self.repo, env=_git_environment(), capture_output=True, text=True
        )

    def at(self, commit: str) -> Path:
        """The directory of a commit (a name from `resolve`), built. Raises CannotBuild."""
        path = self._paths.pop(commit, None)
        if path is None:
            path = self.temporary / f"w{short(commit)}"
            self._make(commit, path)
        self._paths[commit] = path
        busy = {worker.worktree for worker in self._workers if worker.alive}
        idle = [c for c, p in self._paths.items() if p not in busy and c != commit]
        for old in idle[: max(0, len(self._paths) - self.keep)]:
            self._remove(old)
        return path

    def worker(self, commit: str, device: str) -> Worker:
        """Start a process for a commit. It is ready when it first answers. Raises CannotBuild."""
        path = self.at(commit)
        log = self.temporary / f"worker-{len(self._workers):04}.log"
        self._workers.append(Worker(self.frozen, path, device, log))
        return self._workers[-1]

    def _make(self, commit: str, path: Path) -> None:
        if commit == WORKTREE:
            _copy_working_tree(self.repo, path)
        else:
            done = self.git("worktree", "add", "--detach", "--force", str(path), commit)
            if done.returncode:
                raise CannotBuild(commit, "git worktree add failed", _tail(done.stderr))
        if not self.build:
            return
        done = subprocess.run(
            self.build, shell=True, cwd=path, env=_git_environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode:
            self._paths[commit] = path
            self._remove(commit)
            reason = f"--build {self.build!r} ended with exit code {done.returncode}"
            raise CannotBuild(commit, reason, _tail(done.stdout))

    def _remove(self, commit: str) -> None:
        path = self._paths.pop(commit)
        removed = commit != WORKTREE and not self.git("worktree", "remove", "--force", "--force", str(path)).returncode
        if removed:
            return
        shutil.rmtree(path, ignore_errors=True)
        if commit != WORKTREE:  # prune drops every worktree whose directory is missing, so it is the last resort
            self.git("worktree", "prune")


class Worker:
    """A process that measures one checkout. Not thread-safe."""

    def __init__(self, frozen: Path, worktree: Path, device: str, log: Path) -> None:
        self.worktree, self._log = worktree, log
        paths = [frozen, worktree, *([worktree / "src"] if (worktree / "src").is_dir() else [])]
        environment = _git_environment() | {
            "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
        }
        command = [
            sys.executable,
            "-m",
            "harness.perf.versions.worker",
            "--device",
            device,
            "--worktree",
            str(worktree),
        ]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, cwd=frozen, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        self._received = b""

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, request: str, *, limit_s: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """The answer to "hello", "verdict", "structure" or "time" (perf/versions/worker.py). Raises WorkerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": request, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        answer = json.loads(self._line(limit_s))
        if "error" in answer:
            if answer["error"] == "died":
                self.close()
            raise WorkerError(answer["error"], answer["message"])
        return answer

    def dismiss(self) -> None:
        """Close the input of the process, which ends it, without waiting."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """End the process and its children."""
        assert self._process.stdout is not None
        self.dismiss()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._kill()
        self._process.stdout.close()

    def _line(self, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + limit_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._kill()
                raise WorkerError("died", f"no answer in {limit_s:g} s{self._last_words()}")
            more = os.read(descriptor, 2**16)
            if not more:
                raise self._died()
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _died(self) -> WorkerError:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._kill()
            return WorkerError("died", f"it closed its output{self._last_words()}")
        how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        return WorkerError("died", how + self._last_words())

    def _last_words(self) -> str:
        tail = _tail(self._log.read_text(errors="replace"))
        return f"; its last lines:\n{tail}" if tail else ""

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # no process of the group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C, so that worktrees are removed. CI systems send it to cancel a job."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _directory(repo: Path) -> Path:
    if not repo.is_dir():
        raise UserError(f"--repo {repo}: no such directory")
    return repo


def _git_environment() -> dict[str, str]:
    """The environment without GIT_*: a hook sets them, and they would direct git to the repository of the hook."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


def _copy_working_tree(repo: Path, path: Path) -> None:
    """Copy the tracked files as they are now, and the untracked files that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=repo, env=_git_environment(),
        capture_output=True, check=True,
    )  # fmt: skip
    path.mkdir()
    for name in map(os.fsdecode, filter(None, listed.stdout.split(b"\0"))):
        source = repo / name
        if source.is_symlink() or source.is_file():  # a tracked file may be deleted, a submodule is a directory
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, path / name, follow_symlinks=False)


def _tail(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-TAIL:])
