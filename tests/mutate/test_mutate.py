"""moe-harness mutate: entries, what is asked and in which order, and mutants that do their worst."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from harness.base.errors import UserError
from harness.base.processes import ROOT
from harness.commands import mutate
from harness.device import Device
from harness.mutate import bugs, outcomes, runner, schedule, summary, worker
from harness.mutate.bugs import Bug, BugError, Edit
from harness.mutate.outcomes import Outcome
from harness.mutate.protocol import Asking, Run
from harness.problem import families
from harness.problem.case import Case
from harness.results.file import Results
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
        (entry(old=["a", "b"]), "made.toml: made-up: 2 edit, 2 old, 1 new; as many of each"),
        ("made-up = 3", "made.toml: made-up=3: a table is wanted"),
        ("[made-up", "made.toml: "),
    ],
)
def test_an_entry_that_is_none_is_named(tmp_path, text, message):
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
def test_an_edit_that_does_not_apply_is_told(tmp_path, monkeypatch, edit, message):
    tiny_bugs.write(tmp_path)
    monkeypatch.setattr(bugs, "KERNELS", tmp_path / "kernels")
    bug = Bug("m", "made_up", "x#1", (edit,), "layers", (), ("kernels.tiny:Tiny",))
    with pytest.raises(BugError, match=re.escape(message)):
        bug.put_back(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (broken,) = runner.run([runner.task(bug, CPU, Asking(), 1)], jobs=1)
    assert broken.outcome == "broken" and message in broken.reason


def test_several_edits_of_one_file_add_up(tmp_path, monkeypatch):
    tiny_bugs.write(tmp_path)
    monkeypatch.setattr(bugs, "KERNELS", tmp_path / "kernels")
    edits = (Edit("tiny.py", "combine", "gate, up =", "up, gate ="), Edit("tiny.py", "combine", "silu(", "gelu("))
    copy = Bug("m", "made_up", "x#1", edits, "layers", (), ()).put_back(tmp_path / "copy")
    text = (copy / "kernels" / "tiny.py").read_text()
    assert text == tiny_bugs.KERNEL.replace("gate, up =", "up, gate =").replace("silu(", "gelu(")


# -- what is asked ----------------------------------------------------------------------------------------------------
BUG = Bug("made-up", "made_up", "x#1", (), "layers", ("bias", "e4m3"), ("triton",))


def test_order_asks_first_what_the_entry_says_and_leaves_nothing_out():
    rows = schedule.order(BUG, CPU)
    tokens = [set(re.split("[-.]", str(row.case))) for row in rows]
    best = [row.family == "layers" and {"bias", "e4m3"} <= found for row, found in zip(rows, tokens)]
    assert best[0] and best == sorted(best, reverse=True), "rows with both words in the family come first"
    families = [row.family == "layers" for row in rows]
    assert families == sorted(families, reverse=True), "then the rest of the family"
    assert set(rows) == set(schedule.spread("", CPU)), "then all the others"


def test_order_gives_every_kind_of_case_its_turn():
    rows = schedule.order(replace(BUG, family="none", words=()), CPU)
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


def test_the_part_has_every_class_and_does_not_change_with_the_others():
    known = {f"{kind}-{n}": replace(BUG, name=f"{kind}-{n}", kind=kind) for kind in "abc" for n in range(40)}
    known["d-0"] = replace(BUG, name="d-0", kind="d")
    part = schedule.part(known, 6)
    assert {bug.kind for bug in part.values()} == set("abcd") and 10 <= len(part) <= 32
    assert schedule.part({k: v for k, v in known.items() if v.kind != "b"}, 6) == {
        k: v for k, v in part.items() if v.kind != "b"
    }


def test_counts_come_first_for_a_bug_of_structure_and_last_for_others(monkeypatch):
    def asked(bug, noticing):
        def cases(self, rows):
            yield Run("case", "tiny", "layers", "failed" if noticing == "cases" else "passed")

        def counted(*_):
            yield Run("counts", "tiny", "structure", "structure" if noticing == "counts" else "passed")
            return noticing == "counts"

        monkeypatch.setattr(worker._Cases, "of", cases)
        monkeypatch.setattr(worker, "_counted", counted)
        from harness.mutate.protocol import Questions

        asking = Asking("cpu")
        return [run.case for run in worker._answers(replace(bug, backends=()), asking, Questions(()), None)]

    structure, control = replace(BUG, family="structure"), replace(BUG, kind="controls")
    assert asked(structure, "") == ["counts", "case"] and asked(structure, "counts") == ["counts"]
    assert asked(BUG, "") == ["case", "counts"] and asked(BUG, "cases") == ["case"]
    assert asked(control, "") == []  # its runs are as many as are asked for: none


# -- mutants ----------------------------------------------------------------------------------------------------------
def command(room, *arguments, driver=""):
    words = [sys.executable, "-c", driver + tiny_bugs.DRIVER, str(room), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, cwd=room, env=environment, timeout=300)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run over all the bad ones: its room, what it printed, and its records by name."""
    room = tmp_path_factory.mktemp("mutants")
    tiny_bugs.write(room)
    done = command(room, "--results=r.jsonl", "--limit=1", "--case-limit=8", "--control-runs=25", "--jobs=3")
    assert not done.stderr, done.stderr
    records = [json.loads(line) for line in (room / "r.jsonl").read_text().splitlines()]
    return room, done, {record["mutant"]: record for record in records}


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


def test_who_is_right_survives_and_no_control_is_accused(ran):
    records = ran[2]
    for name in ("a-unnoticed", "b-explained"):
        assert records[name]["outcome"] == "survived" and len(records[name]["runs"]) > 5
    control = records["another-order"]
    assert control["outcome"] == "innocent" and len(control["runs"]) == 25
    assert "elsewhere" not in records and "not asked elsewhere: only cuda can show it" in ran[1].stdout


def test_survivors_are_told_first_and_the_exit_code_is_1(ran):
    assert ran[1].returncode == 1
    lines = ran[1].stdout.splitlines()
    last = max(n for n, line in enumerate(lines) if re.match("(killed|survived|stillborn|innocent)  ", line))
    summary = lines[last + 1 :]
    assert summary[0].startswith("SURVIVED a-unnoticed") and "unexplained (made#0)" in summary[1]
    assert summary[2].startswith("SURVIVED b-explained") and "it is the right kernel" in summary[3]
    assert summary[4].startswith("STILLBORN no-program")
    told = "\n".join(summary)
    assert "killed 6 of 8 bugs (75.0%)" in told
    assert "controls: 1 correct variant, 25 runs, 0 false alarms (0.0%)" in told
    assert "entries that are no bugs: no-program" in told and "6 of 8 bugs noticed, the floor is 98%" in told


def test_what_a_file_holds_is_not_run_again(ran):
    room = ran[0]
    again = command(room, "--results=r.jsonl", "--limit=1", "--case-limit=8", "wrong", "dies", "--floor=1")
    assert again.returncode == 0 and "2 of them are in it already" in again.stdout
    assert "killed 2 of 2 bugs" in again.stdout
    assert len((room / "r.jsonl").read_text().splitlines()) == len(ran[2])


def test_ctrl_c_leaves_no_process(ran):
    words = [sys.executable, "-c", tiny_bugs.DRIVER, str(ran[0]), "hangs", "hungry", "--jobs=2", "--results=c.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ran[0], env=environment) as process:
        assert "2 bugs" in process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (mutants := children.read_text().split()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told = process.stdout.read()
    assert process.returncode == 130 and "interrupted, 0 of 2 done; to go on: --results c.jsonl" in told
    assert not [pid for pid in mutants if Path(f"/proc/{pid}").exists()]


ASKS_THE_GPU = """
import os, torch
from harness.device import Device
from harness.mutate import runner
def never(*_):
    assert os.getpid() != PARENT, "the process that forks must not touch a GPU"
    return False
PARENT = os.getpid()
torch.cuda.is_available = torch.cuda._lazy_init = torch.cuda.device_count = never
runner.look = lambda name: (Device(name), "")
"""


def test_the_process_that_forks_asks_nothing_of_a_gpu(ran):
    done = command(ran[0], "--device=cuda", "--results=g.jsonl", "wrong", "another-order", driver=ASKS_THE_GPU)
    assert done.stdout.count("UNASKED") == 2 and "AssertionError" not in done.stdout + done.stderr, done.stderr


def test_the_suite_s_digest_is_of_kernels_and_cases(tmp_path, monkeypatch):
    tiny_bugs.write(tmp_path)
    monkeypatch.setattr(bugs, "KERNELS", tmp_path / "kernels")
    before = outcomes.suite_digest()
    assert before == outcomes.suite_digest()
    (tmp_path / "kernels" / "tiny.py").write_text(tiny_bugs.KERNEL + "\n")
    assert before != outcomes.suite_digest()


# -- what is made of it -----------------------------------------------------------------------------------------------
def outcome(name, word, kind="made_up", **by):
    run = Run("t1-h16-i16-e2-k1-bf16-exact", "tiny", "layers", by.pop("status", "passed"), **by)
    return Outcome(name, kind, "x#1", word, run if run.telling else None, runs=[run])


@pytest.mark.parametrize(
    "outcomes, floor, code",
    [
        ([outcome("a", "killed"), outcome("b", "survived")], 0.5, 0),
        ([outcome("a", "killed"), outcome("b", "survived")], 0.51, 1),
        ([outcome("a", "killed"), outcome("c", "innocent", "controls")], 1, 0),
        ([outcome("a", "killed"), outcome("c", "accused", "controls")], 0, 1),
        ([outcome("a", "killed"), outcome("d", "stillborn")], 0, 1),
        ([outcome("a", "killed"), outcome("d", "broken")], 0, 1),
        ([outcome("a", "killed"), outcome("d", "unasked")], 0, 1),
        ([outcome("a", "killed"), outcome("d", "error")], 0, 1),
    ],
)
def test_exit_codes(outcomes, floor, code, capsys):
    assert mutate._verdict(Namespace(floor=floor), outcomes) == code
    assert bool(capsys.readouterr().out) == bool(code)


def test_outcomes_of_runs():
    def word(bug, *statuses):
        return outcomes.outcome(bug, [Run("t1", "tiny", "layers", status) for status in statuses], 1.0).outcome

    control = replace(BUG, kind="controls")
    assert word(BUG, "passed", "mistrusted") == "survived" and word(control, "passed", "mistrusted") == "innocent"
    for status in ("failed", "promise", "crashed", "hung", "died", "structure"):
        assert word(BUG, "passed", status) == "killed" and word(control, status, "passed") == "accused"
    assert word(BUG, "failed", "error") == word(control, "error") == "error", "a mistake of ours is nobody's fault"
    assert word(BUG, "stillborn") == word(control, "stillborn") == "stillborn"
    assert word(BUG) == word(control) == "unasked"


def test_records_come_back_as_they_were_written(tmp_path):
    found = outcome("a", "killed", status="failed", reason="because", more={"seen": 1, "rejected": ["fla"]})
    found.runs.append(Run("t2", "tiny", "layers", "passed"))
    found.digest = "d"
    file = outcomes.Store(tmp_path / "r.jsonl", "cpu")
    file.append(found)
    file.close()
    other = Results(tmp_path / "r.jsonl", "commit")  # verdicts of another command in the same file
    other.append({"case": "t1", "status": "passed"})
    other.close()
    again = outcomes.Store(tmp_path / "r.jsonl", "cpu")
    assert again.known("d") == found and again.known("another") is None


def test_the_digest_is_of_the_entry_and_of_what_it_is_asked():
    mark = outcomes.digest(BUG, Asking(), "suite")
    assert mark == outcomes.digest(replace(BUG, survives="for a reason", source="x#2"), Asking(memory=1), "suite")
    others = [
        outcomes.digest(replace(BUG, words=()), Asking(), "suite"), outcomes.digest(BUG, Asking(more=30), "suite"),
        outcomes.digest(BUG, Asking(), "another suite"),
    ]  # fmt: skip
    assert len({mark, *others}) == 4


def test_an_explanation_that_no_longer_holds_is_told():
    told = summary.told([outcome("a", "killed", status="hung")], {"a": replace(BUG, survives="never")}, whole=False)
    assert told[0] == "its entry says that it survives, and it does not: a"


def test_shares_by_family_fill_and_dtype_count_bugs_that_were_asked():
    noticed, not_noticed = outcome("a", "killed", status="failed"), outcome("b", "survived")
    control = outcome("c", "accused", "controls", status="failed")
    told = "\n".join(summary.told([noticed, not_noticed, control], {}, whole=True))
    assert re.search(r"family +layers +1 +2 +50.0% +1 +1", told)
    assert re.search(r"fill +exact +1 +2 +50.0% +1 +1", told)
    assert re.search(r"dtype +bf16 +1 +2 +50.0% +1 +1", told)


@pytest.mark.parametrize(
    "words, names", [(["a-*"], ["a-1", "a-2"]), (["b-1", "a-1"], ["b-1", "a-1"]), (["kind"], ["b-1"]), ([], None)]
)
def test_entries_are_named_by_name_class_or_pattern(words, names):
    known = {name: replace(BUG, name=name) for name in ("a-1", "a-2")} | {"b-1": replace(BUG, name="b-1", kind="kind")}
    assert list(mutate._named(known, words)) == (names or list(known))


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="nobody: no entry of that name or pattern; classes: made_up"):
        mutate._named({"a": BUG}, ["nobody"])
    with pytest.raises(UserError, match="--against strict: one of assert_close, vllm"):
        mutate._rules(Namespace(against="strict", markdown=None))
    with pytest.raises(UserError, match="--markdown: needs --against RULE"):
        mutate._rules(Namespace(against=None, markdown=Path("t.md")))
    with pytest.raises(UserError, match="--jobs 0: 1 or more"):
        mutate._count("--jobs", 0, 4)


# -- what does not compile --------------------------------------------------------------------------------------------
class CompilationError(Exception):
    pass


@pytest.mark.parametrize("smallest, word", [(2**10, "crashed"), (0, "stillborn")])
def test_what_compiles_for_some_cases_is_a_program(smallest, word):
    """A bug of one configuration is noticed where it does not compile; what compiles for none is no bug."""

    class Partly(Emulated):
        def run(self, layer, x, weights, ids, out=None):
            if x.shape[1] > smallest:
                raise CompilationError("at 1:2:")
            return super().run(layer, x, weights, ids, out)

    row = families.CaseRow(Case.parse("t2-h2048-i8-e2-k1-bf16-random"), "layers", "why")
    *_, run = worker._Cases(BUG, {"partly": Partly()}, CPU, ()).of((row,))
    assert run.status == word and run.reason.startswith("CompilationError")
