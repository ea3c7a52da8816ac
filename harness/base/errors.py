"""The error for the user, and how its message shows a value."""

from __future__ import annotations

import reprlib
from pathlib import Path

from harness.base.text import inert

MOST = 2000  #: characters of a message


class UserError(Exception):
    """An argument, a file or a backend cannot be used. The message is one line: what is wrong, and what is valid.

    The base class of every such error: `cli.main` prints the message and exits with 2, the plugin raises
    pytest.UsageError. Whatever stands in it, the message is printed as one inert line of at most `MOST` characters.
    """

    def __str__(self) -> str:
        line = inert(" ".join(super().__str__().splitlines()))
        return line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[-MOST // 2 :]}"


class _Short(reprlib.Repr):
    """repr of values of any size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"(an integer of {x.bit_length()} bits)"


def shown(value: object) -> str:
    """A wrong value, for a message: plain text as it is, anything else as a literal, cut to about 80 characters."""
    if not isinstance(value, str | Path):
        return _Short().repr(value)
    text = str(value)
    plain = text.isascii() and text.isprintable() and text == text.strip() != ""
    head = text[:80] if plain else repr(text[:80])
    return head if len(text) <= 80 else f"{head}... ({len(text)} characters)"
