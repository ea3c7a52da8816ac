"""Bugs as data: the entries of cases/bugs/*.toml, and a copy of kernels/ that holds one of them.

An entry has a name and five lines:

    [align-tail-of-expert-ids-zero]
    source = "vllm#35161"
    edit = "triton/align.py:_align_count_kernel"
    old = "tl.full([BLOCK_PAIRS], -1, tl.int32)"
    new = "tl.full([BLOCK_PAIRS], 0, tl.int32)"
    reveals = "layers: ep"

edit names a file under kernels/ and a function, or Class.method, in it (a file alone: anywhere in it). old must occur
there exactly once; old and new may be lists of the same length, and then so may edit. reveals names the family that
should notice the bug, and words of the descriptors there that have what it takes. Optional keys: backends, to run
instead of those of FOLLOWS; cause, the fault that diagnose/match.py should name; device, the only one that can show
the bug; survives, why no case can tell it from the correct kernel; raises, the exception (NameError, CompilationError,
...) that the real bug raised, and that would otherwise mean that the edit leaves no valid program. The edits of
controls.toml are correct variants: a case that fails on one is a false alarm.
"""

from __future__ import annotations

import ast
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.base import toml
from harness.base.errors import UserError, bare, shown
from harness.base.processes import ROOT

BUGS, KERNELS = ROOT / "cases" / "bugs", ROOT / "kernels"
CONTROLS, WAITING = "controls", "waiting"
#: The backends that run a file of kernels/, the most relevant first; the longest prefix counts.
FOLLOWS = {
    "triton/": ("triton", "triton-permute", "triton-cached"),
    "triton/align.py": ("triton", "triton-permute"),
    "triton/topk.py": ("triton",),
    "triton/permute.py": ("triton-permute",),
    "triton/backend.py": ("triton", "triton-permute", "triton-chunked"),
    "cached.py": ("triton-cached",),
    "grouped.py": ("torch-grouped-mm",),
    "layer.py": ("triton", "triton-permute", "triton-cached", "torch-grouped-mm"),
    "checks.py": ("triton", "triton-permute", "triton-cached", "torch-grouped-mm"),
}
REQUIRED = ("source", "edit", "old", "new", "reveals")
OPTIONAL = ("backends", "cause", "device", "survives", "raises")
LISTS = ("edit", "old", "new", "backends")  #: keys that may have a list


class BugError(UserError):
    """An entry that cannot be read or does not apply. The message names the entry and what is wrong with it."""


@dataclass(frozen=True)
class Edit:
    """One replacement in one function of a file under kernels/."""

    file: str
    function: str  #: "" for the whole file
    old: str
    new: str

    def apply(self, text: str, name: str) -> str:
        """Return the file's text after the edit. BugError unless `old` occurs exactly once in the function."""
        first, end = _span(text, self.function, f"{name}: edit={self.file}:{self.function}")
        count = text.count(self.old, first, end)
        where = f"{self.file}:{self.function}" if self.function else self.file
        if count != 1:
            raise BugError(f"{name}: old={self.old!r} occurs {count} times in {where}; it must occur once")
        place = text.index(self.old, first, end)
        edited = text[:place] + self.new + text[place + len(self.old) :]
        try:
            ast.parse(edited)
        except SyntaxError as error:
            raise BugError(f"{name}: new={self.new!r} makes {where} no Python: {error}") from error
        return edited


@dataclass(frozen=True)
class Bug:
    """One entry of cases/bugs."""

    name: str
    kind: str  #: the stem of its file: the class of bugs, or "controls"
    source: str
    edits: tuple[Edit, ...]
    family: str
    words: tuple[str, ...]
    backends: tuple[str, ...]
    cause: str = ""
    device: str = ""
    survives: str = ""
    raises: str = ""

    @property
    def control(self) -> bool:
        return self.kind == CONTROLS

    def edited(self) -> dict[str, str]:
        """Return the new text of each file under kernels/ that the entry changes. BugError if it does not apply."""
        texts: dict[str, str] = {}
        for edit in self.edits:
            path = KERNELS / edit.file
            if edit.file not in texts and not path.is_file():
                raise BugError(f"{self.name}: edit={edit.file}: no such file under kernels/")
            texts[edit.file] = edit.apply(texts.get(edit.file) or path.read_text(), self.name)
        return texts

    def put_back(self, into: Path) -> Path:
        """Copy kernels/ with the bug into the directory `into`, and return `into`, ready for sys.path.

        BugError if the entry does not apply.
        """
        texts = self.edited()
        shutil.copytree(KERNELS, into / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in texts.items():
            (into / "kernels" / name).write_text(text)
        return into


def read(directory: Path | None = None) -> dict[str, Bug]:
    """Return every entry by its name, controls included. BugError names the file, the entry and the wrong key."""
    known: dict[str, Bug] = {}
    for path in sorted((directory or BUGS).glob("*.toml")):
        if path.stem == WAITING:
            continue
        for name, entry in toml.read(path, BugError, path.name).items():
            if name in known:
                raise BugError(f"{path.name}: {name}: {known[name].kind}.toml has an entry of that name")
            known[name] = _bug(path.stem, name, entry)
    if not known:
        raise BugError(f"{bare(directory or BUGS)}: holds no entry; an entry is a table [NAME] in a file *.toml")
    return known


def _bug(kind: str, name: str, entry: Any) -> Bug:
    if not isinstance(entry, dict):
        raise BugError(f"{kind}.toml: {bare(name)}={shown(entry)}: expected a table with {', '.join(REQUIRED)}")
    missing = [key for key in REQUIRED if key not in entry]
    unknown = set(entry) - {*REQUIRED, *OPTIONAL}
    if missing or unknown:
        wrong = f"missing: {', '.join(missing)}" if missing else f"unknown: {', '.join(sorted(unknown))}"
        raise BugError(f"{kind}.toml: {name}: {wrong}; keys: {', '.join(REQUIRED)}, and {', '.join(OPTIONAL)}")
    for key, value in entry.items():
        texts = value if key in LISTS and isinstance(value, list) and value else [value]
        if not all(isinstance(text, str) for text in texts):
            words = "text or a list of texts" if key in LISTS else "text"
            raise BugError(f"{kind}.toml: {bare(name)}: {key}={shown(value)}: must be {words}")
    old, new = _as_list(entry["old"]), _as_list(entry["new"])
    places = _as_list(entry["edit"])
    places = places * len(old) if len(places) == 1 else places
    if not len(places) == len(old) == len(new):
        raise BugError(
            f"{kind}.toml: {name}: {len(places)} edit, {len(old)} old, {len(new)} new; their numbers must be equal"
        )
    edits = []
    for place, before, after in zip(places, old, new):
        file, _, function = place.partition(":")
        if not (KERNELS / file).resolve().is_relative_to(KERNELS):
            raise BugError(f"{kind}.toml: {name}: edit={shown(place)}: must be a file under kernels/")
        edits.append(Edit(file, function, before, after))
    family, _, words = entry["reveals"].partition(":")
    backends = tuple(_as_list(entry.get("backends", list(_followers(edits[0].file)))))
    return Bug(
        name, kind, entry["source"], tuple(edits), family.strip(), tuple(words.split()), backends,
        entry.get("cause", ""), entry.get("device", ""), entry.get("survives", ""), entry.get("raises", ""),
    )  # fmt: skip


def _followers(file: str) -> tuple[str, ...]:
    prefixes = [prefix for prefix in FOLLOWS if file.startswith(prefix)]
    return FOLLOWS[max(prefixes, key=len)] if prefixes else ("triton",)


def _as_list(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else [value]


def _span(text: str, function: str, entry: str) -> tuple[int, int]:
    """Return the offsets at which a function, decorators included, begins and ends in a module's text."""
    if not function:
        return 0, len(text)
    body: list[Any] = ast.parse(text).body
    node: Any = None
    for part in function.split("."):
        named = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part]
        if not named:
            raise BugError(f"{entry}: there is no {part!r}")
        node = named[0]
        body = node.body
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return len("".join(lines[: first - 1])), len("".join(lines[: node.end_lineno]))
