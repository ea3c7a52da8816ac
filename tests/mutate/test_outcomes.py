"""mutate/outcomes.py and summary.py: stored outcomes, read back and printed."""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from harness.base.errors import UserError
from harness.commands import mutate
from harness.mutate import outcomes, summary
from harness.mutate.bugs import Bug
from harness.mutate.outcomes import Outcome
from harness.mutate.protocol import MutantRun, Settings
from harness.results.merge import merge
from harness.results.reader import read_results
from harness.results.verdict import Verdict
from tests.support.results_files import write_run

BUG = Bug("made-up", "made_up", "x#1", (), "layers", ("bias", "e4m3"), ("triton",))


def outcome(name, word, kind="made_up", **by):
    run = MutantRun("t1-h16-i16-e2-k1-bf16-exact", "tiny", "layers", by.pop("status", "passed"), **by)
    return Outcome(name, kind, "x#1", word, run if run.decisive else None, runs=[run])


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
    assert mutate._exit_code(Namespace(floor=floor), outcomes) == code
    assert bool(capsys.readouterr().out) == bool(code)


def test_outcomes_of_runs():
    def word(bug, *statuses):
        return outcomes.outcome_of(bug, [MutantRun("t1", "tiny", "layers", status) for status in statuses], 1.0).outcome

    control = replace(BUG, kind="controls")
    assert word(BUG, "passed", "mistrusted") == "survived" and word(control, "passed", "mistrusted") == "innocent"
    for status in ("failed", "promise", "crashed", "hung", "died", "structure"):
        assert word(BUG, "passed", status) == "killed" and word(control, status, "passed") == "accused"
    assert word(BUG, "failed", "error") == word(control, "error") == "error", "an error of the harness decides"
    assert word(BUG, "stillborn") == word(control, "stillborn") == "stillborn"
    assert word(BUG) == word(control) == "unasked"


def test_records_come_back_as_they_were_written(tmp_path):
    stored = outcome("a", "killed", status="failed", reason="because", more={"seen": 1, "rejected": ["fla"]})
    stored.runs.append(MutantRun("t2", "tiny", "layers", "passed"))
    stored.digest = "d"
    file = outcomes.OutcomesFile(tmp_path / "r.jsonl", "cpu")
    file.append(stored)
    file.close()
    write_run(tmp_path / "r.jsonl", [Verdict("t1", "tiny", "cpu", "passed").record()])  # of another command
    again = outcomes.OutcomesFile(tmp_path / "r.jsonl", "cpu")
    assert again.get("d") == stored and again.get("another") is None
    assert read_results(tmp_path / "r.jsonl").problems == [] and len(merge([tmp_path / "r.jsonl"]).records) == 1


def test_an_outcome_that_is_lost_is_told(tmp_path):
    file = outcomes.OutcomesFile(tmp_path / "r.jsonl", "cpu")
    file.append(outcome("a", "killed"))
    (tmp_path / "r.jsonl").unlink()
    assert "r.recovered-1.jsonl" in file.close()[0]


def test_the_digest_of_an_entry_depends_on_the_entry_and_the_settings():
    mark = outcomes.entry_digest(BUG, Settings(), "suite")
    assert mark == outcomes.entry_digest(
        replace(BUG, survives="for a reason", source="x#2"), Settings(memory=1), "suite"
    )
    others = [
        outcomes.entry_digest(replace(BUG, words=()), Settings(), "suite"),
        outcomes.entry_digest(BUG, Settings(more=30), "suite"),
        outcomes.entry_digest(BUG, Settings(), "another suite"),
    ]
    assert len({mark, *others}) == 4


def test_an_explanation_that_no_longer_holds_is_reported():
    lines = summary.summary_lines(
        [outcome("a", "killed", status="hung")], {"a": replace(BUG, survives="never")}, whole=False
    )
    assert lines[0] == "its entry says that it survives, but it was killed: a"


def test_shares_by_family_fill_and_dtype_count_the_bugs_that_ran_such_a_case():
    noticed, not_noticed = outcome("a", "killed", status="failed"), outcome("b", "survived")
    control = outcome("c", "accused", "controls", status="failed")
    text = "\n".join(summary.summary_lines([noticed, not_noticed, control], {}, whole=True))
    assert re.search(r"family +layers +1 +2 +50.0% +1 +1", text)
    assert re.search(r"fill +exact +1 +2 +50.0% +1 +1", text)
    assert re.search(r"dtype +bf16 +1 +2 +50.0% +1 +1", text)


@pytest.mark.parametrize(
    "words, names", [(["a-*"], ["a-1", "a-2"]), (["b-1", "a-1"], ["b-1", "a-1"]), (["kind"], ["b-1"]), ([], None)]
)
def test_entries_are_named_by_name_class_or_pattern(words, names):
    known = {name: replace(BUG, name=name) for name in ("a-1", "a-2")} | {"b-1": replace(BUG, name="b-1", kind="kind")}
    assert list(mutate._select(known, words)) == (names or list(known))


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="unknown: no entry of that name or pattern; classes: made_up"):
        mutate._select({"a": BUG}, ["unknown"])
    with pytest.raises(UserError, match="--against strict: no such rule; one of assert_close, vllm"):
        mutate._rules(Namespace(against="strict", markdown=None))
    with pytest.raises(UserError, match="--markdown: needs --against RULE"):
        mutate._rules(Namespace(against=None, markdown=Path("t.md")))
