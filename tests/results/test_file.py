"""results/file.py: every record is in the file at the end, or in another that the message names."""

import json
import os
import subprocess
import sys

import pytest

from harness.base.processes import ROOT
from harness.results import file as module
from harness.results.file import SCHEMA, PlannedItem, Results, ResultsError, git_changes, git_commit, split_nodeid
from harness.results.merge import merge
from harness.results.reader import read_results
from harness.results.verdict import Verdict

ITEM = PlannedItem("cases/test_layers.py::test_layers[t1-h64:triton:cpu]", "layers", "t1-h64", "triton", "cpu")


def verdict(status="passed", **more):
    return Verdict("t1-h64", "triton", "cpu", status, "layers", **more).record() | {"nodeid": ITEM.nodeid}


def begun(path, **more):
    results = Results(path, {"commit": "abc"}, **more)
    results.plan([ITEM])
    return results


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


def test_a_run_begins_has_a_plan_and_ends(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    results = begun(path)
    results.append(verdict("failed", budget=float("inf")))
    assert path.read_text().endswith("\n") and kinds(path) == ["begin", "plan", "verdict"]  # at once
    assert results.end(1, 2.34) == []
    found = read_results(path)
    (begin,), (plan,), (record,), (end,) = found.begins, found.plans, found.records, found.ends
    assert plan["total"] == 1 and plan["counts"] == {"triton@cpu": {"layers": 1}}
    assert plan["items"] == {"cases/test_layers.py::test_layers": ["t1-h64:triton:cpu"]}
    assert (end["exit"], end["planned"], end["verdicts"], end["counts"], end["seconds"]) == (
        1,
        1,
        1,
        {"failed": 1},
        2.3,
    )
    assert {(r["schema"], r["run"], r["commit"]) for r in (begin, plan, record, end)} == {(SCHEMA, results.run, "abc")}
    assert record["budget"] == "inf" and record["time"] and "continues" not in begin
    assert found.remarks == found.problems == []


def test_a_run_that_goes_on_has_its_name_and_says_so(tmp_path):
    path = tmp_path / "r.jsonl"
    first = begun(path)
    first.close()
    second = begun(path, run=first.run)
    second.append(verdict())
    second.end(0, 1.0)
    found = read_results(path)
    assert [r.get("continues", False) for r in found.begins] == [False, True]
    assert {r["run"] for r in found.begins + found.records + found.ends} == {first.run}


def test_two_runs_of_one_second_have_two_names(tmp_path):
    assert begun(tmp_path / "a").run != begun(tmp_path / "a").run


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "r.jsonl"
    begun(path).end(0, 1.0)
    path.write_text(path.read_text() + '{"schema": 1, "case": "t1-')
    again = begun(path)
    again.append(verdict())
    again.end(0, 1.0)
    found = read_results(path)
    assert len(found.records) == 1 and len(found.ends) == 2
    assert found.remarks == [f"1 line cut off by a crash, left out: {path}:4"] and found.problems == []


def _delete(path):
    path.unlink()


def _replace(path):
    (path.parent / "other").write_text("other\n")
    os.replace(path.parent / "other", path)


def _truncate(path):
    os.truncate(path, 100)


def _overwrite(path):
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"\0" * 80)


@pytest.mark.parametrize("spoil", (_delete, _replace, _truncate, _overwrite))
def test_a_file_that_lost_a_record_is_written_again_beside_it(tmp_path, spoil):
    path = tmp_path / "r.jsonl"
    results = begun(path)
    spoil(path)
    results.append(verdict())
    (line,) = results.end(0, 1.0)
    recovered = tmp_path / "r.recovered-1.jsonl"
    assert line.startswith(f"--results {path}: ") and line.endswith(f"all records of this run are in {recovered}")
    assert kinds(recovered) == ["begin", "plan", "verdict", "end"] and merge([recovered]).problems == []


def test_what_is_recovered_replaces_nothing(tmp_path):
    (tmp_path / "r.recovered-1.jsonl").write_text("mine")
    results = begun(tmp_path / "r.jsonl")
    _delete(tmp_path / "r.jsonl")
    assert results.end(0, 1.0)[0].endswith("r.recovered-2.jsonl")
    assert (tmp_path / "r.recovered-1.jsonl").read_text() == "mine"


def test_a_folder_that_is_gone_is_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    results = begun(tmp_path / "new" / "r.jsonl")
    _delete(tmp_path / "new" / "r.jsonl")
    (tmp_path / "new").rmdir()
    assert results.end(0, 1.0)[0].endswith(f"{tmp_path}/r.recovered-1.jsonl")


def test_other_runs_may_write_to_the_same_file(tmp_path):
    path = tmp_path / "r.jsonl"
    one, other = begun(path), begun(path)
    for results in (one, other, one):
        results.append(verdict())
    assert one.end(0, 1.0) == other.end(0, 1.0) == []
    assert merge([path]).problems == []


class Disk:
    """os.write on a disk that takes so many bytes more, then only what `more` adds."""

    def __init__(self, monkeypatch, size):
        self.size, self.write = size, os.write
        monkeypatch.setattr(module.os, "write", self)

    def __call__(self, file, data):
        if self.size == 0 and data:
            raise OSError(28, "No space left on device")
        part = data[: self.size]
        self.size -= len(part)
        return self.write(file, part)


@pytest.mark.parametrize("size", (0, 50))
def test_a_full_disk_costs_no_record_if_there_is_space_at_the_end(tmp_path, monkeypatch, size):
    results = begun(tmp_path / "r.jsonl")
    disk = Disk(monkeypatch, size)
    results.append(verdict())
    results.append(verdict())
    disk.size = 10**6
    assert results.end(0, 1.0) == []
    merged = merge([tmp_path / "r.jsonl"])
    assert len(merged.records) == 1 and merged.problems == []


def test_a_disk_that_stays_full_costs_no_record(tmp_path, monkeypatch):
    results = begun(tmp_path / "r.jsonl")
    Disk(monkeypatch, 0)
    results.append(verdict())
    (line,) = results.end(0, 1.0)
    assert "2 records of 4 are not in it any more (No space left on device); all records of this run are in" in line


def test_a_run_does_not_begin_on_a_full_disk(tmp_path, monkeypatch):
    Disk(monkeypatch, 0)
    with pytest.raises(ResultsError, match="--results .*r.jsonl: No space left on device"):
        begun(tmp_path / "r.jsonl")


def test_a_descriptor_that_a_backend_has_closed_is_not_written_to(tmp_path):
    results = begun(tmp_path / "r.jsonl")
    os.close(results._file)
    with (tmp_path / "other").open("wb") as other:
        assert other.fileno() == results._file  # the system gives the number away again
        results.append(verdict())
        assert results.end(0, 1.0) == []
    assert (tmp_path / "other").read_bytes() == b"" and merge([tmp_path / "r.jsonl"]).problems == []


def test_a_forked_child_writes_nothing(tmp_path):
    program = f"""
import os
from pathlib import Path
from harness.results.file import Results
results = Results(Path({str(tmp_path / "r.jsonl")!r}), {{}})
child = os.fork()
results.append({{"status": "passed"}})
results.end(0, 1.0)
if child: os.waitpid(child, 0)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert kinds(tmp_path / "r.jsonl") == ["begin", "verdict", "end"]


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(ResultsError, match="--results .*: Is a directory"):
        begun(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null", "/dev/full"):
        with pytest.raises(ResultsError, match="No such device or address|not a regular file"):
            begun(type(tmp_path)(path))


@pytest.mark.parametrize(
    "nodeid, parts",
    [("a.py::f[x:y]", ("a.py::f", "x:y")), ("a[1].py::f[x[2]]", ("a[1].py::f", "x[2]")), ("a.py::f", ("a.py::f", ""))],
)
def test_a_pytest_id_in_two_parts(nodeid, parts):
    assert split_nodeid(nodeid) == parts


def test_the_state_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) == "unknown" and git_changes(tmp_path) == ""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "a.py"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit = git_commit(tmp_path)
    assert len(commit) == 40 and git_changes(tmp_path) == ""
    (tmp_path / "b.py").write_text("new")
    new = git_changes(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes" and len({"", new, git_changes(tmp_path)}) == 3
