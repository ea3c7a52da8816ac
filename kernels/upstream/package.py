"""The installed version of another package, without importing it."""

from __future__ import annotations

import importlib.metadata


def installed(*distributions: str) -> tuple[str, str] | None:
    """(name, version) of the first of these distributions that is installed, or None."""
    for name in distributions:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0): the release, to be compared."""
    release = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        release.append(int(part))
    return tuple(release)


def missing(*distributions: str, since: tuple[int, ...] = ()) -> str | None:
    """None, or one line: none of these distributions is installed, or the one that is, is older than `since`."""
    found = installed(*distributions)
    if found is None:
        return f"the package {' or '.join(distributions)} is not installed"
    name, version = found
    if numbers(version) < since:
        return f"{name} {version}; {'.'.join(map(str, since))} or newer is needed"
    return None
