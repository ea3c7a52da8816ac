"""TOML files: the table in one, or an error of the caller's own kind that says where it is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib  # pytest brings it
    except ImportError:  # nothing is installed yet, as when CI asks for its rows: pip has one
        from pip._vendor import tomli as tomllib


def read(path: Path, wrong: type[Exception], name: str = "") -> dict[str, Any]:
    """The table in a file. `wrong` is raised, with `name` or the path in front, if it cannot be read or is no TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise wrong(f"{name or path}: {error.strerror}") from error
    return parse(text, wrong, name or str(path))


def parse(text: str, wrong: type[Exception], name: str) -> dict[str, Any]:
    """The table in a text, which `name` stands for in the message of `wrong`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # a name that is there twice, among others
        raise wrong(f"{name}: {error}") from error
