"""Read TOML files, with the caller's own class of error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness.base.errors import bare

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib  # pytest brings it
    except ImportError:  # nothing is installed yet, as in CI's first job: pip has a copy
        from pip._vendor import tomli as tomllib

MOST = 4_000_000  #: bytes of a file
MOST_DOTS = 300  #: in a line


def read(path: Path, wrong: type[Exception], name: str = "") -> dict[str, Any]:
    """The table of a file. Raises wrong("name: ..."), by default with the path, if it cannot be read or is not TOML."""
    name = name or bare(path)
    try:
        if path.exists() and not path.is_file():  # a FIFO would block, a device has no end
            raise wrong(f"{name}: must be a regular file")
        with path.open("rb") as file:
            content = file.read(MOST + 1)
        text = content.decode()
    except OSError as error:
        raise wrong(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise wrong(f"{name}: must be UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:  # a NUL in the path
        raise wrong(f"{name}: {error}") from error
    if len(content) > MOST:
        raise wrong(f"{name}: valid are at most {MOST} bytes")
    return parse(text, wrong, name)


def parse(text: str, wrong: type[Exception], name: str) -> dict[str, Any]:
    """The table of a text. Raises wrong("name: ...") if it is not TOML."""
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):  # the parser's time grows with their square
        raise wrong(f"{name}: a line with more than {MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise wrong(f"{name}: too many levels") from error
    except ValueError as error:  # TOMLDecodeError, also for a name that occurs twice; a date; an integer of 4301 digits
        raise wrong(f"{name}: {error}") from error
