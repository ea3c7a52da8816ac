"""mutate/cause_score.py: right names, wrong names, and missing names."""

import pytest

from harness.diagnose.match import fault_id
from harness.mutate.bugs import Bug, BugError, read
from harness.mutate.cause_score import score
from harness.mutate.outcomes import Outcome
from harness.mutate.protocol import MutantRun

TWICE, MISSING = "router weight applied twice", "router weight missing"


def bug(name, cause="", kind="bias"):
    return Bug(name, kind, "somewhere#1", (), "layers", (), ("triton",), cause)


def outcome(name, named, status="failed"):
    by = MutantRun("t1-h64", "triton", "layers", status, more={"cause": named}) if status else None
    return Outcome(name, "bias", "somewhere#1", "killed" if by else "survived", by)


def test_right_wrong_and_silent_are_told_apart():
    bugs = {b.name: b for b in (bug("a", TWICE), bug("b", TWICE), bug("c", TWICE), bug("d"), bug("e"), bug("f", TWICE))}
    outcomes = [
        outcome("a", TWICE), outcome("b", MISSING), outcome("c", ""), outcome("d", MISSING), outcome("e", ""),
        outcome("f", "", "crashed"), outcome("gone", TWICE), outcome("f", "", ""),
    ]  # fmt: skip
    found = score(outcomes, bugs)
    assert [len(x) for x in (found.right, found.wrong, found.silent, found.foreign)] == [1, 2, 1, 1]
    assert found.lines() == [
        "of 5 mutants that return a wrong output the bank has the fault of 3: named first for 1 (33%), "
        "not named for 1; "
        "a wrong name for 2 of all",
        f"  b: {MISSING!r} for {TWICE!r}",
        f"  d: {MISSING!r} for 'a fault that the bank does not have'",
        f"  c: nothing for {TWICE!r}",
    ]


def test_controls_are_not_asked_about_and_nothing_is_nothing():
    found = score([outcome("a", TWICE)], {"a": bug("a", TWICE, kind="controls")})
    assert found.lines()[0].startswith("of 0 mutants that return a wrong output")
    assert "named first for 0, not" in found.lines()[0]


def test_a_cause_must_be_the_text_of_a_fault():
    with pytest.raises(BugError, match="bias.toml: a: cause='router weight thrice': no fault has that text"):
        score([outcome("a", "")], {"a": bug("a", "router weight thrice")})


def test_every_cause_of_the_entries_is_the_text_of_a_fault():
    assert [b.name for b in read().values() if b.cause and fault_id(b.cause) is None] == []


def test_a_name_is_compared_by_its_id_and_a_text_of_no_fault_is_wrong():
    outcomes = [outcome("a", "w13 of the previous call"), outcome("b", "a text of an older bank")]
    result = score(outcomes, {"a": bug("a", "w13 of the previous call"), "b": bug("b")})
    assert [name for name, _, _ in result.right] == ["a"] and [name for name, _, _ in result.wrong] == ["b"]
