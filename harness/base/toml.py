"""Read TOML files, with the caller's own class of error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib  # pytest brings it
    except ImportError:  # nothing is installed yet, as in CI's first job: pip has a copy
        from pip._vendor import tomli as tomllib


def read(path: Path, wrong: type[Exception], name: str = "") -> dict[str, Any]:
    """The table of a file. Raises wrong("name: ..."), by default with the path, if it cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise wrong(f"{name or path}: {error.strerror}") from error
    return parse(text, wrong, name or str(path))


def parse(text: str, wrong: type[Exception], name: str) -> dict[str, Any]:
    """The table of a text. Raises wrong("name: ...") if it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # also for a name that occurs twice
        raise wrong(f"{name}: {error}") from error
