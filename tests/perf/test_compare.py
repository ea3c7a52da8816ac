"""perf/compare/compare.py and the command: made-up versions, then commits of a small repository."""

import json
import math
import time

import numpy as np
import pytest

from harness import cli
from harness.commands import compare as command
from harness.perf.compare import compare, statistics
from harness.perf.compare.compare import Comparison, ComparisonRequest, Trial
from harness.perf.compare.report import markdown_lines, table_lines, total_lines
from harness.perf.compare.statistics import Estimate
from harness.perf.versions.checkout import Checkouts, WorkerError
from harness.results.verdict import CORRECT
from tests.perf.test_checkout import CASE, MOE, commit, git, repository

COUNTS = {"launches": 4, "allocations": 3, "tensor_core": 8}
REQUEST = ComparisonRequest(CASE, "mine", ("correct", "launches", "allocations"))


class Version:
    """A side that is made up: its answer to each request: a value, an error to raise, or a function of the fields."""

    def __init__(self, **answers):
        self.answers, self.processes = answers, 0

    def start(self):
        self.processes += 1

    def ready(self):
        pass

    def close(self):
        pass

    def ask(self, request, **fields):
        answer = self.answers[request]
        answer = answer(fields) if callable(answer) else answer
        if isinstance(answer, WorkerError):
            raise answer
        return answer


def version(status="passed", reason="", **counts):
    if status in ("died", "import"):
        return Version(verdict=WorkerError(status, f"{reason}\nand more"))
    return Version(verdict={"status": status, "reason": reason}, structure={"metrics": {**COUNTS, **counts}})


# -- what is exact ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "base, head, outcome, code",
    [
        ("passed", "passed", "same", 0),
        ("passed", "mistrusted", "same", 0),
        ("passed", "failed", "regressed", 1),
        ("passed", "died", "regressed", 1),
        ("passed", "import", "regressed", 1),
        ("passed", "unsupported", "regressed", 1),
        ("failed", "passed", "improved", 0),
        ("unsupported", "passed", "not compared", 3),  # there is nothing else that was compared
        ("unsupported", "crashed", "regressed", 1),
        ("unsupported", "unsupported", "not compared", 3),
        ("failed", "crashed", "not compared", 3),
    ],
)
def test_correctness_comes_first(base, head, outcome, code):
    rows = compare.exact(
        version(base, "why base"), version(head, "why head"), ComparisonRequest(CASE, "mine", ("correct",))
    )
    assert [(r.metric, r.outcome, r.base, r.head) for r in rows] == [("correct", outcome, base, head)]
    remarks = [f"{s} at {at}: why {at.lower()}" for s, at in ((base, "BASE"), (head, "HEAD")) if s not in CORRECT]
    assert rows[0].remarks == remarks
    assert compare.exit_code(rows) == code


def test_a_case_that_is_new_does_not_spoil_the_rest():
    same = compare.exact(version(), version(), REQUEST)
    new = compare.exact(version("unsupported"), version(), REQUEST)
    both_wrong = compare.exact(version("failed"), version("failed"), REQUEST)
    assert len(new) == len(both_wrong) == 1  # nothing is counted where nothing can be compared
    assert compare.exit_code(same) == compare.exit_code(same + new) == 0
    assert compare.exit_code(same + both_wrong) == 3


def test_any_number_that_is_worse_is_a_regression():
    request = ComparisonRequest(CASE, "mine", ("launches", "allocations", "tensor_core"))
    rows = compare.exact(version(), version(allocations=4, launches=3, tensor_core=7), request)
    assert {r.metric: r.outcome for r in rows} == {
        "correct": "same", "launches": "improved", "allocations": "regressed", "tensor_core": "regressed",
    }  # fmt: skip
    assert compare.exit_code(rows) == 1
    assert compare.exit_code(compare.exact(version(), version(allocations=2), request)) == 0


def test_numbers_that_one_side_lacks():
    request = ComparisonRequest(CASE, "mine", ("launches", "registers"))
    assert [r.outcome for r in compare.exact(version(), version(), request)] == ["same", "same", "not compared"]
    assert [r.outcome for r in compare.exact(version(registers=9), version(), request)][2] == "regressed"
    silent = version()
    silent.answers["structure"] = WorkerError("crashed", "no\nfurther")
    rows = compare.exact(version(), silent, request)
    assert [r.outcome for r in rows] == ["same", "regressed", "not compared"]
    assert rows[2].remarks == ["crashed at HEAD: no"]


def test_kernels_are_compiled_only_for_compiled_metrics():
    seen = []
    spy = version()
    spy.answers["structure"] = lambda fields: seen.append(fields["targets"]) or {"metrics": COUNTS}
    compare.exact(spy, version(), ComparisonRequest(CASE, "mine", ("launches",)))
    compare.exact(spy, version(), ComparisonRequest(CASE, "mine", ("tensor_core",)))
    assert seen == [(), compare.TARGETS]


# -- what is timed ----------------------------------------------------------------------------------------------------
def timed(microseconds, seed, apart=0.002, fails_from=math.inf, kind="incorrect"):
    """A version whose processes differ a little; from that process on it fails."""
    rng = np.random.default_rng(seed)
    offsets = rng.normal(0, apart, 40)

    def sample(fields):
        if side.processes >= fails_from:
            return WorkerError(kind, "off by one\nin detail")
        noise = rng.normal(0, 0.01, fields["samples"])
        return {"samples": list(microseconds * np.exp(noise + offsets[side.processes]))}

    side = Version(time=sample, verdict={"status": "passed", "reason": ""})
    return side


def trial(head, base=None, again=None, budget=100.0):
    found = Trial(ComparisonRequest(CASE, "mine", ("device_us",)), "device_us")
    sides = {"base": base or timed(100, 1), "again": again or timed(100, 2), "head": head}
    compare.measure([found], sides, time.monotonic() + budget, 0.01, lambda line: None)
    return found.row()


def test_a_slow_head_is_found_at_the_first_look():
    row = trial(timed(110, 3))
    assert row.outcome == "regressed" and row.estimate.generations == 3
    assert row.estimate.low < 0.1 < row.estimate.high and row.estimate.floor < 0.02
    assert row.base == pytest.approx(100, rel=0.02) and row.head == pytest.approx(110, rel=0.02)
    least, most = compare.SAMPLES
    assert 3 * compare.ROUNDS * 6 * least <= row.samples <= 3 * compare.ROUNDS * 6 * most
    assert 0.01 < row.detectable < 0.05 and row.seconds > 0


def test_the_same_and_a_fast_head():
    assert trial(timed(100, 3)).outcome == "same"
    assert trial(timed(90, 3)).outcome == "improved"


def test_undecided_buys_generations_until_the_budget_is_spent():
    sides = [timed(100, seed, apart=0.05) for seed in (1, 2, 3)]
    row = trial(*sides)
    assert row.outcome == "undecided" and row.estimate.generations == statistics.LOOKS[-1] == sides[0].processes
    row = trial(timed(100, 3, apart=0.05), timed(100, 1, apart=0.05), budget=-1.0)
    assert row.outcome == "undecided" and row.estimate.generations == statistics.LOOKS[0]


@pytest.mark.parametrize(
    "base_from, again_from, head_from, kind, outcome",
    [
        (99, 99, 1, "incorrect", "regressed"),
        (99, 99, 3, "died", "regressed"),
        (1, 1, 99, "incorrect", "not compared"),
        (99, 2, 99, "died", "not compared"),
        (1, 1, 1, "unsupported", "not compared"),
    ],
)
def test_a_side_that_cannot_be_timed_is_remarked(base_from, again_from, head_from, kind, outcome):
    row = trial(*(timed(100, s, fails_from=n, kind=kind) for s, n in ((3, head_from), (1, base_from), (2, again_from))))
    assert row.outcome == outcome and row.remarks
    assert all(f"{kind} at " in remark and remark.endswith(": off by one") for remark in row.remarks)
    assert compare.exit_code([row]) == {"regressed": 1}.get(outcome, 3)
    same = compare.exact(version(), version(), REQUEST)
    assert compare.exit_code([*same, row]) == (1 if outcome == "regressed" else 0 if kind == "unsupported" else 3)


def test_a_whole_comparison_is_in_the_order_of_its_requests(monkeypatch):
    def never(commit, device):
        raise AssertionError("no process was due")

    sides = [timed(100, seed, fails_from=0, kind="unsupported") for seed in (1, 2)]
    for side in sides:
        side.answers["structure"] = {"metrics": COUNTS}
        side.checkouts, side.commit, side.device = type("None", (), {"worker": never}), "c", "cpu"
    other = CASE.replace("t4", "t8")
    requests = [
        ComparisonRequest(CASE, "mine", ("device_us", "launches")),
        ComparisonRequest(other, "mine", ("device_us",)),
    ]
    progress = []
    rows = compare.compare(*sides, requests, 100, 0.01, progress.append)
    assert [(r.case, r.metric, r.outcome) for r in rows] == [
        (CASE, "correct", "same"), (CASE, "launches", "same"), (CASE, "device_us", "not compared"),
        (other, "correct", "same"), (other, "device_us", "not compared"),
    ]  # fmt: skip
    assert progress == [f"1 of 2: {CASE} on mine", f"2 of 2: {other} on mine"]


# -- the command ------------------------------------------------------------------------------------------------------
def run(capsys, *arguments):
    code = cli.main(["compare", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "words, message",
    [
        (("nix", "HEAD"), "nix: no commit, tag or branch of "),
        (("HEAD", "HEAD", "t4-nix"), "those in use: python3 -m harness list --why"),
        (("HEAD", "HEAD", "--repo", "."), "--repo without --backend: name yours"),
        (("HEAD", "HEAD", "--threshold", "0"), "argument --threshold: 0: must be a number above 0, at most 1000"),
        (("HEAD", "HEAD", "--budget", "-1"), "argument --budget: -1: must be a number from 0 to "),
        (("HEAD", "HEAD", "--repo", "nix", "--backend", "a:b"), "--repo nix: no such directory"),
    ],
)
def test_wrong_arguments(capsys, words, message):
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1


def parsed(*words):
    return cli._parser().parse_args(["compare", "HEAD", "HEAD", *words])


def test_the_default_cases_of_the_cpu():
    found = command.requests(parsed())
    counted = [q for q in found if "launches" in q.metrics]
    timed_ones = [q for q in found if "device_us" in q.metrics]
    assert len(counted) > 10 and {"triton", "torch-grouped-mm"} <= {q.backend for q in counted}
    assert len(timed_ones) > 2 and {q.backend for q in timed_ones} == {"torch-grouped-mm"}  # others are interpreted
    assert not set(counted) & set(timed_ones)
    assert command.requests(parsed("--metric", "host_us"))[0].metrics == ("host_us",)


def test_the_default_cases_of_a_gpu_and_of_a_backend():
    found = command.requests(parsed("--device", "cuda", "--metric", "device_us"))
    assert len(found) > 5 and all(q.backend == "triton" and "-random" in q.case for q in found)
    found = command.requests(parsed("--backend", "a:b", "--backend", "c:d", CASE))
    assert [(q.case, q.backend) for q in found] == [(CASE, "a:b"), (CASE, "c:d")]


def test_the_same_folder_is_noticed(tmp_path):
    repo = repository(tmp_path / "theirs")
    commit(repo, "other", {"docs/a.md": "a"})
    with Checkouts(repo) as checkouts:
        head = checkouts.resolve("HEAD")
        assert compare.identical(checkouts, checkouts.resolve("first"), head, "own")
        assert not compare.identical(checkouts, checkouts.resolve("first"), head, "")
        assert compare.identical(checkouts, head, "worktree", "own")
        (repo / "own" / "new.py").write_text("")
        assert not compare.identical(checkouts, head, "worktree", "own")
        assert not compare.identical(checkouts, head, head, "nix")


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """Tagged first and slow, which copies its output once more and works in vain; then a commit that is wrong."""
    repo = repository(tmp_path_factory.mktemp("compared") / "theirs")
    done = "        return out\n\n\nclass Talks"
    assert done in MOE
    slow = "        for _ in range(300):\n            x @ x.T\n" + done.replace("out\n", "out.clone()\n")
    commit(repo, "slow", {"own/moe.py": MOE.replace(done, slow)})
    git(repo, "tag", "slow")
    commit(repo, "wrong", {"own/moe.py": MOE.replace(done, done.replace("out\n", "-out\n"))})
    return repo


def test_two_commits_counted_and_timed(repo, capsys, tmp_path, monkeypatch):
    for module in (statistics, compare):
        monkeypatch.setattr(module, "LOOKS", (2,))
    monkeypatch.setattr(compare, "ROUNDS", 1)
    summary, record = tmp_path / "new" / "summary.md", tmp_path / "record.json"
    metrics = [word for name in ("allocated_bytes", "launches", "device_us") for word in ("--metric", name)]
    words = ["--repo", str(repo), "--backend", "own.moe:Plain", "--markdown", str(summary), "--json", str(record)]
    code, out, err = run(capsys, "first", "slow", *words, *metrics, CASE)
    lines = out.splitlines()
    assert code == 1 and lines[0].startswith("first (") and lines[0].endswith(" on cpu")
    assert f"{CASE} on own.moe:Plain: the same in correctness and 1 counted metric" in lines
    counted = next(line.split() for line in lines if line.startswith("  allocated_bytes"))
    assert counted[4] == "regressed" and counted[3] == f"{int(counted[2]) - int(counted[1]):+d}"
    assert "clone" in out and "4 metrics in " in out
    # What is fast and what is slow depends on who else works here; that both were sampled does not.
    assert "generation 2 of 2: 1 timed" in err and "Noise floor, from BASE against itself: " in lines[-1]
    found = json.loads(record.read_text())
    rows = {row["metric"]: row for row in found["rows"]}
    assert found["exit"] == 1 and found["base"] == git(repo, "rev-parse", "first")
    assert found["environment"]["environment"]["device"] == "cpu"
    assert min(rows["device_us"]["head"], rows["device_us"]["base"]) > 0 and rows["device_us"]["samples"] >= 36
    assert "| **regressed** |" in summary.read_text() and summary.read_text().startswith("### first (")
    assert len(git(repo, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("size", [1e-9, 0.0999, 0.99951, 9.9951, 99.951, 998.99, 1e3, 1e7, 1e12, math.inf])
def test_no_measured_time_is_too_wide_for_the_table(size):
    estimate = Estimate(size, -0.9999, size, 1.0, 0.0, size, 0.1, 30, 3)
    timed_row = Comparison(
        CASE, "mine", "device_us", "undecided", size * 1e5, size * 1e5, ["x" * 300], estimate, size, 12_000, 99_999.0
    )
    counted = Comparison(CASE, "mine", "allocated_bytes", "regressed", 10**11, 2 * 10**11)
    lines = [*table_lines([timed_row, counted]), *total_lines([timed_row] * 999, 99_999.0)]
    assert max(map(len, lines)) <= 120 and "".join(lines).isprintable()


def test_a_wrong_working_tree(repo, capsys):
    words = ("--repo", str(repo), "--backend", "own.moe:Plain", "--metric", "allocations", CASE)
    code, out, _ = run(capsys, "first", "worktree", *words)
    assert code == 1 and "failed at HEAD: " in out and "allocations" not in out


def test_a_version_that_cannot_be_built(repo, capsys):
    words = ("--repo", str(repo), "--backend", "own.moe:Plain", CASE)
    code, _, err = run(capsys, "first", "slow", *words, "--build", "exit 7")
    assert code == 2 and "BASE " in err and "ended with exit code 7" in err
    code, _, err = run(capsys, "first", "slow", *words, "--build", "! grep -q 'x @ x.T' own/moe.py")
    assert code == 1 and "regressed: HEAD cannot be built" in err


# -- in words ---------------------------------------------------------------------------------------------------------
def test_the_table_fits():
    long = "t4096-h16384-i14336-e256-k16-bf16-e4m3.block.group-swigluoai-limit128-bias-kn-ep8.1-random"
    wide = statistics.Estimate(2.5, 2.0, 3.2, 0, 1, 0.5, 0.1, 5, 12)
    rows = [
        Comparison(long, "some.package.of.theirs:Backend", "device_us", "regressed", 123456.7, 4e5, ["x" * 300], wide,
                    0.62, 12 * 360, 1234.5),
        Comparison(long, "some.package.of.theirs:Backend", "allocated_bytes", "regressed", 10**10, 2 * 10**10),
        Comparison(long, "mine", "correct", "not compared", "unsupported", "unsupported", ["a | b"]),
    ]  # fmt: skip
    lines = table_lines(rows)
    assert max(map(len, lines)) <= 120
    assert " +250.0 % (+200.0 to +320.0) " in lines[3] and "12 x 360" in lines[3] and "+10000000000" in lines[5]
    cells = [line.replace("\\|", "").count("|") for line in markdown_lines(rows)]
    assert len(set(cells)) == 1 and "a \\| b" in markdown_lines(rows)[-1]


def test_the_totals_give_the_detectable_change():
    estimate = statistics.Estimate(0.0, -0.01, 0.01, 0.5, 0.5, 0.012, 0.003, 5, 3)
    row = Comparison(CASE, "mine", "device_us", "same", 10.0, 10.0, [], estimate, 0.034, 60, 1.0)
    found = Comparison(CASE, "other", "device_us", "regressed", 10.0, 20.0, [], estimate, 0.5, 60, 1.0)
    lines = total_lines([row, found, row], 3.2)
    assert lines[0] == "3 metrics in 3 s: 1 regressed, 2 same."
    assert "2 timed as same or undecided, a change of 3.4 % would have been found" in lines[1]
    assert "itself: 1.2 to 1.2 %" in lines[2]
    assert total_lines([found], 3.2)[1].startswith("Noise floor")


def test_two_versions_with_the_same_files_are_remarked(repo):
    with Checkouts(repo) as checkouts:
        slow = checkouts.resolve("slow")
        assert command._same_files(checkouts, slow, slow, "").startswith("; all files are the same in both")
        assert command._same_files(checkouts, slow, slow, "own").startswith("; own/ is the same in both")
        assert command._same_files(checkouts, slow, checkouts.resolve("first"), "") == ""
