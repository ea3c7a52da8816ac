"""base/errors.py: the message of an error is one inert line, and values in it are short."""

import pytest

from harness.base.errors import MOST, UserError, bare, shown


def nested(depth: int) -> dict:
    table: dict = {}
    for _ in range(depth):
        table = {"a": table}
    return table


@pytest.mark.parametrize(
    "text", ["a\nb\r\nc", "\x1b[31m", "\u202e", "\u2028::error::x", "x" * 10**6, "\ud800", "::error::" + "\n" * 5000]
)
def test_a_message_is_one_inert_line_of_bounded_length(text):
    line = str(UserError(text))
    assert line.isprintable() and len(line) <= MOST and not line.startswith("::")


def test_a_long_message_keeps_its_head_and_its_end():
    line = str(UserError("field: " + "x" * 5000 + ": valid are 1 and 2"))
    assert len(line) == MOST and line.startswith("field: xx") and line.endswith("xx: valid are 1 and 2")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("tpu", "'tpu'"),
        (1.5, "1.5"),
        (True, "True"),
        (-1, "-1"),
        (10**30, str(10**30)),
        (1 << 40_000, "(an integer of 40001 bits)"),
        (nested(5000), "{'a': {'a': {'a': {...}}}}"),
        ("x" * 100, f"'{'x' * 80}'... (100 characters)"),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_a_value_is_a_short_literal(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("a-b.c", "a-b.c"),
        ("", "''"),
        (" a", "' a'"),
        ("１６", "'１６'"),
        ("\x1b", r"'\x1b'"),
        ("x" * 81, shown("x" * 81)),
    ],
)
def test_a_plain_word_stands_as_it_is(word, text):
    assert bare(word) == text
