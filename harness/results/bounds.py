"""JSON-ready copies of values of any size: bounded, inert, finite.

A backend decides what is in a trace or an exception, so nothing in a record is written or shown at its full size.
"""

from __future__ import annotations

from typing import Any

from harness.base.text import shortened

TEXT = 2_000  #: characters of a text
ITEMS = 4_096  #: entries of a list or a table
DEPTH = 8  #: levels of lists and tables
NUMBER = 1e300  #: the largest magnitude of a number


def bounded(value: Any, text: int = TEXT, depth: int = DEPTH) -> Any:
    """Return a copy for JSON: texts cut to `text` characters, lists and tables to ITEMS entries and `depth` levels.

    An infinite or huge number becomes "inf" or "-inf", NaN "nan", and an object its text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        if -NUMBER <= value <= NUMBER:
            return value
        return "nan" if value != value else "inf" if value > 0 else "-inf"
    if isinstance(value, (dict, list, tuple)) and depth == 0:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        kept = list(value.items())[:ITEMS]
        return {shortened(str(name), text): bounded(each, text, depth - 1) for name, each in kept}
    if isinstance(value, (list, tuple)):
        return [bounded(each, text, depth - 1) for each in value[:ITEMS]]
    return shortened(str(value), text)
