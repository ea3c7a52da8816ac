"""base/arguments.py: positional arguments after options."""

import argparse

import pytest

from harness.base.arguments import positionals_after_options


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
