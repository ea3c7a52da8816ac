"""GitHub's workflow commands: each failure becomes an annotation on the file of its family.

The descriptor in its text leads to the row: `grep` finds it in cases/, or `moe-harness list --why` its reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.base.processes import ROOT
from harness.base.text import cut
from harness.results.file import Record
from harness.results.verdict import FAILED

LONGEST = 500  #: characters of a path
MOST = 10  #: annotations of one level that GitHub shows for a step


@dataclass(frozen=True)
class Annotation:
    """One annotation of a file; of the whole run if `file` is empty."""

    text: str
    level: str = "error"  #: or "warning", "notice"
    title: str = ""
    file: str = ""  #: relative to the repository

    def command(self) -> str:
        """The line on stdout that makes GitHub show the annotation."""
        properties = {"file": self.file, "title": self.title}
        words = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
        return f"::{self.level}{' ' if words else ''}{words}::{_data(self.text)}"


def _data(text: str) -> str:
    """Escape a message as the toolkit of GitHub's runner does (actions/toolkit, packages/core/src/command.ts)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def commands(annotations: Iterable[Annotation]) -> list[str]:
    """The commands of at most ten annotations of each level; the tenth counts those that are left out."""
    levels: dict[str, list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        levels[annotation.level].append(annotation)
    lines = []
    for level, each in levels.items():
        kept = each if len(each) <= MOST else each[: MOST - 1]
        lines += [annotation.command() for annotation in kept]
        if len(each) > len(kept):
            lines.append(Annotation(f"and {len(each) - len(kept)} more: see the job's summary", level).command())
    return lines


def failures(records: Iterable[Record]) -> list[Annotation]:
    """One annotation for each family's file, backend and device with a failure: the first reason and its command."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for r in records:
        if r["status"] in FAILED:
            groups[family_file(r), r["backend"], r["device"]].append(r)
    annotations = []
    for (file, backend, device), each in groups.items():
        first = each[0]
        others = f" (and {len(each) - 1} more cases)" if len(each) > 1 else ""
        text = f"{cut(first['reason'], 300)}{others}\n{first['reproduce']}"
        annotations.append(Annotation(text, title=f"{first['status']}: {backend} on {device}", file=file))
    return annotations


def family_file(record: Record, root: Path = ROOT) -> str:
    """The file of a record's family, relative to the repository; "" without a pytest id, or if it is not there."""
    name = str(record.get("nodeid", "")).partition("::")[0]
    if not name or "\0" in name or len(name) > LONGEST:
        return ""
    try:
        path = (root / name).resolve()
        inside = path.is_relative_to(root.resolve()) and path.is_file()
    except (OSError, RuntimeError):  # a name that is too long; links in a circle
        return ""
    return name if inside and not Path(name).is_absolute() and ".." not in Path(name).parts else ""
