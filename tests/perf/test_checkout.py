"""perf/versions/checkout.py and worker.py: commits of a small repository, made here, each in a process of its own."""

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.base.errors import UserError
from harness.device import Device
from harness.perf.timing import clock
from harness.perf.versions import worker
from harness.perf.versions.checkout import CannotBuild, Checkouts, WorkerError, ended_by_sigterm, short
from harness.results.verdict import Verdict

CASE = "t4-h64-i64-e8-k2-fp32-random"
MOE = '''
"""A plain layer, and some that misbehave."""
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F


class Plain:
    name, devices = "plain", {"cpu"}

    def prepare(self, problem, layer):
        def call(x, weights, ids):
            out = torch.zeros_like(x)
            for expert in range(problem.num_experts):
                token, slot = (ids == expert).nonzero(as_tuple=True)
                gate, up = (x[token] @ layer.w13[expert].T).chunk(2, 1)
                y = (F.silu(gate) * up) @ layer.w2[expert].T
                out.index_add_(0, token, y * weights[token, slot, None].to(x.dtype))
            return self.done(x, out)

        return call

    def done(self, x, out):
        return out


class Talks(Plain):
    def done(self, x, out):
        print("a word")
        os.write(1, b"and another\\n")
        assert sys.stdin.read() == ""
        return out


class Wrong(Plain):
    def done(self, x, out):
        return 2 * out


class Raises(Plain):
    def done(self, x, out):
        raise RuntimeError("no such kernel\\nand much more")


class Dies(Plain):
    def done(self, x, out):
        os.write(2, b"last words\\n")
        os.kill(os.getpid(), 11)


class Hangs(Plain):
    def done(self, x, out):
        while True:
            pass


bare = SimpleNamespace(name="bare", devices={"cpu"}, prepare=Plain().prepare)
'''


def git(directory: Path, *words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(directory: Path, message: str, files: dict[str, str] | None = None) -> str:
    """A commit with these files; its full name."""
    for name, text in (files or {}).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    git(directory, "add", "-A")
    git(directory, "commit", "--allow-empty", "-m", message)
    return git(directory, "rev-parse", "HEAD")


def repository(directory: Path) -> Path:
    """A user's repository with kernels of its own: one commit, tagged first."""
    directory.mkdir()
    git(directory, "init", "-q", "-b", "main")
    (directory / ".gitignore").write_text("ignored/\n")
    commit(directory, "first", {"own/__init__.py": "", "own/moe.py": MOE})
    git(directory, "tag", "first")
    return directory


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return repository(tmp_path_factory.mktemp("repo") / "theirs")


def worktrees(repo: Path) -> list[str]:
    return git(repo, "worktree", "list").splitlines()


def error_of(answer, *arguments, **fields) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        answer(*arguments, **fields)
    return caught.value


# -- checkouts --------------------------------------------------------------------------------------------------------
def test_a_commit_is_named_in_any_of_gits_ways(repo):
    head = git(repo, "rev-parse", "HEAD")
    with Checkouts(repo / "own") as checkouts:
        assert {checkouts.resolve(name) for name in ("first", "main", "HEAD", head[:8])} == {head}
        assert checkouts.resolve("worktree") == checkouts.resolve(".") == "worktree"
        for strange in ("nix", "--all", ""):
            with pytest.raises(UserError, match=f"^{strange or repr(strange)}: no commit, tag or branch of .*theirs"):
                checkouts.resolve(strange)
        assert len(short(head)) == len(short("worktree"))


def test_without_a_repository(tmp_path):
    with pytest.raises(UserError, match="--repo .*nix: no such directory"):
        Checkouts(tmp_path / "nix")
    with pytest.raises(UserError, match="not in a git repository"):
        Checkouts(tmp_path)


def test_nothing_stays_behind(repo):
    with pytest.raises(KeyboardInterrupt), Checkouts(repo) as checkouts:
        place = checkouts.temporary
        assert (checkouts.at(checkouts.resolve("first")) / "own" / "moe.py").read_text() == MOE
        assert (checkouts.frozen / "harness" / "backend.py").is_file() and not (checkouts.frozen / "kernels").exists()
        assert len(worktrees(repo)) == 2
        raise KeyboardInterrupt
    assert not place.exists() and len(worktrees(repo)) == 1
    with pytest.raises(RuntimeError, match="context manager"):
        checkouts.at(checkouts.resolve("first"))


def test_sigterm_unwinds_the_stack():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_only_so_many_worktrees_are_kept(repo):
    others = [commit(repo, "other") for _ in range(2)]
    with Checkouts(repo, keep=2) as checkouts:
        first = checkouts.at(checkouts.resolve("first"))
        second, third = map(checkouts.at, others)
        assert not first.exists() and second.exists() and third.exists()
        assert checkouts.at(others[0]) == second  # now the one that was used last
        assert checkouts.at(checkouts.resolve("first")) == first and not third.exists()


def test_the_working_tree_is_copied_as_it_is_now(repo, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    (repo / "own" / "new.py").write_text("NEW = 1\n")
    (repo / "ignored").mkdir()
    (repo / "ignored" / "large").write_text("")
    (repo / "link").symlink_to("own/new.py")
    with Checkouts(repo, build="cp own/new.py built.py") as checkouts:
        copy = checkouts.at("worktree")
        (repo / "own" / "new.py").write_text("NEW = 2\n")
        assert (copy / "own" / "new.py").read_text() == (copy / "built.py").read_text() == "NEW = 1\n"
        assert not (copy / "ignored").exists() and os.readlink(copy / "link") == "own/new.py"
        assert checkouts.at("worktree") == copy
    for path in (repo / "own" / "new.py", repo / "link"):
        path.unlink()


def test_a_commit_that_does_not_build(repo):
    first = git(repo, "rev-parse", "first")
    with Checkouts(repo, build="echo compiling; echo syntax error >&2; exit 3") as checkouts:
        with pytest.raises(CannotBuild, match="ended with exit code 3\n  compiling\n  syntax error") as caught:
            checkouts.at(first)
        assert caught.value.commit == first and len(worktrees(repo)) == 1


# -- workers ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def desk(repo):
    """A worker at the first commit; a new one after it died."""
    with Checkouts(repo) as checkouts:
        first, found = checkouts.resolve("first"), []

        def ask(question, backend="", **fields):
            if not found or not found[-1].alive:
                found.append(checkouts.worker(first, "cpu"))
                assert found[-1].ask("hello")["environment"]["device"] == "cpu"
            return found[-1].ask(
                question, **({"case": CASE, "backend": f"own.moe:{backend}"} if backend else {}), **fields
            )

        yield ask


def test_a_worker_answers(desk):
    assert desk("verdict", "Plain")["status"] == desk("verdict", "bare")["status"] == "passed"
    assert desk("structure", "Plain", targets=[])["metrics"]["operators"] > 8
    answer = desk("time", "Plain", metric="device_us", samples=3)
    assert len(answer["samples"]) == 3 and min(answer["samples"]) > 0
    assert desk("time", "Plain", metric="device_us", samples=0)["samples"] == []


def test_the_output_of_a_kernel_is_no_answer(desk):
    assert desk("verdict", "Talks")["status"] == "passed"


def test_no_speed_and_no_structure_without_correctness(desk):
    assert desk("verdict", "Wrong")["status"] == "failed"
    for question, more in (("time", {"metric": "device_us", "samples": 1}), ("structure", {"targets": []})):
        error = error_of(desk, question, "Wrong", **more)
        assert error.kind == "incorrect" and error.message.startswith("failed: ")
    error = error_of(desk, "time", "Raises", metric="device_us", samples=1)
    assert error.kind == "crashed" and "no such kernel" in error.message


def test_a_backend_that_a_version_lacks_is_unsupported(desk):
    assert error_of(desk, "verdict", "Nix").kind == "unsupported"
    assert error_of(desk, "verdict", case=CASE, backend_="x").kind == "crashed"  # an unknown request
    error = error_of(desk, "time", "Plain", metric="host_us", samples=1)
    assert error.kind == "unsupported" and error.message.startswith("device: ")


def test_a_worker_that_dies_says_how(desk):
    error = error_of(desk, "verdict", "Dies")
    assert error.kind == "died" and error.message.startswith("ended by SIGSEGV; its last lines:\n")
    assert "last words" in error.message
    error = error_of(desk, "verdict", "Hangs", limit_s=2)
    assert error.kind == "died" and error.message.startswith("no answer in 2 s")
    assert desk("verdict", "Plain")["status"] == "passed"  # the next one


def test_code_from_elsewhere_is_refused(repo, tmp_path, monkeypatch):
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "moe.py").write_text(MOE)
    broken = commit(repo, "broken", {"own/broken.py": "import torch.nix\n", "own/typo.py": "own.nix\n"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # as an editable installation would
    with Checkouts(repo) as checkouts:
        found = checkouts.worker(broken, "cpu")
        error = error_of(found.ask, "verdict", case=CASE, backend="stray.moe:Plain")
        assert error.kind == "import" and str(stray / "moe.py") in error.message
        assert str(checkouts.at(broken)) in error.message
        for module in ("broken", "typo"):
            error = error_of(found.ask, "verdict", case=CASE, backend=f"own.{module}:Plain")
            assert error.kind == "import" and f"own.{module}" in error.message
        # A backend of this repository, from an installation perhaps, is no part of theirs.
        error = error_of(found.ask, "verdict", case=CASE, backend="torch-grouped-mm")
        assert error.kind in ("import", "unsupported")


def test_few_stopwatches_are_kept(monkeypatch, tmp_path):
    made = []

    class Stopwatch:
        method = "none"

        def __init__(self, case, backend, device):
            made.append(str(case))

        def sample(self, metric, count):
            return [1.0] * count

    monkeypatch.setattr(clock, "Stopwatch", Stopwatch)
    desk = worker.Server(Device("cpu"), tmp_path)
    monkeypatch.setattr(desk, "_backend", lambda spec: SimpleNamespace(name=spec))
    monkeypatch.setattr(desk, "_verdict", lambda case, spec: Verdict(case, spec, "cpu", "passed"))

    def ask(case):
        assert desk.on_time(case, "b", "device_us", 2)["samples"] == [1.0, 1.0]
        return len(made)

    cases = [CASE.replace("t4", f"t{n}") for n in range(1, 6)]
    assert [ask(case) for case in cases] == [1, 2, 3, 4, 5]
    assert ask(cases[1]) == 5 and ask(cases[0]) == 6  # the first had to go
    monkeypatch.setattr(worker, "KEPT_BYTES", 0)
    assert ask(cases[2]) == 7 and list(desk._stopwatches) == [(cases[2], "b")]
