"""The types of a results file's values: each says what is wrong with a value, and prints itself as JSON Schema."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from harness.base.errors import shown
from harness.base.text import cut
from harness.results.bounds import DEPTH, ITEMS, NUMBER, TEXT


class Type:
    """A type of values."""

    def problem(self, value: Any) -> str:
        """Return what is valid if the value is not; "" if it is."""
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        """Return the type as JSON Schema, draft 2020-12."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Type):
    """Text of at most `limit` characters that matches `pattern`, if there is one, in the dialect of JSON Schema."""

    limit: int = TEXT
    pattern: str = ""

    def problem(self, value: Any) -> str:
        if type(value) is not str or len(value) > self.limit:
            return f"text of at most {self.limit} characters"
        return "" if not self.pattern or re.fullmatch(self.pattern, value) else f"text that matches {self.pattern}"

    def schema(self) -> dict[str, Any]:
        more = {"pattern": rf"^(?:{self.pattern})$(?!\n)"} if self.pattern else {}
        return {"type": "string", "maxLength": self.limit, **more}


@dataclass(frozen=True)
class Choice(Type):
    """One of some texts or numbers."""

    values: tuple[str | int, ...]

    def problem(self, value: Any) -> str:
        if type(value) in (str, int, float) and value in self.values:
            return ""
        return "one of " + ", ".join(map(str, self.values))

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.values)}


@dataclass(frozen=True)
class Number(Type):
    """A finite number, or one of the words that stand for others."""

    least: float = -NUMBER
    most: float = NUMBER
    whole: bool = False
    words: tuple[str, ...] = ()

    def problem(self, value: Any) -> str:
        kind = type(value)
        if kind in (int, float) and self.least <= value <= self.most and (not self.whole or value == int(value)):
            return ""
        if kind is str and value in self.words:
            return ""
        what = f"a {'whole ' * self.whole}number from {self.least:g} to {self.most:g}"
        return " or ".join([what, *map(repr, self.words)])

    def schema(self) -> dict[str, Any]:
        number = {"type": "integer" if self.whole else "number", "minimum": self.least, "maximum": self.most}
        return {"anyOf": [number, {"enum": list(self.words)}]} if self.words else number


@dataclass(frozen=True)
class Flag(Type):
    """True or false."""

    def problem(self, value: Any) -> str:
        return "" if type(value) is bool else "true or false"

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Anything(Type):
    """Any JSON of at most `depth` levels of lists and tables; with 0: null, text, a number, true or false."""

    depth: int = DEPTH

    def problem(self, value: Any) -> str:
        if self.depth and isinstance(value, (list, dict)):
            items = value if isinstance(value, list) else [*value, *value.values()]
            inner = Anything(self.depth - 1)
            return next(filter(None, map(inner.problem, items)), "") if len(value) <= ITEMS else f"{ITEMS} entries"
        if value is None or type(value) is bool or not Text().problem(value) or not Number().problem(value):
            return ""
        return f"text of at most {TEXT} characters, a number, true, false, null, or at most {DEPTH} levels of lists"

    def schema(self) -> dict[str, Any]:
        return {"$ref": f"#/$defs/levels{self.depth}"}

    def definition(self) -> dict[str, Any]:
        """Return what the reference of `schema` names."""
        simple = [{"type": ["null", "boolean"]}, Text().schema(), Number().schema()]
        if not self.depth:
            return {"anyOf": simple}
        inner = Anything(self.depth - 1)
        return {"anyOf": [*simple, Listing(inner).schema(), Table(inner).schema()]}


@dataclass(frozen=True)
class Listing(Type):
    """A list of values of one type."""

    of: Type
    most: int = ITEMS

    def problem(self, value: Any) -> str:
        if type(value) is not list or len(value) > self.most:
            return f"a list of at most {self.most} entries"
        inner = next(filter(None, map(self.of.problem, value)), "")
        return inner and f"a list, each entry {inner}"

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "maxItems": self.most, "items": self.of.schema()}


@dataclass(frozen=True)
class Table(Type):
    """A table whose values, by any names, are of one type."""

    of: Type
    most: int = ITEMS

    def problem(self, value: Any) -> str:
        if type(value) is not dict or len(value) > self.most or any(len(name) > TEXT for name in value):
            return f"a table of at most {self.most} entries"
        inner = next(filter(None, map(self.of.problem, value.values())), "")
        return inner and f"a table, each value {inner}"

    def schema(self) -> dict[str, Any]:
        names = {"propertyNames": {"maxLength": TEXT}}
        return {"type": "object", "maxProperties": self.most, **names, "additionalProperties": self.of.schema()}


@dataclass(frozen=True)
class Fields(Type):
    """A table with fields of known types, and others of any; `required` ones are there, unless `empty` and none is."""

    types: dict[str, Type]
    required: tuple[str, ...] = ()
    empty: bool = False
    others: Anything = field(default=Anything(DEPTH - 1))

    def problem(self, value: Any) -> str:
        if type(value) is not dict or len(value) > ITEMS:
            return f"a table of at most {ITEMS} entries"
        if self.empty and not value:
            return ""
        wrong = self.wrong_field(value)
        return wrong and f"a table; in it {wrong}"

    def wrong_field(self, table: dict[str, Any]) -> str:
        """Return what is wrong with the first wrong field: its name, its value and what is valid."""
        for name in self.required:
            if name not in table:
                return f"there is no {name}"
        for name, value in table.items():
            if len(name) > TEXT:
                return f"a field has a name of {len(name)} characters; valid are {TEXT}"
            if valid := self.types.get(name, self.others).problem(value):
                return f"{cut(name, 40)}={shown(value)}: valid is {valid}"
        return ""

    def schema(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": "object",
            "maxProperties": ITEMS,
            "propertyNames": {"maxLength": TEXT},
            "properties": {name: each.schema() for name, each in self.types.items()},
            "additionalProperties": self.others.schema(),
        }
        if self.required:
            found |= {"required": list(self.required)}
        return {"anyOf": [{"type": "object", "maxProperties": 0}, found]} if self.empty else found
