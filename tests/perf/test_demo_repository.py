"""Every story of the demonstration repository is found by `moe-harness bisect`: real git, real workers, no clock."""

import shutil
import subprocess
import sys

import pytest

import tests.support.interpreted  # noqa: F401  the demonstration's kernels are interpreted
from harness import cli
from harness.base.processes import ROOT, environment
from harness.commands import bisect
from harness.perf.bisect.measure import WorkerPool
from harness.perf.versions.checkout import Checkouts
from tests.support import demo_repository

if not shutil.which("git"):
    pytest.skip("there is no git here", allow_module_level=True)

SMALL, BATCH = "t1-h64-i64-e8-k2-bf16", "t4-h64-i64-e8-k2-bf16"
FUSED = "kernels.demo:Fused"

#: story -> (case, backend, metric, text of the differences between the traces)
STORIES = {
    "low_latency": (f"{SMALL}-exact", FUSED, "launches", "_align_count_kernel is launched, and was not before"),
    "permute": (f"{BATCH}-exact", "kernels.demo:Permuted", "allocations", "9 more tensors are allocated"),
    "instance": (
        f"{BATCH}-kn-exact",
        "kernels.cached:TritonCachedMoE",
        "python_calls",
        "33 more Python functions are called: kernels.cached.",
    ),
    "on_input": ("t4-h64-i64-e8-k1-bf16-win-exact", FUSED, "operators", "mul.Tensor (+1)"),
    "transpose": (f"{BATCH}-kn-exact", FUSED, "allocated_bytes", "clone.default bf16 (8, 128, 64)"),
    "config": (f"{SMALL}-exact", FUSED, "shared_bytes", "_moe_gemm_kernel: BLOCK_N 64 -> 128"),
    "low_latency as a broken promise": (
        f"{SMALL}-exact-path.launches",
        "triton",
        "correct",
        "a kernel named *align* was",
    ),
}


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """(repository, story -> commit)"""
    repository = tmp_path_factory.mktemp("demonstration")
    return repository, demo_repository.build(repository)


@pytest.fixture(scope="module")
def bench(demonstration):
    """Workers that the stories share: most of the time of a bisection is the start of its workers."""
    with Checkouts(demonstration[0], keep=18) as checkouts:
        yield WorkerPool(checkouts, "cpu", keep=18)


def arguments(commits, case, backend, metric, bad="bad"):
    line = ["bisect", "--good", commits["good"], "--bad", commits[bad], case, "--backend", backend, "--metric", metric]
    return cli._parser().parse_args(line)


def test_every_story_is_found_by_what_is_counted(demonstration, bench, capsys):
    # One test: pytest-xdist would spread several over processes that share no workers.
    commits, missed, skips = demonstration[1], {}, False
    for story, (case, backend, metric, says) in STORIES.items():
        # Of the 16 commits up to "instance" the one in the middle is "broken", so that every bisection starts there.
        # Compiling takes longer than counting: "config" is searched among fewer commits.
        bad = "on_input" if metric == "shared_bytes" else "instance"
        code = bisect.search(arguments(commits, case, backend, metric, bad), bench)
        out = capsys.readouterr().out
        culprit = commits[story.partition(" ")[0]]
        answer = out.partition(f"\nfound: {culprit[:10]} ")[2]
        if code or says not in answer:
            missed[story] = out
        skips = skips or f"  {commits['broken'][:10]} skipped  " in out
    assert missed == {}, "\n\n".join(f"{story}:\n{out}" for story, out in missed.items())
    assert skips, "no bisection came to the commit that cannot be imported"


def test_the_command_refuses_an_end_that_does_not_import_and_leaves_the_repository_as_it_was(demonstration):
    repository, commits = demonstration
    before = state(repository)
    command = [sys.executable, "-m", "harness", "bisect", "--repo", str(repository), f"{BATCH}-exact"]
    command += ["--good", f"{commits['broken']}~1", "--bad", commits["broken"], "--backend", FUSED]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "refused: the bad end" in done.stdout and "SyntaxError" in done.stdout
    assert state(repository) == before


def test_an_edit_whose_text_is_gone_fails_loudly(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\ntwo\n")
    demo_repository.apply(tmp_path, demo_repository.Edit("", "a.py", "one", "three"))
    assert (tmp_path / "a.py").read_text() == "three\ntwo\ntwo\n"
    for old, count in (("one", 0), ("two", 2), ("", 0)):
        with pytest.raises(ValueError, match=f"{old!r} occurs {count} times in a.py, not once"):
            demo_repository.apply(tmp_path, demo_repository.Edit("", "a.py", old, "x"))


def state(repository):
    return [
        demo_repository.git(repository, *command)
        for command in (["status", "--porcelain"], ["worktree", "list"], ["for-each-ref"], ["rev-parse", "HEAD"])
    ]
