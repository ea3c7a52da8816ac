"""The command of `make faults`: a small part of it, and that it can fail."""

import json
import subprocess
import sys

import pytest

from harness.base.processes import ROOT
from tests.reliability import kills, tables, ways
from tests.reliability.catalogue import FAULTS
from tests.reliability.faults import FAULTY, HONEST, Fault
from tests.reliability.loading import LOADING


def command(*words):
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_the_catalogue_has_60_kinds_and_more():
    assert len(FAULTS) + len(LOADING) >= 60
    assert {fault.name for fault in FAULTS.values()} == set(FAULTS)


def test_faults_and_kills_cost_nothing_else():
    words = "--part faults --part kills --kills 6 --way plain --way run".split()
    code, text = command(*words, "--fault", "os._exit(3)", "--fault", "GeneratorExit", "--fault", "prepare = None")
    assert (code, text.splitlines()[-1]) == (0, "0 problems"), text
    assert "| ends the process | os._exit(3) | crashed, 1 |  |  | crashed, 1 |  | nothing |" in text
    assert "| raises | GeneratorExit | crashed, 1 |  |  | crashed, 1 |  | nothing |" in text
    assert "| cannot be loaded | prepare = None | usage error, 4 |  |  | usage error, 2 |  | nothing |" in text
    assert "| verdicts lost beyond the case in flight | 0 |" in text and "| kills | 6 |" in text


def record(case, backend, status, **more):
    return json.dumps({"kind": "verdict", "case": case, "backend": backend, "status": status, "reason": "", **more})


@pytest.fixture
def folder(tmp_path):
    """The results of a run of one case with a fault and one without, on two backends."""

    def write(*verdicts, end=True):
        lines = ['{"kind": "begin"}', '{"kind": "plan", "total": 4}', *verdicts, *(['{"kind": "end"}'] if end else [])]
        (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n")
        return ways.best(tmp_path)

    return write


HONESTLY = [record("a", "honest", "passed"), record("b", "honest", "passed")]
FAULT = Fault("a group", "a fault", lambda: None, ("crashed",), notes=True)


def test_a_verdict_that_the_catalogue_does_not_name_is_a_problem(folder):
    wrong = folder(record("a", "faulty", "passed"), record("b", "faulty", "passed"), *HONESTLY)
    cell = ways.Cell("a fault", "plain")
    ways.judge(cell, FAULT, wrong, "a")
    assert cell.problems == ["passed, not crashed", "no note of it in the record"]
    right = folder(record("a", "faulty", "crashed", notes=["it"]), record("b", "faulty", "passed"), *HONESTLY)
    cell = ways.Cell("a fault", "plain")
    ways.judge(cell, FAULT, right, "a")
    assert (cell.problems, ways.lost(right, ["a", "b"], ["a"])) == ([], [])


def test_another_case_that_is_red_or_has_no_verdict_is_a_problem(folder):
    recorded = folder(record("a", "faulty", "crashed"), record("b", "faulty", "hung", reason="late"), HONESTLY[0])
    assert ways.lost(recorded, ["a", "b"], ["a"]) == ["b on faulty: hung (late)", "lost: b on honest"]
    assert not recorded.whole  # 3 verdicts of 4


def test_a_file_without_an_end_and_a_wrong_exit_code_are_problems(folder, tmp_path):
    recorded = folder(record("a", "faulty", "crashed"), record("b", "faulty", "passed"), *HONESTLY, end=False)
    lines = ways.ending(0, True, recorded, tmp_path)
    assert lines == ["exit code 0, not 1", "no whole results file (4 verdicts)"]


def test_living_marks_and_long_logs_are_problems():
    assert ways.output_problems("a ::error::owned\n\\x1b[2Jowned\n\\::error::owned\n##\\[error]owned", False) == []
    for mark in ("::error::owned", "##[error]owned", "\x1b[2Jowned", "\u202eowned"):
        assert ways.output_problems(f"x\n{mark}", False) == [f"printed as it is: {mark!r}"]
    assert ways.output_problems("x" * 1_000_001, True) == ["it did not end", "1000001 bytes of output"]


def test_a_lost_verdict_and_a_green_summary_of_a_killed_run_are_problems():
    assert tables.kill_problems(kills.Kills(kills=5)) == []
    wrong = tables.kill_problems(kills.Kills(kills=5, lost=1, green=2))
    assert wrong == ["kills: 1 verdicts lost", "kills: 2 green"]


def test_every_fault_lies_between_two_cases_without_one():
    rows = list(ways.all_rows(["SystemExit", "os.abort()"]).values())
    assert rows == ["", "SystemExit", "", "os.abort()", ""]
    assert {FAULTY, HONEST} == {option.partition("=")[2] for option in ways.backends()}
