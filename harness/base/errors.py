"""The error for the user, and how its message shows a value."""

from __future__ import annotations

import reprlib
from pathlib import Path

from harness.base.text import inert

MOST = 2000  #: characters of a message
WORD, PATH = 80, 1000  #: characters of a word or value in a message, and of a path


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
    """A wrong value as a literal, cut to about 80 characters; a path, which must be found, to PATH."""
    if not isinstance(value, str | Path):
        return _Short().repr(value)
    text, most = str(value), PATH if isinstance(value, Path) else WORD
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"


def bare(value: str | Path) -> str:
    """A wrong word of a command or a path as it stands, cut as in `shown`; a literal if it is not plain."""
    text, most = str(value), PATH if isinstance(value, Path) else WORD
    plain = text.isascii() and text.isprintable() and text == text.strip() != ""
    return text if plain and len(text) <= most else shown(value)
