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
        return line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[5 - MOST // 2 :]}"


class _Short(reprlib.Repr):
    """repr of values of any size and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"(an integer of {x.bit_length()} bits)"


def shown(value: object) -> str:
    """A wrong value as a literal, cut to about 80 characters."""
    if not isinstance(value, str | Path):
        return _Short().repr(value)
    text = str(value)
    return repr(text[:80]) if len(text) <= 80 else f"{text[:80]!r}... ({len(text)} characters)"


def bare(value: str | Path) -> str:
    """A wrong word of a command or a name as it stands, cut to about 80 characters; a literal if it is not plain."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and text == text.strip() != ""
    return text if plain and len(text) <= 80 else shown(text)
