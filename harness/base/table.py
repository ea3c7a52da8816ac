"""Tables as text: columns that align, Markdown, and labelled lines."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

LABEL = 13  #: the least width of a label: blocks with the usual labels align with one another
BAR, ESCAPED_BAR = re.compile(r"(?<!\\)\|"), r"\\|"  #: a bar that would end a Markdown cell, and its replacement


def aligned(
    rows: Iterable[Sequence[str]],
    right: Collection[int] = (),
    *,
    gap: int = 2,
    indent: int = 0,
    widths: Sequence[int] = (),
) -> list[str]:
    """One line a row; every column is as wide as its widest cell.

    rows: cells, equally many in each row; right: the columns that are aligned to the right; gap: spaces between two
    columns; indent: spaces in front; widths: the least width of each column, from the first on.
    """
    table = [tuple(row) for row in rows]
    columns = list(zip(*table))
    sizes = [max(*map(len, column), *widths[n : n + 1], 0) for n, column in enumerate(columns)]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.rjust(size) if n in right else cell.ljust(size) for n, (cell, size) in enumerate(zip(row, sizes))]
        return (" " * indent + (" " * gap).join(cells)).rstrip()

    return [line(row) for row in table]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """A Markdown table, one line a row. `right`: the columns that are aligned to the right.

    Escapes each bar in a cell that is not escaped yet.
    """
    rules = ["---:" if n in right else "---" for n in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(BAR.sub(ESCAPED_BAR, cell) for cell in cells)} |"

    return [line(header), line(rules), *map(line, rows)]


def labelled(pairs: Iterable[tuple[str, str]], indent: int = 2, width: int = LABEL) -> list[str]:
    """One line a (label, value) pair, the values below one another.

    A pair with the label of the pair before it, or "", continues that pair: its label is left blank. `width` is the
    least width of the labels.
    """
    table = list(pairs)
    size = max((len(label) for label, _ in table), default=0)
    lines, before = [], ""
    for label, value in table:
        shown = "" if label == before else label
        lines.append(f"{'':{indent}}{shown:{max(size, width)}} {value}".rstrip())
        before = label or before
    return lines
