"""results/merge.py: any number of results files, whatever state they are in, and nothing dropped in silence."""

import json
import os

import pytest

from harness.results.file import SCHEMA, ResultsError
from harness.results.merge import files, merge
from harness.results.verdict import Verdict
from tests.support.results_files import write_run

NOW = "2026-11-22T13:00:00+0000"


def record(case="t1-h64", status="passed", run=f"{NOW} 1", **more):
    found = Verdict(case, "triton", "cpu", status, "layers").record()
    facts = {"schema": SCHEMA, "kind": "verdict", "run": run, "commit": "abc", "time": NOW}
    return {**facts, **found, "nodeid": f"cases/test_layers.py::test_layers[{case}:triton:cpu]", **more}


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(*paths):
    """The verdicts, and the remarks."""
    found = merge(paths)
    return found.records, found.remarks


def test_what_the_harness_writes_is_read(tmp_path):
    write_run(tmp_path / "r.jsonl", [Verdict("t1-h64", "triton", "cpu", "failed", budget=float("inf")).record()])
    found = merge([tmp_path / "r.jsonl"])
    assert [(r["case"], r["budget"], r["commit"]) for r in found.records] == [("t1-h64", "inf", "abc")]
    assert found.remarks == found.problems == [] and found.runs[0].whole


def test_files_of_many_machines_in_the_order_in_which_they_were_written(tmp_path):
    write(tmp_path / "a.jsonl", record("t1-h64", time="2026-11-22T13:00:02+0000"), record("t2-h64"))
    write(tmp_path / "deep" / "er" / "b.jsonl", record("t3-h64", time="2026-11-22T13:00:01+0000"))
    write(tmp_path / "deep" / "notes.txt", "not asked for")
    found, remarks = read(tmp_path)
    assert [r["case"] for r in found] == ["t2-h64", "t3-h64", "t1-h64"] and remarks == []
    assert [r["case"] for r in merge([tmp_path / "*.jsonl"]).records] == ["t2-h64", "t1-h64"]
    assert len(merge([str(tmp_path / "**" / "*.jsonl")]).records) == 3


def test_a_line_cut_by_a_crash_is_left_out(tmp_path):
    whole = json.dumps(record("t2-h64"))
    path = write(tmp_path / "r.jsonl", record(), whole[:70], whole, whole[:20])
    found, remarks = read(path)
    assert [r["case"] for r in found] == ["t1-h64", "t2-h64"]
    assert remarks == [f"2 lines cut off by a crash, left out: {path}:2, {path}:4"]


def test_a_record_behind_the_remains_of_another_is_not_lost(tmp_path):
    path = write(tmp_path / "r.jsonl", json.dumps(record())[:90] + json.dumps(record("t2-h64")))
    found, remarks = read(path)
    assert [r["case"] for r in found] == ["t2-h64"] and remarks == [
        f"1 line cut off by a crash, left out: {path}:1",
    ]


def test_a_file_of_one_cut_line_alone_is_a_problem(tmp_path):
    found = merge([write(tmp_path / "r.jsonl", '{"schema": 2, "ru')])
    assert found.records == [] and found.remarks == [f"1 line cut off by a crash, left out: {tmp_path}/r.jsonl:1"]
    assert found.problems == [f"{tmp_path}/r.jsonl: holds no records: a run that ended before its first verdict?"]


def test_the_same_record_twice_counts_once(tmp_path):
    write(tmp_path / "a.jsonl", record(), record("t2-h64"))
    write(tmp_path / "again" / "a.jsonl", record(), record("t2-h64"))
    found, remarks = read(tmp_path, tmp_path / "a.jsonl")
    assert len(found) == 2 and remarks == ["2 records there a second time, counted once"]


def test_the_same_case_in_a_later_run_is_history(tmp_path):
    found, remarks = read(write(tmp_path / "r.jsonl", record(), record(run=f"{NOW} 2")))
    assert len(found) == 2 and remarks == []


def test_the_same_case_at_another_place_is_another(tmp_path):
    more = [record(), record(row="h200"), record(device="xpu (emulated)"), record(family="scratch")]
    more += [record(environment={"host": "aarch64"})]
    found, remarks = read(write(tmp_path / "r.jsonl", *more))
    assert len(found) == 5 and remarks == []


@pytest.mark.parametrize("order", (["failed", "passed"], ["passed", "failed"]))
def test_a_repetition_that_was_green_hides_no_red_one(tmp_path, order):
    found, remarks = read(write(tmp_path / "r.jsonl", *[record(status=status) for status in order]))
    assert [r["status"] for r in found] == ["failed"]
    assert remarks == [
        "1 record written again by the same run, the red one counts, else the later: t1-h64 on triton",
    ]


def test_a_repetition_that_is_no_worse_replaces(tmp_path):
    path = write(tmp_path / "r.jsonl", record(seconds=1.0), record(seconds=2.0))
    assert [r["seconds"] for r in merge([path]).records] == [2.0]


def test_older_versions_are_read_and_newer_ones_are_a_problem(tmp_path):
    newer = record("t3-h64", schema=SCHEMA + 1)
    path = write(tmp_path / "r.jsonl", record(schema=1), record("t2-h64", schema=2), record("t4-h64"), newer, newer)
    found = merge([path])
    assert [r["case"] for r in found.records] == ["t1-h64", "t2-h64", "t4-h64"]
    assert found.remarks == [
        "1 record of an older version (schema 1): read, without what is new",
        "1 record of an older version (schema 2): read, without what is new",
    ]
    assert found.invalid[0].startswith(f"2 records not valid, left out: {path}:4: schema=4: valid is 1 to 3; a later")


def test_an_older_record_has_the_fields_of_a_new_one(tmp_path):
    old = {"schema": 1, "case": "t1", "backend": "mine", "device": "cpu", "status": "failed"}
    (found,), _ = read(write(tmp_path / "r.jsonl", old))
    assert found.keys() >= set(record()) - {"run", "commit", "time"}


def test_an_empty_file_is_a_run_that_said_nothing(tmp_path):
    write_run(tmp_path / "a.jsonl", [record()])
    (tmp_path / "b.jsonl").write_text("\n")
    found = merge([tmp_path])
    assert len(found.records) == 1
    assert found.problems == [f"{tmp_path}/b.jsonl: holds no records: a run that ended before its first verdict?"]


@pytest.mark.parametrize(
    "content, begins",
    [
        (b"<html>Not found</html>", "'<html>Not found</html>'"),
        (b'[{"schema": 2}]', "'[{\"schema\": 2}]'"),
        (b'{"benchmarks": []}', "'{\"benchmarks\": []}'"),
        (b"\x1f\x8b\x08\x00\xff\xfe", "'\\x1f"),
    ],
)
def test_a_file_that_is_no_results_file_is_named(tmp_path, content, begins):
    write(tmp_path / "a.jsonl", record())
    (tmp_path / "z.jsonl").write_bytes(content)
    with pytest.raises(ResultsError) as error:
        merge([tmp_path])
    assert str(error.value).startswith(f"{tmp_path}/z.jsonl: no results file: line 1 begins {begins}")


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(ResultsError, match="nothing.jsonl: no such file, directory, or file of this pattern"):
        merge([tmp_path / "nothing.jsonl"])
    with pytest.raises(ResultsError, match="a directory must have .*jsonl files below it"):
        merge([tmp_path])


def test_what_is_no_regular_file_is_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path, tmp_path / "pipe.jsonl", "/dev/zero"):
        with pytest.raises(ResultsError, match="(pipe.jsonl|/dev/zero): not a regular file"):
            merge([path])
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "r.jsonl").symlink_to("r.jsonl")
    for path in ("x" * 5000, "a\0b", tmp_path / "circle", tmp_path / "circle" / "r.jsonl"):
        with pytest.raises(ResultsError):
            merge([path])


def test_a_file_that_is_given_twice_is_read_once(tmp_path):
    path = write(tmp_path / "a.jsonl", record())
    (tmp_path / "link.jsonl").symlink_to(path)
    assert len(files([tmp_path, path, tmp_path / "a*"])) == 1
