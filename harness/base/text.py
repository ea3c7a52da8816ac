"""Numbers and lines for a reader."""

from __future__ import annotations

import re

WIDTH = 120
#: What a terminal or the log of a CI job obeys or hides: control characters but tab and newline, marks of direction,
#: separators of lines, surrogates, and the two forms of GitHub's commands, "##[...]" and a line that begins with "::".
_HOSTILE = re.compile(
    r"([\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff])"
    r"|##(?=\[)|^[^\S\n\x0b-\x1f\x85\u2028\u2029]*(?=::)",
    re.MULTILINE,
)


def share(budget: float) -> str:
    """A share of the error budget in at most five characters."""
    if budget < 100:
        return f"{budget:.2f}"
    return f"{budget:.0f}" if budget < 1e4 else "inf" if budget == float("inf") else f"{budget:.0e}".replace("+", "")


def number(count: int, thing: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{count} {thing}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """ "12.3 s", or "2 min 31 s" from 100 s on."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s"


def cut(line: str, width: int = WIDTH) -> str:
    """Text as one inert line, cut to the width."""
    line = inert(" ".join(line.splitlines()))
    return line if len(line) <= width else line[: width - 3] + "..."


def inert(text: str) -> str:
    """Text without a meaning for terminals and for CI: control characters as visible escapes, commands disarmed.

    "\\x1b[31m" is shown as such, "##[error]" becomes "##\\[error]", a line "::error::" becomes "\\::error::". Newlines
    and tabs stay. Inert text stays as it is.
    """
    return _HOSTILE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    if match[1] is None:  # the head of a command
        return f"{match[0]}\\"
    code = ord(match[1])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def shortened(text: str, limit: int, tail: int = 0) -> str:
    """Inert text of at most `limit` characters: its head and its last `tail` characters, and how many are left out."""
    text = inert(text)
    if len(text) <= limit:
        return text
    head = limit - tail - 40  # room for the words between
    more = f"... {len(text) - head - tail} characters more"
    return text[:head] + (f"\n{more}\n{inert(text[-tail:])}" if tail else more)
