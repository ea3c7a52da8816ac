"""results/runs.py: a run that is not whole is a problem, and says which cases are missing."""

import json

import pytest

from harness.results.merge import merge
from harness.results.verdict import Verdict
from tests.support.results_files import write_run


def verdict(n=1, status="passed", backend="triton", family="layers"):
    return Verdict(f"t{n}-h64", backend, "cpu", status, family).record()


ALL = [verdict(n) for n in (1, 2, 3)]


@pytest.fixture
def path(tmp_path, monkeypatch):
    for name in ("MOE_HARNESS_ROW", "MOE_HARNESS_SHARD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "r.jsonl"


def problems(path):
    """What is said of a file, without the names of the runs."""
    return [line.partition(": ")[2] for line in merge([path]).problems]


def remarks(path):
    return [line.partition(": ")[2] for line in merge([path]).remarks]


def without(path, kind):
    lines = [line for line in path.read_text().splitlines() if f'"kind": "{kind}"' not in line]
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize("records", (ALL, [*ALL[:2], verdict(3, "failed")], []))
def test_a_whole_run(path, records):
    write_run(path, records)
    assert problems(path) == remarks(path) == [] and merge([path]).runs[0].whole


def test_a_killed_run_says_which_cases_are_missing(path):
    missing = [verdict(n, backend="mine", family="scratch") for n in range(10, 15)] + [verdict(9)]
    write_run(path, ALL, missing=missing, end=False)
    node = "cases/test_scratch.py::test_scratch"
    assert problems(path) == [
        "it has no end: it was killed, or is still running; "
        "6 of 9 planned cases without a verdict: mine@cpu scratch 5; triton@cpu layers 1: "
        "cases/test_layers.py::test_layers[t9-h64:triton:cpu], "
        f"{node}[t10-h64:mine:cpu], {node}[t11-h64:mine:cpu] and 3 more"
    ]


def test_a_run_with_an_end_and_without_a_verdict(path):
    write_run(path, ALL[:2], missing=ALL[2:])
    assert problems(path) == [
        "1 of 3 planned cases without a verdict: triton@cpu layers 1: "
        "cases/test_layers.py::test_layers[t3-h64:triton:cpu]"
    ]


@pytest.mark.parametrize(
    "kind, problem",
    [
        ("begin", "its beginning is missing"),
        ("plan", "it has no plan: it ended before its cases were collected"),
        ("end", "it has no end: it was killed, or is still running"),
    ],
)
def test_a_part_that_is_missing(path, kind, problem):
    write_run(path, ALL)
    without(path, kind)
    assert problems(path) == [problem]


def test_a_plan_that_contradicts_itself(path):
    write_run(path, ALL)
    path.write_text(path.read_text().replace('"total": 3', '"total": 4'))
    assert problems(path) == ["its plan does not name as many cases as it counts"]


@pytest.mark.parametrize("exit_code, count", [(0, 0), (1, 1), (2, 1), (3, 1), (-9, 1)])
def test_the_exit_status_of_a_run_of_green_cases(path, exit_code, count):
    write_run(path, ALL, exit_code=exit_code)
    assert len(problems(path)) == count and all(f"pytest ended with {exit_code}" in line for line in problems(path))


def test_a_run_that_went_on_is_one_run(path):
    name = write_run(path, ALL[:1], missing=ALL[1:], end=False)
    write_run(path, ALL[1:2], missing=ALL[2:], end=False, run=name)
    assert len(problems(path)) == 1 and "1 of 3 planned cases without a verdict" in problems(path)[0]
    write_run(path, ALL[2:], run=name)
    assert problems(path) == [] and len(merge([path]).runs) == 1


def test_a_part_that_went_on_and_was_killed_at_its_end(path):
    name = write_run(path, ALL[:1], missing=ALL[1:])
    write_run(path, ALL[1:], run=name, end=False)
    assert problems(path) == ["it has no end: it was killed, or is still running"]


def test_a_run_that_was_killed_is_a_remark_once_all_of_it_has_run_again(path):
    write_run(path, ALL[:1], missing=ALL[1:], end=False)
    write_run(path, ALL[:2])
    assert len(problems(path)) == 1, "a case is missing still"
    write_run(path, [verdict(3, "failed")])
    (line,) = remarks(path)
    assert problems(path) == [] and line.startswith("it has no end") and line.endswith("; run again since")


def test_an_earlier_run_replaces_nothing(path):
    write_run(path, ALL)
    write_run(path, ALL[:1], missing=ALL[1:], end=False)
    assert len(problems(path)) == 1


def test_a_later_run_without_an_end_replaces_nothing(path):
    for _ in range(2):
        write_run(path, ALL, end=False)
    assert len(problems(path)) == 2


def test_a_run_at_another_place_replaces_nothing(path, monkeypatch):
    write_run(path, ALL[:1], missing=ALL[1:], end=False)
    monkeypatch.setenv("MOE_HARNESS_ROW", "h200")
    write_run(path, ALL)
    assert len(problems(path)) == 1
    monkeypatch.setenv("MOE_HARNESS_SHARD", "2/2")
    write_run(path, ALL[:1], missing=ALL[1:], end=False)
    assert problems(path)[1].startswith("it has no end") and merge([path]).problems[1].startswith(
        "h200, shard 2/2, run "
    )


def test_a_run_that_was_killed_before_its_plan_needs_a_whole_run_of_the_same_options(path):
    write_run(path, [], end=False, options={"keyword": "x"}, selection="-k x")
    without(path, "plan")
    write_run(path, ALL)
    assert len(problems(path)) == 1
    write_run(path, ALL[:1], options={"keyword": "x"}, selection="-k x")
    assert problems(path) == [] and len(remarks(path)) == 1


def test_the_runs_of_older_versions_are_one_problem(path):
    lines = [{"schema": n % 2 + 1, "run": f"{n // 3}", **verdict(n)} for n in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert merge([path]).problems == [
        "2 runs of schema 2 or older: its records do not say how many cases were due (6 verdicts)"
    ]
    write_run(path, ALL)
    assert problems(path) == [] and remarks(path)[-1].endswith("(6 verdicts); run again since")


def test_many_runs_that_are_not_whole_are_few_lines(path):
    for _ in range(15):
        write_run(path, ALL, end=False)
    found = merge([path]).problems
    assert len(found) == 11 and found[0] == "and 5 runs more that are not whole"


def test_a_recovered_file_beside_the_first_changes_nothing(path):
    write_run(path, ALL)
    lines = path.read_text()
    path.with_name("r.recovered-1.jsonl").write_text(lines)
    path.write_text("".join(lines.splitlines(keepends=True)[:2]))
    found = merge([path.parent])
    assert found.problems == [] and len(found.records) == 3
