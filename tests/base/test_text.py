"""base/text.py: text without a meaning for terminals and for CI, at most so long."""

import pytest

from harness.base.text import WIDTH, cut, inert, shortened


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain, \u00e9 \u4e2d \u20ac\n\ttabs a::b # [x]", "plain, \u00e9 \u4e2d \u20ac\n\ttabs a::b # [x]"),
        ("\x1b[31mred\x1b[0m \x07\x00\x7f", "\\x1b[31mred\\x1b[0m \\x07\\x00\\x7f"),
        ("a\r\nb\x85c\x9b1m", "a\\x0d\nb\\x85c\\x9b1m"),
        ("\u202eabc\u2066\u200f\u061c\u2028\u2029", "\\u202eabc\\u2066\\u200f\\u061c\\u2028\\u2029"),
        ("\ud800", "\\ud800"),
        ("::error::x\n  ::add-mask::\n\t::x\na ::b", "\\::error::x\n  \\::add-mask::\n\t\\::x\na ::b"),
        ("\u3000\xa0::x", "\u3000\xa0\\::x"),  # spaces for GitHub's runner, too
        (" \r::x\n\x0b::y", " \\x0d::x\n\\x0b::y"),
        ("##[error]x ###[[y", "##\\[error]x ###\\[[y"),
        ("::::", "\\::::"),
    ],
)
def test_inert_text(text, shown):
    assert inert(text) == shown == inert(shown)


def test_a_cut_line_is_one_inert_line():
    assert cut("a\nb\x1b[2J\u2028::c") == "a b\\x1b[2J ::c"
    assert cut("\n::error::x") == " \\::error::x"
    assert len(cut("x" * 500)) == WIDTH and cut("x" * 500).endswith("x...")


@pytest.mark.parametrize("tail", (0, 60))
def test_long_text_is_shortened_and_says_by_how_much(tail):
    found = shortened("head" + "\x1b" * 1000 + "tail", 200, tail)
    assert len(found) <= 200 and found.startswith("head\\x1b") and found.endswith("tail" if tail else "characters more")
    left_out = int(found.partition("... ")[2].split()[0])
    assert left_out + len(found) - len(f"... {left_out} characters more") - 2 * bool(tail) == 4 + 4000 + 4
    assert shortened("x" * 200, 200, tail) == "x" * 200


def test_the_tail_of_shortened_text_begins_no_command():
    text = "x" * 1000 + "::error::" + "y" * 51
    assert "\n\\::error::" in shortened(text, 300, 60) and len(shortened(text, 300, 60)) <= 300
