"""base/arguments.py: the types of options, suggestions, positional arguments after options."""

import argparse
import os

import pytest

from harness.base.arguments import (
    Parser,
    folder,
    integer,
    number,
    positionals_after_options,
    positive_seconds,
    seconds,
    writable_file,
)
from harness.base.errors import UserError


@pytest.fixture
def parser():
    """`prog command BASE [CASE ...]`, with the options --backend and --quiet."""
    parser = argparse.ArgumentParser(prog="prog")
    sub = parser.add_subparsers().add_parser("command")
    sub.add_argument("base")
    sub.add_argument("--backend")
    sub.add_argument("--quiet", action="store_true")
    sub.add_argument("case", nargs="*")
    positionals_after_options(sub, "case")
    return parser


@pytest.mark.parametrize(
    ("words", "case"),
    [
        ("b", []),
        ("b c d", ["c", "d"]),
        ("b --backend x c d", ["c", "d"]),
        ("b c --backend x d", ["c", "d"]),
        ("b --backend x -- -k c", ["-k", "c"]),
        ("b --backend x c -- --quiet", ["c", "--quiet"]),
        ("b -- c -- d", ["c", "--", "d"]),
    ],
)
def test_words_after_options_and_after_two_dashes_are_values(parser, words, case):
    args = parser.parse_args(["command", *words.split()])
    assert (args.base, args.case, args.quiet) == ("b", case, False)


def test_an_unknown_option_is_an_error(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["command", "b", "--backend", "x", "--nix", "c"])
    assert "unrecognized arguments: --nix" in capsys.readouterr().err


# -- types ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["-1", "", " 1", "1_0", "１６", "1.5", "0x10", "nan", "9" * 400, "101", "x" * 10**6])
def test_an_integer_is_of_ascii_digits_and_in_its_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer from 0 to 100$"):
        integer(0, 100)(text)
    assert [integer(0, 100)(good) for good in ("0", "7", "100")] == [0, 7, 100]


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1e999", "", "１６", "1_0", "0x10", "x" * 10**6, "0"])
def test_a_number_is_finite_and_in_its_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a number above 0, at most 10000000$"):
        positive_seconds(text)
    assert (positive_seconds("1.5"), positive_seconds("2e3"), number(0.5, 1)("1")) == (1.5, 2000.0, 1.0)


def test_seconds_may_be_none():
    assert seconds("0") == 0.0


@pytest.mark.parametrize("path", [".", "/dev/null/x", "file/x", "a\0b", "x" * 10_000, "", "fifo", "dangling/x"])
def test_a_file_that_cannot_be_written_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(argparse.ArgumentTypeError):
        writable_file(path)
    if path not in (".", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            folder(path)


def test_a_file_and_a_folder_that_can_be_made_are_not_made_yet(tmp_path):
    assert writable_file(f"{tmp_path}/a/b.md") == tmp_path / "a" / "b.md" == folder(f"{tmp_path}/a/b.md")
    assert writable_file("/dev/full").exists() and folder(str(tmp_path)) == tmp_path
    assert list(tmp_path.iterdir()) == []


# -- errors -----------------------------------------------------------------------------------------------------------
def test_a_misspelt_choice_is_suggested():
    parser = Parser(prog="prog")
    parser.add_argument("--device", choices=("cpu", "xpu"))
    with pytest.raises(UserError, match="^argument --device: cpx: no such word; did you mean 'cpu'.; see prog --help$"):
        parser.parse_args(["--device", "cpx"])
    with pytest.raises(UserError, match="zzz: no such word; one of cpu, xpu; see prog --help$"):
        parser.parse_args(["--device", "zzz"])
    assert parser.parse_args(["--device", "xpu"]).device == "xpu"
