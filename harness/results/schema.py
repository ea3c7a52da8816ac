"""Every field of a results file: its type, its limit, and whether it is required. The one table of them.

docs/results.schema.json is printed from it: python3 -m harness.results.schema > docs/results.schema.json
"""

from __future__ import annotations

import json
from typing import Any

from harness.base.errors import shown
from harness.base.text import cut
from harness.results.bounds import DEPTH, ITEMS
from harness.results.file import SCHEMA
from harness.results.values import Anything, Choice, Fields, Flag, Listing, Number, Table, Text, Type
from harness.results.verdict import NOTE, NOTES, OUTPUT, REASON, REPORT, STATUSES

READABLE = range(1, SCHEMA + 1)  #: 1 and 2: verdicts alone, without a kind; 1 lacks "perf"
OLD_TEXT = 1_000_000  #: characters of a text of a record of 1 and 2, which were not bounded

SCALAR = Anything(0)
COUNT = Number(least=0, most=1e15, whole=True)
ANY_NUMBER = Number(words=("inf", "-inf", "nan"))
SHARE = Number(least=0, words=("inf",))
LINE = Text(pattern="[^\\n]*")
NAME = Text(200, pattern="[^\\n]+")
ID = Text(pattern="[^\\n]+")
PERF = (
    "device_us", "host_us", "compile_seconds", "bytes", "flops", "bytes_per_s", "flops_per_s", "floor_us",
)  # fmt: skip
CEILINGS = Fields({"copy_bytes_per_s": ANY_NUMBER, "flops_per_s": Table(ANY_NUMBER)})
ERROR_MAP = {
    "tokens": COUNT, "columns": COUNT, "token_step": COUNT, "column_step": COUNT, "unit": Text(40),
    "steps": Listing(ANY_NUMBER), "map": Listing(Text()), "experts": Listing(Listing(ANY_NUMBER)),
    "experts_left_out": COUNT,
}  # fmt: skip

#: Fields of every record.
COMMON: dict[str, Type] = {
    "schema": Choice((SCHEMA,)),
    "kind": Choice(("begin", "plan", "verdict", "end", "outcome")),
    "run": NAME,
    "time": Text(24, "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}[+-][0-9]{4}"),
    "commit": Text(),
    "row": NAME,
    "shard": Text(9, "[1-9][0-9]{0,3}/[1-9][0-9]{0,3}"),
}

#: Fields of a verdict: of harness/results/verdict.py, and of the plugin.
VERDICT: dict[str, Type] = {
    "nodeid": LINE,
    "case": ID,
    "backend": ID,
    "device": ID,
    "status": Choice(STATUSES),
    "family": LINE,
    "reason": Text(REASON),
    "report": Text(REPORT),
    "output": Text(OUTPUT),
    "notes": Listing(Text(NOTE), NOTES),
    "budget": SHARE,
    "budgets": Table(SHARE),
    "statistic": LINE,
    "plan": Text(),
    "seconds": Number(least=0),
    "calls": COUNT,
    "trace": Fields(
        {"launches": Listing(Text())} | dict.fromkeys(("operators", "allocations", "allocated_bytes"), ANY_NUMBER)
    ),
    "perf": Fields(
        dict.fromkeys(PERF, ANY_NUMBER)
        | {"samples_us": Listing(ANY_NUMBER), "method": Text(), "operand": Text(), "ceilings": CEILINGS}
        | {"clocks": Table(SCALAR), "configurations": Listing(Text()), "kernels_compiled": COUNT}
    ),
    "error_map": Fields(ERROR_MAP, tuple(ERROR_MAP), empty=True),
    "cause": LINE,
    "stage": LINE,
    "known": LINE,
    "spec": Text(),
    "error_type": LINE,
    "device_lost": Flag(),
    "environment": Table(SCALAR),
    "reproduce": Text(6_000, "[^\\n]*"),
}

NEEDED = ("case", "backend", "device", "status")  #: of a verdict of any version

#: The fields of each kind of record, and which of them are required beside those of every record.
KINDS: dict[str, tuple[dict[str, Type], tuple[str, ...]]] = {
    "begin": (
        {
            "continues": Flag(),
            "changes": Text(),
            "kernel_commits": Table(Text()),
            "environment": Table(Table(SCALAR)),
            "versions": Table(Text()),
            "options": Table(Anything(2)),
            "selection": Text(),
        },
        (),
    ),
    "plan": (
        {
            "total": COUNT,
            "counts": Table(Table(COUNT)),
            "items": Table(Listing(Text(), most=1_000_000), most=1_000_000),
        },
        ("total", "items"),
    ),
    "verdict": (VERDICT, NEEDED),
    "end": (
        {
            "exit": Number(least=-1000, most=1000, whole=True),
            "planned": COUNT,
            "verdicts": COUNT,
            "counts": Table(COUNT),
            "seconds": Number(least=0),
        },
        ("exit",),
    ),
    "outcome": ({"outcome": Anything()}, ("outcome",)),  # of mutate/outcomes.py, which reads it alone
}
ALWAYS = {kind: ("schema", "kind", "run", "time", "commit") for kind in KINDS} | {"outcome": ("schema", "kind")}
TYPES = {
    kind: Fields(COMMON | types, ALWAYS[kind] + required, others=Anything(DEPTH - 1))
    for kind, (types, required) in KINDS.items()
}


def _old(kind: Type) -> Type:
    """The type with the longer texts of the old versions."""
    if isinstance(kind, Text):
        return Text(OLD_TEXT, kind.pattern)
    return Listing(_old(kind.of), kind.most) if isinstance(kind, Listing) else kind


#: A verdict of schema 1 or 2.
OLD = Fields(
    {name: _old(kind) for name, kind in (COMMON | VERDICT).items()}
    | {"schema": Choice((1, 2)), "kind": SCALAR, "time": Text()},
    ("schema", *NEEDED),
)


def problem(record: dict[str, Any]) -> str:
    """What is wrong with a record, in one line; "" if nothing is."""
    version, kind = record.get("schema"), record.get("kind")
    if not isinstance(version, (int, float)) or isinstance(version, bool) or version not in READABLE:
        return f"schema={shown(version)}: valid is 1 to {SCHEMA}; a later version of this program may read it"
    types = OLD if version < SCHEMA else TYPES.get(kind) if isinstance(kind, str) else None
    if types is None:
        return f"kind={shown(kind)}: valid is one of {', '.join(KINDS)}"
    if len(record) > ITEMS:
        return f"it has {len(record)} fields: valid is at most {ITEMS}"
    return cut(types.wrong_field(record), 200)


def published() -> dict[str, Any]:
    """The JSON Schema of one line of a results file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of a results file of moe-harness, schema {SCHEMA}",
        "description": "Printed by: python3 -m harness.results.schema",
        "oneOf": [
            *({"$ref": f"#/$defs/{kind}"} for kind in KINDS),
            {"$ref": "#/$defs/old"},
        ],
        "$defs": {
            **{kind: _of_kind(kind) for kind in KINDS},
            "old": OLD.schema(),
            **{f"levels{n}": Anything(n).definition() for n in range(DEPTH + 1)},
        },
    }


def _of_kind(kind: str) -> dict[str, Any]:
    found = TYPES[kind].schema()
    found["properties"]["kind"] = {"const": kind}
    return found


if __name__ == "__main__":
    print(json.dumps(published(), indent=1))
