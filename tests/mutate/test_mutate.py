"""moe-harness mutate: entries, the order of their cases, and mutants that hang, crash or take all memory."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.base.processes import ROOT
from harness.device import Device
from harness.mutate import bugs, outcomes, runner, schedule, worker
from harness.mutate.bugs import Bug, BugError, Edit
from harness.mutate.protocol import MutantRun, Schedule, Settings
from harness.problem import families
from harness.problem.case import Case
from tests.support import tiny_bugs
from tests.support.emulated import Emulated

CPU = Device("cpu")
GOOD = {"source": "x#1", "edit": "grouped.py", "old": "a", "new": "b", "reveals": "layers: bias ep2"}


# -- the data ---------------------------------------------------------------------------------------------------------
def test_every_entry_applies_is_python_and_names_a_family():
    families = {row.family for row in schedule.spread("", CPU)} | {"structure"}
    known = bugs.read()
    assert len(known) > 1
    for bug in known.values():
        bug.edited()  # raises
        assert bug.control or bug.family in families, f"{bug.kind}.toml: {bug.name}: reveals={bug.family!r}"


def entry(**changes):
    kept = {**GOOD, **changes}
    return "[made-up]\n" + "\n".join(f"{key} = {json.dumps(v)}" for key, v in kept.items() if v is not None)


@pytest.mark.parametrize(
    "text, message",
    [
        (entry(reveals=None), "made.toml: made-up: missing: reveals; keys: source"),
        (entry(trigger="x"), "made.toml: made-up: unknown: trigger; keys:"),
        (entry(old=["a", "b"]), "made.toml: made-up: 2 edit, 2 old, 1 new; their numbers must be equal"),
        ("made-up = 3", "made.toml: made-up=3: expected a table with"),
        ("[made-up", "made.toml: "),
    ],
)
def test_an_invalid_entry_is_named(tmp_path, text, message):
    (tmp_path / "made.toml").write_text(text)
    with pytest.raises(BugError, match=re.escape(message)):
        bugs.read(tmp_path)


def test_two_entries_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(entry())
    with pytest.raises(BugError, match="b.toml: made-up: a.toml has an entry of that name"):
        bugs.read(tmp_path)


@pytest.mark.parametrize(
    "edit, message",
    [
        (Edit("tiny.py", "combine", "gone", ""), "m: old='gone' occurs 0 times in tiny.py:combine; it must occur once"),
        (Edit("tiny.py", "", "expert", "e"), "m: old='expert' occurs "),
        (Edit("tiny.py", "combined", "x", "y"), "m: edit=tiny.py:combined: there is no 'combined'"),
        (Edit("tine.py", "", "x", "y"), "m: edit=tine.py: no such file under kernels/"),
        (Edit("tiny.py", "Tiny.prepare", "return call", "return ("), "m: new='return (' makes tiny.py:Tiny.prepare no"),
    ],
)
def test_an_edit_that_does_not_apply_is_reported(tmp_path, monkeypatch, edit, message):
    tiny_bugs.write(tmp_path)
    monkeypatch.setattr(bugs, "KERNELS", tmp_path / "kernels")
    bug = Bug("m", "made_up", "x#1", (edit,), "layers", (), ("kernels.tiny:Tiny",))
    with pytest.raises(BugError, match=re.escape(message)):
        bug.put_back(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (broken,) = runner.run([runner.make_task(bug, CPU, Settings(), 1)], jobs=1)
    assert broken.outcome == "broken" and message in broken.reason


def test_several_edits_of_one_file_add_up(tmp_path, monkeypatch):
    tiny_bugs.write(tmp_path)
    monkeypatch.setattr(bugs, "KERNELS", tmp_path / "kernels")
    edits = (Edit("tiny.py", "combine", "gate, up =", "up, gate ="), Edit("tiny.py", "combine", "silu(", "gelu("))
    copy = Bug("m", "made_up", "x#1", edits, "layers", (), ()).put_back(tmp_path / "copy")
    text = (copy / "kernels" / "tiny.py").read_text()
    assert text == tiny_bugs.KERNEL.replace("gate, up =", "up, gate =").replace("silu(", "gelu(")


# -- the order of cases -----------------------------------------------------------------------------------------------
BUG = Bug("made-up", "made_up", "x#1", (), "layers", ("bias", "e4m3"), ("triton",))


def test_relevant_rows_come_first_and_none_is_left_out():
    rows = schedule.by_relevance(BUG, CPU)
    tokens = [set(re.split("[-.]", str(row.case))) for row in rows]
    best = [row.family == "layers" and {"bias", "e4m3"} <= of_row for row, of_row in zip(rows, tokens)]
    assert best[0] and best == sorted(best, reverse=True), "rows with both words in the family come first"
    families = [row.family == "layers" for row in rows]
    assert families == sorted(families, reverse=True), "then the rest of the family"
    assert set(rows) == set(schedule.spread("", CPU)), "then all the others"


def test_the_kinds_of_case_take_turns():
    rows = schedule.by_relevance(replace(BUG, family="none", words=()), CPU)
    assert {row.family for row in rows[:20]} == {row.family for row in rows}


def test_spread_and_seeds_cover_families_fills_dtypes_and_seeds():
    rows = schedule.seeded(schedule.spread("a control", CPU))
    first = rows[:100]
    assert {row.family for row in first} == {row.family for row in rows}
    assert {row.case.fill for row in first} == {"exact", "random", "extreme"}
    assert {row.case.problem.dtype for row in first} == {"bf16", "fp16", "fp32"}
    assert {row.case.seed for row in first} == set(range(20))
    assert [row.case for row in schedule.spread("another", CPU)[:100]] != [
        row.case for row in schedule.spread("", CPU)[:100]
    ]


def test_the_sample_has_every_class_and_does_not_depend_on_other_classes():
    known = {f"{kind}-{n}": replace(BUG, name=f"{kind}-{n}", kind=kind) for kind in "abc" for n in range(40)}
    known["d-0"] = replace(BUG, name="d-0", kind="d")
    sample = schedule.sample(known, 6)
    assert {bug.kind for bug in sample.values()} == set("abcd") and 10 <= len(sample) <= 32
    assert schedule.sample({k: v for k, v in known.items() if v.kind != "b"}, 6) == {
        k: v for k, v in sample.items() if v.kind != "b"
    }


def test_counts_come_first_for_a_bug_of_structure_and_last_for_others(monkeypatch):
    def cases_run(bug, noticing):
        def cases(self, rows):
            yield MutantRun("case", "tiny", "layers", "failed" if noticing == "cases" else "passed")

        def count(*_):
            yield MutantRun("counts", "tiny", "structure", "structure" if noticing == "counts" else "passed")
            return noticing == "counts"

        monkeypatch.setattr(worker._Cases, "run", cases)
        monkeypatch.setattr(worker, "_count", count)
        settings = Settings("cpu")
        return [run.case for run in worker._messages(replace(bug, backends=()), settings, Schedule(()), None)]

    structure, control = replace(BUG, family="structure"), replace(BUG, kind="controls")
    assert cases_run(structure, "") == ["counts", "case"] and cases_run(structure, "counts") == ["counts"]
    assert cases_run(BUG, "") == ["case", "counts"] and cases_run(BUG, "cases") == ["case"]
    assert cases_run(control, "") == []  # Settings.control_runs is 0


# -- mutants ----------------------------------------------------------------------------------------------------------
def command(directory, *arguments, driver=""):
    words = [sys.executable, "-c", driver + tiny_bugs.DRIVER, str(directory), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, cwd=directory, env=environment, timeout=300)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run over all entries: its directory, its process with its output, and its records by name."""
    directory = tmp_path_factory.mktemp("mutants")
    tiny_bugs.write(directory)
    done = command(directory, "--results=r.jsonl", "--limit=1", "--case-limit=8", "--control-runs=25", "--jobs=3")
    assert not done.stderr, done.stderr
    records = [json.loads(line)["outcome"] for line in (directory / "r.jsonl").read_text().splitlines()]
    return directory, done, {record["mutant"]: record for record in records}


@pytest.mark.parametrize(
    "name, outcome, status, reason",
    [
        ("wrong", "killed", "failed", "outputs differ"),
        ("hangs", "killed", "hung", "no verdict after 8 s"),
        ("dies", "killed", "died", "the process ended with SIGSEGV"),
        ("hungry", "killed", "died", "it held more than 1.0 GiB of memory"),
        ("raises", "killed", "crashed", "ValueError: no"),
        ("meant-to-raise", "killed", "crashed", "NameError"),
        ("no-program", "stillborn", "stillborn", "NameError"),
    ],
)
def test_a_mutant_costs_only_itself(ran, name, outcome, status, reason):
    record = ran[2][name]
    assert (record["outcome"], record["by"]["status"]) == (outcome, status)
    assert reason in record["by"]["reason"]
    assert record["by"]["case"].startswith("t") and record["by"]["backend"] == "kernels.tiny:Tiny"


def test_correct_kernels_survive_and_no_control_is_accused(ran):
    records = ran[2]
    for name in ("a-unnoticed", "b-explained"):
        assert records[name]["outcome"] == "survived" and len(records[name]["runs"]) > 5
    control = records["another-order"]
    assert control["outcome"] == "innocent" and len(control["runs"]) == 25
    assert "elsewhere" not in records and "not run elsewhere: only cuda can show it" in ran[1].stdout


def test_survivors_come_first_and_the_exit_code_is_1(ran):
    assert ran[1].returncode == 1
    lines = ran[1].stdout.splitlines()
    last = max(n for n, line in enumerate(lines) if re.match("(killed|survived|stillborn|innocent)  ", line))
    summary = lines[last + 1 :]
    assert summary[0].startswith("SURVIVED a-unnoticed") and "unexplained (made#0)" in summary[1]
    assert summary[2].startswith("SURVIVED b-explained") and "it is the correct kernel" in summary[3]
    assert summary[4].startswith("STILLBORN no-program")
    text = "\n".join(summary)
    assert "killed 6 of 8 bugs (75.0%)" in text
    assert "controls: 1 correct variant, 25 runs, 0 false alarms (0.0%)" in text
    assert "entries that are no bugs: no-program" in text and "6 of 8 bugs noticed, the floor is 98%" in text


def test_stored_outcomes_are_not_run_again(ran):
    directory = ran[0]
    again = command(directory, "--results=r.jsonl", "--limit=1", "--case-limit=8", "wrong", "dies", "--floor=1")
    assert again.returncode == 0 and "2 of them are in it already" in again.stdout
    assert "killed 2 of 2 bugs" in again.stdout
    assert len((directory / "r.jsonl").read_text().splitlines()) == len(ran[2])


def test_named_entries_print_what_notices_them_and_store_nothing(ran):
    directory = ran[0]
    before = set(directory.iterdir())
    done = command(directory, "raises", "b-*", "--limit=1", "--case-limit=8")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[0].endswith(", not stored") and "results" not in done.stdout
    assert any(
        re.match("killed    raises +crashed in t.* on kernels.tiny:Tiny: ValueError: no", line) for line in lines
    )
    assert "killed 1 of 2 bugs (50.0%)" in lines
    assert set(directory.iterdir()) == before


def test_ctrl_c_leaves_no_process(ran):
    words = [sys.executable, "-c", tiny_bugs.DRIVER, str(ran[0]), "hangs", "hungry", "--jobs=2", "--results=c.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ran[0], env=environment) as process:
        assert "2 bugs" in process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (mutants := children.read_text().split()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
    assert process.returncode == 130 and "interrupted, 0 of 2 done; to continue: --results c.jsonl" in output
    assert not [pid for pid in mutants if Path(f"/proc/{pid}").exists()]


FAIL_ON_GPU_USE = """
import os, torch
from harness.device import Device
from harness.mutate import runner
def never(*_):
    assert os.getpid() != PARENT, "the parent process must not touch a GPU"
    return False
PARENT = os.getpid()
torch.cuda.is_available = torch.cuda._lazy_init = torch.cuda.device_count = never
runner.find_device = lambda name: (Device(name), "")
"""


def test_the_parent_process_does_not_touch_a_gpu(ran):
    done = command(ran[0], "--device=cuda", "--results=g.jsonl", "wrong", "another-order", driver=FAIL_ON_GPU_USE)
    assert done.stdout.count("UNASKED") == 2 and "AssertionError" not in done.stdout + done.stderr, done.stderr


def test_the_digest_of_the_suite_depends_on_the_kernels(tmp_path, monkeypatch):
    tiny_bugs.write(tmp_path)
    monkeypatch.setattr(bugs, "KERNELS", tmp_path / "kernels")
    before = outcomes.suite_digest()
    assert before == outcomes.suite_digest()
    (tmp_path / "kernels" / "tiny.py").write_text(tiny_bugs.KERNEL + "\n")
    assert before != outcomes.suite_digest()


# -- edits that leave no valid program --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error_type, reason, raises, status",
    [
        ("NameError", "NameError: name 'gate' is not defined", "", "stillborn"),
        ("NameError", "NameError: name 'gate' is not defined", "NameError", "crashed"),
        ("ValueError", "ValueError: not a NameError", "", "crashed"),
        ("InterpreterError", """InterpreterError: NameError("name 'gate' is not defined")""", "", "stillborn"),
        ("InterpreterError", """InterpreterError: NameError("name 'gate' is not defined")""", "NameError", "crashed"),
        ("InterpreterError", "InterpreterError: ValueError('shapes differ')", "", "crashed"),
        ("Crashed", "Crashed: after 2 steps: NameError: name 'gate' is not defined", "", "stillborn"),
    ],
)
def test_the_type_of_an_exception_tells_an_invalid_program_from_a_bug(error_type, reason, raises, status):
    """Triton and a sequence of calls quote the exception that they wrap; no other text counts."""
    run = worker._run(replace(BUG, raises=raises), ("t1", "tiny", "layers"), "crashed", reason, error_type)
    assert run.status == status


class CompilationError(Exception):
    pass


@pytest.mark.parametrize("smallest, word", [(2**10, "crashed"), (0, "stillborn")])
def test_a_kernel_that_compiles_for_some_cases_is_a_valid_program(smallest, word):
    """A bug of one configuration is noticed where it does not compile; a kernel that compiles for no case is no bug."""

    class Partly(Emulated):
        def run(self, layer, x, weights, ids, out=None):
            if x.shape[1] > smallest:
                raise CompilationError("at 1:2:")
            return super().run(layer, x, weights, ids, out)

    row = families.CaseRow(Case.parse("t2-h2048-i8-e2-k1-bf16-random"), "layers", "why")
    *_, run = worker._Cases(BUG, {"partly": Partly()}, CPU, ()).run((row,))
    assert run.status == word and run.reason.startswith("CompilationError")
