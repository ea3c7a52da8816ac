"""base/toml.py and the readers on top of it: whatever a file holds, one line says what is wrong."""

import os

import pytest

from harness.base import toml
from harness.base.errors import UserError
from harness.ci import durations, matrix
from harness.mutate import bugs
from harness.perf.count import baseline_file
from harness.results import floor, known_failures
from tests.support.hostile_inputs import hostile_toml

READERS = {
    "matrix": matrix.read,
    "durations": durations.read,
    "floor": floor.read_floor,
    "known failures": known_failures.read,
    "baseline": baseline_file.read,
    "bugs": lambda path: bugs.read(path.parent),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_hostile_file_is_one_line(reader, tmp_path):
    path = tmp_path / "x.toml"
    for name, content in hostile_toml():
        path.write_bytes(content)
        try:
            entries = READERS[reader](path)
        except UserError as error:
            assert str(error).isprintable() and 0 < len(str(error)) <= 2000, name
        else:
            assert reader == "known failures" and entries == [], f"{name}: read as {entries}"


@pytest.mark.parametrize("path", ["fifo", "folder", "/dev/zero", "none", "a\0b", "x" * 10_000])
def test_only_a_regular_file_is_opened(path, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as raised:
        toml.read(tmp_path / path, UserError)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" + b".b" * 5000 + b" = 1", "x: a line with more than 300 dots"),
        (b"a = " + b"[" * 5000, "x: too many levels"),
        (b"# \xff", "x: must be UTF-8: invalid start byte at byte 2"),
        (b"# " + b"x" * toml.MOST, "x: valid are at most 4000000 bytes"),
    ],
)
def test_the_message_says_what_is_wrong(content, message, tmp_path):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(UserError) as raised:
        toml.read(tmp_path / "x.toml", UserError, "x")
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        ("floor", "", "demands nothing; valid: tables [DEVICE] of counts by backend"),
        ("floor", "[cpu]", "demands nothing; valid: tables [DEVICE] of counts by backend"),
        ("durations", "[mean.cpu.a]", "holds no durations; the tables are [mean...] and [slow...]"),
        ("durations", "[mean.cpu.a]\nb = -1", "[mean.DEVICE.FAMILY] b=-1: must be seconds, from 0 to 10000000"),
        ("durations", "[slow]\nb = nan", "b=nan: must be a table, [slow.DEVICE]"),
        ("durations", "[slow.cpu]\nb = nan", "[slow.DEVICE] b=nan: must be seconds, from 0 to 10000000"),
        ("bugs", "", "holds no entry; an entry is a table [NAME] in a file *.toml"),
        ("bugs", "[a]\nsource=1\nedit='a'\nold='a'\nnew='a'\nreveals='a'", "a: source=1: must be text"),
        (
            "bugs",
            "[a]\nsource='a'\nedit='../conftest.py'\nold='a'\nnew='a'\nreveals='a'",
            "a: edit='../conftest.py': must be a file under kernels/",
        ),
        ("baseline", "", 'holds no cases; a case is a table, ["DESCRIPTOR @ BACKEND"]'),
        ("baseline", "versions = 1\n['a @ b']\nwhy='c'", "versions=1: must be a table of strings, [versions]"),
        ("baseline", "['a @ b']\nwhy='c'\nneeds='d'", "[\"a @ b\"] needs='d': must be a list of packages"),
    ],
)
def test_values_that_have_no_meaning_are_named(reader, text, message, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError) as raised:
        READERS[reader](tmp_path / "x.toml")
    assert str(raised.value).endswith(message)


def test_allocations_that_a_baseline_repeats_without_end_are_refused():
    with pytest.raises(ValueError, match="must be from 1 to 1000000"):
        baseline_file._repeated(f"{10**12} x empty")
