"""run/supervisor.py: whatever a case does to its process, it costs that case alone."""

import os
import time

import pytest

from harness.base import progress
from harness.device import Device
from harness.problem.case import Case
from harness.run import supervisor as supervisors
from harness.run.supervisor import LIMIT, Supervisor
from harness.run.worker_process import SHOWN

CPU = Device("cpu")
CASE = Case.parse("t16-h64-i32-e4-k2-bf16-exact")
SPEC = "tests.support.misbehaving:Misbehaving"


def batch(tokens):
    return CASE.change(tokens=tokens)


@pytest.fixture
def supervisor():
    with Supervisor([CPU]) as supervisor:
        yield supervisor


@pytest.mark.parametrize(
    ("tokens", "status", "reason"),
    [
        (1, "crashed", "the process ended with exit code 0"),
        (2, "crashed", "the process ended with SIGSEGV"),
        (3, "crashed", "the process ended with SIGTERM"),
        (4, "crashed", "the process ended with exit code 0"),
        (5, "crashed", "the process closed the file descriptor of its pipe"),
        (6, "hung", "no answer in 2 s"),
        (7, "hung", "no answer in 2 s"),
        (12, "crashed", "the process ended with SIGABRT"),
    ],
)
def test_a_case_that_ends_or_blocks_its_process_is_named_and_the_next_one_runs(supervisor, tokens, status, reason):
    assert supervisor.run(CASE, SPEC, CPU).status == "passed"
    supervisor.limit = 2 if status == "hung" else LIMIT
    found = supervisor.run(batch(tokens), SPEC, CPU, "family", "misbehaving")
    supervisor.limit = LIMIT
    assert (found.status, found.reason, found.family, found.backend) == (status, reason, "family", "misbehaving")
    assert supervisor.run(CASE, SPEC, CPU).status == "passed"


def test_the_report_of_a_hang_says_where_the_backend_is(supervisor):
    supervisor.limit = 2
    assert "misbehaving.py" in supervisor.run(batch(7), SPEC, CPU).report


def test_a_thread_left_behind_is_noted_and_ends_with_its_process(supervisor):
    found = supervisor.run(batch(8), SPEC, CPU)
    assert found.status == "passed" and len(found.notes) == 1 and found.notes[0].startswith("left the thread Thread-")


def test_a_copy_of_the_worker_gives_no_second_verdict(supervisor):
    found = supervisor.run(batch(9), SPEC, CPU)
    assert found.status == "passed" and len(found.notes) == 1
    assert supervisor.run(CASE, SPEC, CPU).case == str(CASE)


def test_a_process_left_behind_is_noted_and_ended(supervisor):
    found = supervisor.run(batch(10), SPEC, CPU)
    (note,) = found.notes
    pid = int(note.split()[2])
    assert found.status == "passed" and note.endswith("which was ended: sleep 100")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_failing_case_prints_is_cut_and_kept_whole_on_request(tmp_path):
    with Supervisor([CPU], outputs=tmp_path / "outputs") as supervisor:
        found = supervisor.run(batch(11), SPEC, CPU, name="misbehaving")
        assert found.status == "crashed" and found.reason == "ValueError: too much"
        assert 2 * SHOWN < len(found.output) < 2 * SHOWN + 100 and "bytes more" in found.output
        (whole,) = (tmp_path / "outputs").iterdir()
        assert whole.stat().st_size == 100 * 100_001
        assert supervisor.run(CASE, SPEC, CPU).output == ""


def test_streams_that_a_case_closes_are_open_for_the_next(supervisor):
    assert supervisor.run(batch(14), SPEC, CPU).status == "passed"
    assert "yyy" in supervisor.run(batch(11), SPEC, CPU).output


def test_a_case_is_blamed_for_the_end_of_the_next_one():
    """Alone the next case passes; after this one it ends the process."""
    blamed = []
    with Supervisor([CPU], blame=blamed.append) as supervisor:
        assert supervisor.run(batch(13), SPEC, CPU, "family", "misbehaving").status == "passed"
        found = supervisor.run(batch(20), SPEC, CPU, "family", "misbehaving")
    assert found.status == "passed" and "it ended the process after t13-" in found.notes[0]
    (planter,) = blamed
    assert (planter.case, planter.status, planter.family) == (str(batch(13)), "crashed", "family")
    assert str(batch(20)) in planter.reason and "exit code 4" in planter.reason


def test_where_the_fault_was_planted_earlier_the_reason_says_that_it_is_not_known(supervisor):
    supervisor.run(batch(13), SPEC, CPU)
    supervisor.run(CASE, SPEC, CPU)
    found = supervisor.run(batch(20), SPEC, CPU)
    assert found.status == "crashed"
    assert "exit code 4; alone in a new process the case is passed. An earlier case" in found.reason


def test_a_backend_that_always_ends_its_process_is_stopped(monkeypatch, supervisor):
    monkeypatch.setattr(supervisors, "IN_A_ROW", 3)
    ends = "tests.support.misbehaving:AlwaysEnds"
    reasons = [supervisor.run(batch(n), ends, CPU).reason for n in range(1, 6)]
    assert reasons == ["the process ended with exit code 5"] * 3 + ["not run after 3 crashes"] * 2
    assert supervisor.run(CASE, SPEC, CPU).status == "passed"  # another backend goes on


def test_a_known_end_does_not_count(monkeypatch, supervisor):
    monkeypatch.setattr(supervisors, "IN_A_ROW", 2)
    ends = "tests.support.misbehaving:AlwaysEnds"
    reasons = {supervisor.run(batch(n), ends, CPU, known=True).reason for n in range(1, 5)}
    assert reasons == {"the process ended with exit code 5"}


def test_a_hang_of_the_diagnosis_leaves_the_failure(monkeypatch, supervisor):
    monkeypatch.setattr("harness.run.worker_process.DIAGNOSIS", 1.0)
    monkeypatch.setattr("harness.diagnose.failure.failure", lambda *arguments: time.sleep(100))
    found = supervisor.run(CASE, "tests.support.misbehaving:Wrong", CPU)
    assert found.status == "failed" and found.reason.startswith("the output is wrong")


def test_only_the_time_of_the_backend_counts(monkeypatch):
    """Drawing takes longer than the limit, which the backend does not reach."""
    from harness.session.oracle_cache import ORACLE_CACHE

    def slow(case, device, inputs=ORACLE_CACHE.inputs):
        time.sleep(6)
        return inputs(case, device)

    monkeypatch.setattr(ORACLE_CACHE, "inputs", slow)
    with Supervisor([CPU], limit=5) as supervisor:
        assert supervisor.run(CASE, SPEC, CPU).status == "passed"


def test_own_time_is_counted_once_where_blocks_contain_one_another(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    found = progress.CaseProgress()
    found.start()
    now[0] += 1
    with found.own():
        now[0] += 2
        with found.own():
            now[0] += 4
        assert found.seconds() == (1.0, 6.0)
    now[0] += 8
    assert found.seconds() == (9.0, 6.0)
