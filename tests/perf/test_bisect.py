"""moe-harness bisect over small histories: real git, made-up workers (tests/support/small_history.py), no clock."""

import os
import random
import re
import shutil
import subprocess

import pytest

from harness import cli
from harness.base.errors import UserError
from harness.commands import bisect
from harness.perf.bisect.history import BAD, GOOD, SKIP, STOP, Culprits, History
from harness.perf.bisect.log import Log
from harness.perf.bisect.measure import PAIRS, WorkerPool
from tests.support.demo_repository import git
from tests.support.small_history import FakeCheckouts, make

if not shutil.which("git"):
    pytest.skip("there is no git here", allow_module_level=True)

CASE = "t4-h64-i64-e8-k2-bf16-exact"


def steps(count, culprit, old, new, **others):
    """States of `count` commits: old before the culprit and new from it on; others: "_7" -> state of commit 7."""
    states = [dict(new if number >= culprit else old) for number in range(count)]
    for name, state in others.items():
        states[int(name[1:])] |= state
    return states


@pytest.fixture
def ask(tmp_path, capsys):
    """ask(states, options, fake) -> (exit code, output, names, fake); states: None for the same history once more."""

    def run_bisect(states, *options, fake=None, good=0, bad=-1, merges=None, metric="launches"):
        if not run_bisect.names:
            run_bisect.names = make(run_bisect.repository, states, merges)
        names, fake = run_bisect.names, fake or FakeCheckouts(run_bisect.repository)
        line = ["bisect", CASE, "--backend", "mine:Mine", "--good", names[good], "--bad", names[bad], *options]
        args = cli._parser().parse_args([*line, *(["--metric", metric] if metric else [])])
        code = bisect.search(args, WorkerPool(fake, "cpu"))
        return code, capsys.readouterr().out, names, fake

    run_bisect.repository, run_bisect.names = tmp_path / "repository", []
    return run_bisect


def state_of(repository):
    commands = (
        ["status", "--porcelain"],
        ["worktree", "list"],
        ["for-each-ref"],
        ["rev-parse", "HEAD"],
        ["bisect", "log"],
    )
    return [git(repository, *command) for command in commands]


# -- exact ------------------------------------------------------------------------------------------------------------
OLD, NEW = {"launches": 4, "kernels": ["_gemm[8]"]}, {"launches": 7, "kernels": ["_align[1]", "_gemm[8]"]}


@pytest.mark.parametrize("culprit", [1, 6, 11])
def test_the_report_names_the_commit_its_changes_and_the_next_commands(ask, culprit):
    code, out, names, fake = ask(steps(12, culprit, OLD, NEW))
    sha, date = names[culprit][:10], "2025-06-15"
    assert code == 0
    answer = out.partition("\n\n")[2]
    assert answer.startswith(f"found: {sha} {date} commit {culprit}\n  launches     4 -> 7 launches (+3, +75.0%)\n")
    assert "confidence   exact" in answer and "trace        _align is launched, and was not before" in answer
    assert f"\ngit show {sha}\n" in answer
    assert f"\npython3 -m harness compare '{sha}~1' {sha} {CASE} --backend mine:Mine --device cpu\n" in answer
    assert f"python3 -m harness run {CASE} --backend mine:Mine --device cpu" in answer
    assert len(fake.requests) == len({commit for commit, _ in fake.requests}) <= 2 + 5  # each commit once


def test_the_users_checkout_and_a_bisection_of_theirs_stay_as_they_are(ask):
    repository, names = ask.repository, make(ask.repository, steps(12, 5, OLD, NEW))
    ask.names = names
    git(repository, "bisect", "start", names[9], names[2])
    (repository / "state.json").write_text("edited, not committed")
    before = state_of(repository)
    assert "# bad:" in before[4] and before[0]
    code, out, _, _ = ask(None)
    assert code == 0 and f"found: {names[5][:10]}" in out
    assert state_of(repository) == before


def test_commits_that_cannot_be_built_or_measured_are_skipped_and_named(ask):
    broken = {"_3": {"cannot_build": "--build 'make' ended with exit code 2"}, "_6": {"error": ["import", "a.py: no"]}}
    code, out, names, fake = ask(steps(8, 5, OLD, NEW, **broken))
    assert code == 0 and f"found: {names[5][:10]}" in out
    named = [line for line in out.splitlines() if line.startswith("  skipped ")]
    assert named and all("'make' ended with exit code 2" in line or "import: a.py: no" in line for line in named)


def test_a_culprit_among_skipped_commits_is_a_range(ask):
    broken = {"_4": {"error": ["import", "no"]}, "_5": {"error": ["crashed", "RuntimeError: no\nTraceback"]}}
    code, out, names, _ = ask(steps(8, 4, OLD, NEW, **broken))
    assert code == 0
    answer = out.partition("\n\n")[2]
    assert answer.startswith("found: one of 3 commits")
    assert [line.split()[0] for line in answer.splitlines()[1:4]] == [n[:10] for n in names[4:7]]
    assert "4 -> 7 launches" in answer and "crashed: RuntimeError: no\n" in answer
    assert f"git log -p {names[4][:10]}~1..{names[6][:10]}" in answer


def test_a_commit_inside_of_a_merged_branch_is_found(ask):
    # 0 - 1 - 2 - 5 (merge of 4) - 6, with 3 - 4 from 1
    states = [dict(OLD), dict(OLD), dict(OLD), OLD | {"parent": 1}, NEW | {"parent": 3}, NEW | {"parent": 2}, dict(NEW)]
    code, out, names, _ = ask(states, merges={5: 4})
    assert code == 0 and f"found: {names[4][:10]}" in out


def test_a_metric_of_which_more_is_better_is_bad_where_it_falls(ask):
    code, out, names, _ = ask(steps(9, 3, {"tensor_core": 64}, {"tensor_core": 0}), metric="tensor_core")
    assert code == 0 and f"found: {names[3][:10]}" in out and "64 -> 0 instructions (-64, -100.0%)" in out
    assert re.search("python3 -m harness compare .* --metric tensor_core\n", out)


def test_the_first_of_two_changes_is_found_and_the_rest_is_named(ask):
    states = steps(10, 3, OLD, NEW)
    for state in states[7:]:
        state["launches"] = 9
    code, out, names, _ = ask(states)
    assert code == 0 and f"found: {names[3][:10]}" in out
    rest = f"python3 -m harness bisect --good {names[3][:10]} --bad {names[9][:10]} --metric launches {CASE}"
    assert rest in out and "# the rest: launches 7 -> 9" in out


def test_correctness_is_bisected_by_the_verdict_and_a_dead_process_is_not_correct(ask):
    wrong = {"status": "failed", "reason": "not bit-exact"}
    states = steps(8, 3, {}, wrong, _5={"error": ["died", "ended by SIGSEGV; its last lines:\n  x"]})
    code, out, names, _ = ask(states, metric="correct")
    assert code == 0 and f"found: {names[3][:10]}" in out
    assert "correct      passed -> not correct" in out and "trace        failed: not bit-exact" in out


def test_a_module_that_is_imported_late_and_is_no_python_says_nothing_about_correctness(ask):
    no_python = {
        "status": "crashed",
        "reason": "SyntaxError: invalid syntax (gemm.py, line 3)",
        "error_type": "SyntaxError",
    }
    states = steps(
        8, 6, {}, {"status": "crashed", "reason": "RuntimeError: no", "error_type": "RuntimeError"}, _3=no_python
    )
    code, out, names, _ = ask(states, metric="correct")
    assert code == 0 and f"found: {names[6][:10]}" in out
    assert f"{names[3][:10]} skipped  commit 3: import: SyntaxError: invalid syntax (gemm.py, line 3)" in out


def test_the_budget_ends_an_exact_search(ask):
    code, out, names, fake = ask(steps(40, 11, OLD, NEW), "--budget", "4")
    assert code == 3 and len({commit for commit, _ in fake.requests}) <= 6
    assert "not certain yet, one of:" in out and names[11][:10] in out
    assert "confidence   none" in out
    code, out, names, _ = ask(None, "--budget", "40")  # goes on
    assert code == 0 and f"found: {names[11][:10]}" in out and "going on with" in out


# -- the bisection, against git's own ---------------------------------------------------------------------------------
#: 0 - 1 - 2 ----- 5 - 6 - 9 - 10 - 11    5 merges 4 (of 1 - 3 - 4), 9 merges 8 (of 2 - 7 - 8)
MERGED = [{}, {}, {}, {"parent": 1}, {}, {"parent": 2}, {}, {"parent": 2}, {}, {"parent": 6}, {}, {}]
STEP = """
commit=$(git rev-parse BISECT_HEAD)
case "$SKIPPED" in *$commit*) exit 125;; esac
git merge-base --is-ancestor $CULPRIT $commit && exit 1
exit 0
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """(repository, names of its commits)"""
    repository = tmp_path_factory.mktemp("merged")
    return repository, make(repository, MERGED, {5: 4, 9: 8})


def bisected_by_git(repository, names, culprit, skipped):
    """The commits that `git bisect run` names, in any order."""
    git(repository, "bisect", "start", "--no-checkout", names[-1], names[0])
    variables = {"CULPRIT": culprit, "SKIPPED": " ".join(skipped), "PATH": os.environ["PATH"], "LC_ALL": "C"}
    subprocess.run(["git", "bisect", "run", "sh", "-c", STEP], cwd=repository, env=variables, capture_output=True)
    found = re.findall(r"^# (?:possible )?first bad commit: \[(\w+)\]", git(repository, "bisect", "log"), re.MULTILINE)
    git(repository, "bisect", "reset")
    return set(found)


@pytest.mark.parametrize("seed", range(8))
def test_the_commits_named_are_those_of_git_bisect(merged, seed):
    repository, names = merged
    rng = random.Random(seed)
    culprit, skipped = rng.choice(names[1:]), rng.sample(names[1:-1], rng.choice([0, 2, 5]))
    history = History(FakeCheckouts(repository), names[0], names[-1])
    judged = []

    def judge(commit):
        judged.append(commit)
        if commit in skipped:
            return SKIP
        return BAD if history._is_ancestor(culprit, commit) else GOOD

    result = history.bisect(judge)
    assert result.complete and culprit in result.commits and len(judged) == len(set(judged))
    assert set(result.commits) == bisected_by_git(repository, names, culprit, skipped)
    assert sorted(result.commits, key=names.index) == result.commits  # oldest first


def test_a_bisection_that_is_stopped_names_the_candidates(merged):
    repository, names = merged
    history, answers = History(FakeCheckouts(repository), names[0], names[-1]), iter([GOOD, SKIP, STOP])
    judged = []
    result = history.bisect(lambda commit: judged.append(commit) or next(answers))
    good = set(git(repository, "rev-list", judged[0]).split())
    assert result == Culprits([name for name in names if name not in good], complete=False)


# -- which metric -----------------------------------------------------------------------------------------------------
def test_without_a_metric_the_first_structural_one_that_is_worse_is_taken(ask):
    new = {"allocations": 5, "python_calls": 80, "launches": 0}
    code, out, names, _ = ask(steps(6, 2, {}, new), metric=None)
    assert code == 0 and f"found: {names[2][:10]}" in out
    assert "--metric allocations: " in out and "allocations 1 -> 5, python_calls 1 -> 80" in out


def test_without_a_metric_what_is_not_correct_any_more_is_bisected_for_that(ask):
    code, out, names, _ = ask(steps(6, 4, {}, {"status": "failed", "reason": "wrong"}), metric=None)
    assert code == 0 and f"found: {names[4][:10]}" in out and "--metric correct: " in out


def test_without_a_metric_time_is_what_is_left(ask):
    code, out, names, _ = ask(steps(6, 2, {"us": 100}, {"us": 120}), metric=None)
    assert code == 0 and f"found: {names[2][:10]}" in out and "--metric device_us: " in out


# -- timed ------------------------------------------------------------------------------------------------------------
def test_a_slow_down_is_found_among_noisy_times(ask):
    states = steps(24, 17, {"us": 100}, {"us": 104} | NEW, _11={"cannot_build": "make ended with 2"})
    code, out, names, fake = ask(states, metric="device_us")
    assert code == 0, out
    answer = out.partition("\n\n")[2]
    assert answer.startswith(f"found: {names[17][:10]} ")
    change = answer.splitlines()[1]
    assert re.match(r"  device_us    (99|100).* -> 10[345].* us .*95% interval \+", change), change
    assert 99 <= float(answer.splitlines()[2].split()[1].rstrip("%"))
    assert "trace        _align is launched, and was not before" in answer
    timed = [commit for commit, request in fake.requests if request == "time"]
    paired_runs = len(timed) / 2 / PAIRS
    started = sum(fake.started.count(commit) for commit in set(timed))
    assert 2 * paired_runs <= started <= 2 * paired_runs + 2  # no two paired runs share a process; two for the trace
    pairs = list(zip(timed[::2], timed[1::2]))
    assert pairs.count((names[23], names[0])) == pairs.count((names[0], names[23])) > 3  # the order alternates
    again = FakeCheckouts(fake.repo)
    code, out_again, _, again = ask(None, metric="device_us", fake=again)
    assert code == 0 and again.requests == [] and "of them out of the log" in out_again


def test_a_merge_stands_for_what_it_brought_in_where_time_is_bisected(ask):
    old, new = {"us": 100}, {"us": 150}
    states = [dict(old), dict(old), dict(old), old | {"parent": 1}, new | {"parent": 3}, new | {"parent": 2}, dict(new)]
    code, out, names, fake = ask(states, metric="device_us", merges={5: 4})
    sha = names[5][:10]
    assert code == 0 and f"found: {sha}" in out and names[4] not in fake.started
    assert f"--good $(git merge-base {sha}^1 {sha}^2) --bad {sha}^2" in out


def test_the_budget_ends_a_timed_search_with_its_best_guess(ask):
    code, out, names, fake = ask(steps(24, 17, {"us": 100}, {"us": 110}), "--budget", "11", metric="device_us")
    assert code == 3 and "not certain yet, most likely: " in out and "95% within" in out
    assert sum(request == "time" for _, request in fake.requests) == 11 * 2 * PAIRS


def test_a_skipped_culprit_makes_the_answer_a_range_where_time_is_bisected(ask):
    states = steps(10, 4, {"us": 100}, {"us": 130}, _4={"error": ["crashed", "no"]})
    code, out, names, _ = ask(states, metric="device_us")
    assert code == 0 and "found: one of 2 commits" in out and names[4][:10] in out and names[5][:10] in out


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "metric", "says"),
    [
        ({}, {}, "launches", "launches is the same at both ends: 1 at "),
        (NEW, OLD, "launches", "launches is better at the bad end: --good and --bad may be swapped: 7 at "),
        ({"error": ["import", "no module"]}, {}, "launches", " cannot be measured: import: no module"),
        ({}, {"cannot_build": "make ended with 2"}, "launches", " cannot be measured: make ended with 2"),
        ({"us": 100}, {"us": 100}, "device_us", "no change between the ends for certain"),
        ({"us": 110}, {"us": 100}, "device_us", "no change between the ends for certain"),
        ({"us": 100, "error": ["unsupported", "device: interpreted"]}, {}, "device_us", "the good end"),
        ({"us": 100}, {"error": ["unsupported", "device: interpreted"]}, "device_us", "the bad end"),
        ({"error": ["unsupported", "no"]}, {}, None, "the good end"),
        ({}, {"error": ["unsupported", "no"]}, None, "the bad end"),
    ],
)
def test_ends_that_do_not_differ_for_the_worse_are_refused(ask, old, new, metric, says):
    code, out, names, _ = ask(steps(5, 3, old, new), metric=metric)
    assert code == 1 and "refused: " in out and says in out
    assert f"python3 -m harness compare {names[0][:10]} {names[4][:10]} {CASE}" in out


def test_a_refusal_of_a_timed_search_says_what_would_have_been_found(ask):
    out = ask(steps(5, 3, {"us": 100}, {"us": 100}), metric="device_us")[1]
    assert " paired runs; a change of " in out and "with a probability of 80%" in out


def test_an_end_that_is_not_correct_leads_to_a_search_for_that(ask):
    code, out, _, _ = ask(steps(5, 3, OLD, NEW | {"status": "failed", "reason": "wrong"}))
    assert code == 1 and "incorrect: failed: wrong" in out
    assert " --metric correct " in out and "python3 -m harness bisect --good" in out


def test_a_comparison_of_the_ends_that_the_budget_ends_is_not_no_change(ask):
    code, out, _, _ = ask(steps(5, 3, {"us": 100}, {"us": 101}), "--budget", "9", metric="device_us")
    assert code == 3 and "no change between the ends for certain" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--good", "nonsense", "--bad", "main"], "nonsense: no commit"),
        (["--good", "main", "--bad", "main"], "the same commit"),
        (["--good", "main", "--bad", "main~2"], "no ancestor of --bad .*the other way round it would be"),
        (["--good", "main~1", "--bad", "worktree"], "--bad worktree: a commit is needed"),
        (["--good", "main~1", "--bad", "main", "--budget", "1"], "--budget 1: "),
        (["--good", "main~1", "--bad", "main", "--metric", "device_us", "--budget", "8"], "--budget 8: "),
        (["--good", "main~1", "--bad", "main", "--confidence", "1.5"], "argument --confidence: 1.5: "),
        (["--good", "main~1", "--bad", "main", "--target", "sm_9"], "--target sm_9: "),
        (["--good", "main~1", "--bad", "main", "--repo", "/nonsense"], "--repo /nonsense: no such directory"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(tmp_path, capsys, options, says):
    make(tmp_path / "repository", steps(4, 2, OLD, NEW))
    repo = [] if "--repo" in options else ["--repo", str(tmp_path / "repository")]
    code = cli.main(["bisect", CASE, "--backend", "mine:Mine", *repo, *options])
    err = capsys.readouterr().err
    assert code == 2 and re.search(says, err) and err.count("\n") == 1, err


# -- the log ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("metric", "after"), [("launches", 3), ("device_us", 45)])
def test_a_search_that_was_interrupted_goes_on_where_it_was(ask, tmp_path, metric, after):
    states = steps(20, 13, OLD | {"us": 100}, NEW | {"us": 115})
    whole = ask(states, "--log", str(tmp_path / "whole"), metric=metric)
    repository = whole[3].repo
    log = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        ask(None, "--log", str(log), metric=metric, fake=FakeCheckouts(repository, interrupt=after))
    assert git(repository, "worktree", "list").count("\n") == 0
    with log.open("a") as file:
        file.write('{"commit": "0123')  # killed while it wrote
    second = FakeCheckouts(repository)
    code, out, names, _ = ask(None, "--log", str(log), metric=metric, fake=second)
    assert code == 0 and f"found: {names[13][:10]}" in out
    assert "going on with " in out and "(1 cut off)" in out
    if metric == "launches":
        assert len(second.requests) + after == len(whole[3].requests)
    else:  # the paired run that was interrupted is lost
        paired_runs = sum('"paired_run"' in line for line in log.read_text().splitlines())
        kept = after // (2 * PAIRS)
        assert 2 * PAIRS * (paired_runs - kept) == sum(request == "time" for _, request in second.requests)


def test_restart_measures_everything_again(ask):
    code, _, _, first = ask(steps(12, 5, OLD, NEW))
    kept = FakeCheckouts(first.repo)
    assert ask(None, fake=kept)[0] == 0 and kept.requests == []
    again = FakeCheckouts(first.repo)
    code, out, _, _ = ask(None, "--restart", fake=again)
    assert code == 0 and again.requests == first.requests and "going on" not in out


def test_the_log_of_another_search_is_not_continued_and_one_in_use_is_not_shared(ask, tmp_path):
    log = tmp_path / "log"
    ask(steps(12, 5, OLD, NEW), "--log", str(log))
    with pytest.raises(UserError, match="it holds another search: metric='launches', not 'operators'"):
        ask(None, "--log", str(log), metric="operators")
    with Log(tmp_path / "other", {"case": CASE}), pytest.raises(UserError, match="another search writes to it now"):
        Log(tmp_path / "other", {"case": CASE})
    (tmp_path / "foreign").write_text('{"schema": 2}\n')
    with pytest.raises(UserError, match="no log of this version"):
        Log(tmp_path / "foreign", {})
    with pytest.raises(UserError, match="--log .*: "):
        Log(tmp_path, {})


def test_the_log_lies_in_the_git_directory_one_for_each_search(ask):
    _, _, _, fake = ask(steps(12, 5, OLD, NEW))
    ask(None, metric=None)
    assert len(list((fake.repo / ".git").glob("moe-harness-bisect-*.jsonl"))) == 2
    assert git(fake.repo, "status", "--porcelain") == ""
