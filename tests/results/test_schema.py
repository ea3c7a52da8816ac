"""results/schema.py and reader.py: one table of fields; a damaged record costs itself, and a line reports it."""

import json
import time
from functools import cache

import pytest

from harness import cli
from harness.base.processes import ROOT
from harness.ci import gather
from harness.results import reader
from harness.results.file import JsonLines
from harness.results.merge import merge
from harness.results.reader import LONGEST, START, SUSPECT, read_results, seconds
from harness.results.schema import problem, published
from harness.results.verdict import Verdict
from tests.support.hostile_results import good, harmless_results, hostile_results
from tests.support.results_files import write_run

VARIANTS = [*hostile_results(), *harmless_results()]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "MOE_HARNESS_ROW", "MOE_HARNESS_SHARD"):
        monkeypatch.delenv(name, raising=False)


# -- the published schema ---------------------------------------------------------------------------------------------
@cache
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(published())
    return jsonschema.Draft202012Validator(published())


def test_the_published_schema_is_current():
    text = (ROOT / "docs" / "results.schema.json").read_text()
    assert text == json.dumps(published(), indent=1) + "\n", (
        "print it anew: python3 -m harness.results.schema > docs/results.schema.json"
    )


def test_the_published_schema_accepts_what_is_written(tmp_path):
    full = Verdict("t1-h64", "triton", "cpu", "failed", reason="\x1b::x\n", report="r" * 10**6, output="o" * 10**5)
    full.budget, full.notes, full.device_lost = float("inf"), ["a"] * 99, True
    full.trace = {"launches": ["k"] * 9999, "operators": 3, "allocations": 2, "allocated_bytes": 10**400}
    full.perf = {"device_us": 1.5, "ceilings": {"copy_bytes_per_s": 1e12, "flops_per_s": {"bf16": 1e15}}}
    full.perf |= {"samples_us": [1.0, float("nan")], "clocks": {"driver_version": "1"}, "configurations": ["a"]}
    facts = {
        "versions": {"python": "3.12"},
        "environment": {"cpu": {"host": "a"}},
        "options": {"seed": 3, "paths": ["a"]},
    }
    write_run(
        tmp_path / "r.jsonl", [full.record()], missing=[Verdict("t2", "triton", "cpu", "passed").record()], **facts
    )
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in lines] == ["begin", "plan", "verdict", "end"]
    for record in lines:
        assert problem(record) == "" and list(validator().iter_errors(record)) == []


def test_the_published_schema_agrees_with_the_reader():
    files = [content.splitlines() for _, content in VARIANTS if content.count(b"\n") < 20]
    lines = {line for every in files for line in every if len(line) < 10**6}
    both = {True: 0, False: 0}
    for line in lines:
        try:
            record = reader._parsed(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            valid = problem(record) == ""
            assert validator().is_valid(record) == valid, (problem(record), line[:500])
            both[valid] += 1
    assert both[True] > 20 and both[False] > 200


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"budget": "x"}, "budget='x': valid is a number from 0 to 1e+300 or 'inf'"),
        (
            {"status": "great"},
            "status='great': valid is one of passed, failed, mistrusted, unsupported, crashed, hung, known",
        ),
        ({"shard": "1/100000000"}, "shard='1/100000000': valid is text of at most 9 characters"),
        (
            {"trace": {"launches": {}}},
            "trace={'launches': {}}: valid is a table; in it launches={}: valid is a list of at",
        ),
        ({"calls": True}, "calls=True: valid is a whole number from 0 to 1e+15"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_valid(fields, words):
    assert problem(good()[2] | fields).startswith(words)


# -- the reader -------------------------------------------------------------------------------------------------------
def test_there_are_many_hostile_files():
    names = [name for name, _ in VARIANTS]
    assert len(names) == len(set(names)) > 300


@pytest.mark.parametrize("part", range(8))
def test_no_hostile_file_is_green_or_a_traceback_or_slow(tmp_path, capsys, part):
    path = tmp_path / "r.jsonl"
    for name, content in list(hostile_results())[part::8]:
        path.write_bytes(content)
        started = time.process_time()
        code = gather.main([str(path)])
        out, err = capsys.readouterr()
        assert code in (1, 2), name
        assert time.process_time() - started < 2 and len(out + err) < 10_000, name
        assert "Traceback" not in out + err and not any(ord(c) < 32 and c not in "\n\t" for c in out + err), name


@pytest.mark.parametrize("part", range(4))
def test_no_command_traces_back_on_a_hostile_file(tmp_path, capsys, part):
    path = tmp_path / "r.jsonl"
    for name, content in list(hostile_results())[part::16]:
        path.write_bytes(content)
        for words in (["report", str(path), "--out", str(tmp_path / "r.html")], ["floor", str(path)]):
            assert cli.main(words) in (1, 2), (name, words)
        assert cli.main(["matrix", "--durations", str(path)]) in (0, 2), name


@pytest.mark.parametrize("name, content", list(harmless_results()))
def test_what_only_looks_odd_is_good(tmp_path, name, content):
    (tmp_path / "r.jsonl").write_bytes(content)
    merged = merge([tmp_path / "r.jsonl"])
    assert merged.problems == [] and len(merged.records) == 3


def test_a_record_that_is_not_valid_costs_itself(tmp_path):
    records = good()
    records[3]["calls"] = -1
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"schema": 3, **r}) + "\n" for r in records))
    found = read_results(path)
    assert len(found.records) == 2
    assert found.problems == [
        f"1 record not valid, left out: {path}:4: calls=-1: valid is a whole number from 0 to 1e+15"
    ]


def test_a_line_that_is_too_long_is_skipped(tmp_path):
    path = tmp_path / "r.jsonl"
    write_run(path, [Verdict("t1-h64", "triton", "cpu", "passed").record()])
    path.write_bytes(START.encode() + b"3" * (2 * LONGEST) + b"\n" + path.read_bytes())
    found = read_results(path)
    assert len(found.records) == 1 and found.problems == [
        f"1 record not valid, left out: {path}:1: a line of more than {LONGEST} bytes"
    ]


@pytest.mark.parametrize(
    "text",
    ["\x1b[31m", "::error::x", "a\n::x", "a\n\t ::x", "##[group]", "\u202e", "\x85::x", "a\r::b", "\ud800", "\x7f"],
)
@pytest.mark.parametrize("ascii_only", (True, False))
def test_every_text_that_is_not_inert_is_suspect(text, ascii_only):
    line = json.dumps({"a": text}, ensure_ascii=ascii_only)
    assert SUSPECT.search(line) and not SUSPECT.search(json.dumps({"a": "b", "nodeid": "a.py::b[c:d]", "n": "a\nb"}))


def test_texts_are_inert_once_they_are_read(tmp_path):
    record = good()[2] | {"reason": "\x1b[2J\n::error::x", "known": "##[error]\u202e"}
    file = JsonLines(tmp_path / "r.jsonl")
    file.write(record)
    assert file.finish() == []
    (found,) = read_results(tmp_path / "r.jsonl").records
    assert found["reason"] == "\\x1b[2J\n\\::error::x" and found["known"] == "##\\[error]\\u202e"


@pytest.mark.parametrize(
    "time", ("9999-12-31T23:59:59-2359", "0001-01-01T00:00:00+2359", "now", "", "2026-13-01T00:00:00+0000")
)
def test_odd_times_are_no_error(time):
    assert seconds(time) <= 253402387140  # the end of the year 9999, in the westernmost zone
