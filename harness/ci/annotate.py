"""GitHub's workflow commands: a verdict becomes a remark beside the line of the case that failed.

Only source text is read here, no family is imported: the job that merges results has nothing installed.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from harness.base.processes import ROOT
from harness.base.text import cut
from harness.results.verdict import FAILED

MOST = 10  #: annotations of one level that GitHub shows for a step

Record = dict[str, Any]


@dataclass(frozen=True)
class Annotation:
    """One remark. `line` 0: the whole file; no `file`: the whole run."""

    text: str
    level: str = "error"  #: or "warning", "notice"
    title: str = ""
    file: str = ""
    line: int = 0

    def command(self) -> str:
        """The line that, written on stdout, makes GitHub show it."""
        where = {"file": self.file, "line": str(self.line or ""), "title": self.title}
        words = ",".join(f"{name}={_property(value)}" for name, value in where.items() if value)
        return f"::{self.level}{' ' if words else ''}{words}::{_data(self.text)}"


def _data(text: str) -> str:
    """As the toolkit of GitHub's runner escapes a message (actions/toolkit, packages/core/src/command.ts)."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def commands(found: Iterable[Annotation]) -> list[str]:
    """At most ten of each level, the last of which says how many there are besides."""
    levels: dict[str, list[Annotation]] = defaultdict(list)
    for annotation in found:
        levels[annotation.level].append(annotation)
    lines = []
    for level, each in levels.items():
        kept = each if len(each) <= MOST else each[: MOST - 1]
        lines += [annotation.command() for annotation in kept]
        if len(each) > len(kept):
            told = f"and {len(each) - len(kept)} more: see the job's summary"
            lines.append(Annotation(told, level).command())
    return lines


def failures(records: Iterable[Record]) -> list[Annotation]:
    """What failed: one annotation a line of cases and backend, with the first reason and how to reproduce it."""
    groups: dict[tuple[str, int, str, str], list[Record]] = defaultdict(list)
    for r in records:
        if r["status"] in FAILED:
            groups[(*location(r), r["backend"], r["device"])].append(r)
    found = []
    for (file, line, backend, device), each in groups.items():
        first = each[0]
        others = f" (and {len(each) - 1} more cases of this line)" if len(each) > 1 else ""
        text = f"{cut(first['reason'], 300)}{others}\n{first['reproduce']}"
        found.append(Annotation(text, title=f"{first['status']}: {backend} on {device}", file=file, line=line))
    return found


# -- where a case stands ----------------------------------------------------------------------------------------------
FILLS = frozenset(("exact", "random", "extreme"))
UNKNOWN = "{_}"  #: a part of a descriptor that is not known before its module runs


def location(record: Record, root: Path = ROOT) -> tuple[str, int]:
    """The file and line of the row from which a record's case was made, or the line of ROWS if a call makes all
    of them; line 0, or no file, if there is none."""
    name = str(record.get("nodeid", "")).partition("::")[0]
    path = root / name
    if not name or not path.is_file():
        return "", 0
    case = _tokens(record["case"])
    certain, possible = _rows(path)
    for tokens in (case, case - FILLS):  # a row without a fill stands for several
        if tokens in certain:
            return name, certain[tokens]
    scored = [(score, -line) for line, template in possible if (score := _fits(template, case))]
    return name, -max(scored)[1] if scored else _line_of_rows(path)


@cache
def _line_of_rows(path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((n for n, line in enumerate(lines, 1) if re.match(r"ROWS = \w+\(", line)), 0)


def _tokens(descriptor: str) -> frozenset[str]:
    """The tokens of a descriptor, but for a default that is never written in a case, and a seed chosen by --seed."""
    return frozenset(t for t in descriptor.split("-") if t and t != "nk" and not re.fullmatch(r"s(\d+|{_})", t))


@cache
def _rows(path: Path) -> tuple[dict[frozenset[str], int], list[tuple[int, frozenset[str]]]]:
    """The rows of a family's module: the lines of descriptors that its text tells, and (line, tokens) of others."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    certain: dict[frozenset[str], int] = {}
    possible = []
    swept = {node.args[0]: node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args}
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr) or not re.match(r"t[\d{]", text := _text(node)):
            continue
        known = {word.arg: _values(word.value) for word in swept[node].keywords} if node in swept else {}
        names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", text)))
        for values in product(*(known.get(name, [UNKNOWN]) for name in names)):
            made = text
            for placeholder, value in zip(names, values):
                made = made.replace(f"{{{placeholder}}}", str(value))
            if UNKNOWN in made:
                possible.append((node.lineno, _tokens(made)))
            else:
                certain.setdefault(_tokens(made), node.lineno)
    return certain, possible


def _text(node: ast.expr) -> str:
    """The string that an expression makes, as far as its text tells."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return UNKNOWN


def _values(node: ast.expr) -> list[Any]:
    """What sweep() is given for a placeholder."""
    try:
        return list(ast.literal_eval(node))
    except (ValueError, TypeError):  # a name, a call, a comprehension
        return [UNKNOWN]


def _fits(template: frozenset[str], case: frozenset[str]) -> int:
    """How closely a template can have made a case: the characters that are the same, and 1; 0 if it cannot have."""
    left = set(case if template & FILLS else case - FILLS)
    score, anything = 1, False
    for token in sorted(template, key=lambda token: (token.count("{"), token)):
        literal = token.replace(UNKNOWN, "")
        made = sorted(t for t in left if literal and re.fullmatch(".*".join(map(re.escape, token.split(UNKNOWN))), t))
        if made:
            left.discard(made[0])
            score += len(literal)
        elif literal:
            return 0
        else:
            anything = True  # this part may be several tokens, or none
    return score if anything or not left else 0
