"""Results files that are wrong: mutations of a good one. No command may trace back on one of them, hang, or pass."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from harness.results.file import SCHEMA
from harness.results.verdict import Verdict

Record = dict[str, Any]
NODE = "cases/test_layers.py::test_layers"
TIME = "2026-12-01T00:46:07+0000"


def good() -> list[Record]:
    """The records of a good run: begin, plan, three verdicts, end."""
    facts = {"schema": SCHEMA, "run": f"{TIME} 1-abc", "commit": "abc", "time": TIME}
    verdicts = []
    for n in (1, 2, 3):
        found = Verdict(f"t{n}-h64-i64-e4-k2-bf16-exact", "triton", "cpu", "passed", "layers", calls=1, seconds=0.5)
        found.trace, found.budgets = {"launches": ["_gemm"], "operators": 3}, {"rms": 0.5}
        verdicts.append(found.record() | {"nodeid": f"{NODE}[{found.case}:triton:cpu]", "environment": {"host": "a"}})
    items = {NODE: [r["nodeid"].partition("[")[2][:-1] for r in verdicts]}
    return [
        {**facts, "kind": "begin", "versions": {"python": "3.12"}, "options": {"keyword": "x"}},
        {**facts, "kind": "plan", "total": 3, "counts": {"triton@cpu": {"layers": 3}}, "items": items},
        *({**facts, "kind": "verdict", **record} for record in verdicts),
        {**facts, "kind": "end", "exit": 0, "planned": 3, "verdicts": 3, "counts": {"passed": 3}, "seconds": 1.5},
    ]


def lines(records: list[Any]) -> bytes:
    """Records as JSON Lines, "schema" first, as the harness writes them."""
    first = [{"schema": r.get("schema"), **r} if isinstance(r, dict) and "schema" in r else r for r in records]
    return "".join(json.dumps(record) + "\n" for record in first).encode()


#: Values of another type than any field has, or of a size that none has.
ODD_VALUES: dict[str, Any] = {
    "null": None,
    "nested": json.loads("[" * 50 + "]" * 50),
    "huge": 10**400,
    "text": "x\0\x1b[2J\n::error::\u202e\ud800",
    "table": {"": {"a": []}},
    "list": [None, {}, 1e308],
    "minus": -1,
}
BEGIN, PLAN, FIRST, LAST, END = 0, 1, 2, 4, 5
FIELDS = {
    BEGIN: ("run", "time", "commit", "versions", "options", "kind", "schema"),
    PLAN: ("total", "items", "run"),
    LAST: (
        "case", "backend", "device", "status", "family", "reason", "report", "budget", "budgets", "statistic", "plan",
        "seconds", "calls", "trace", "perf", "error_map", "known", "environment", "nodeid", "reproduce", "notes",
        "output", "time", "run", "kind", "schema",
    ),
    END: ("exit", "run", "kind"),
}  # fmt: skip
#: Those that these fields may have.
FREE = {
    "0 commit text", "0 options table", "4 reason text", "4 report text", "4 output text", "4 plan text",
    "4 trace table", "4 perf table",
}  # fmt: skip
#: Values that are wrong in one field alone, of the last verdict.
WRONG: dict[str, list[Any]] = {
    "budget": ["x", True, [], "inf " * 9],
    "status": ["great", "PASSED", 0, True],
    "schema": [0, 4, "3", True, [3], 10**300],
    "kind": ["verdicts", "Verdict", "", 3],
    "perf": [{"device_us": "fast"}, {"ceilings": 7}, {"configurations": {"a": 1}}, {"clocks": [1]}, {"bytes": None}],
    "trace": [{"launches": {}}, {"launches": [[]]}, {"launches": "abc"}, {"operators": "many"}],
    "error_map": [{"map": 7}, {"tokens": 1}, {"map": ["0"], "experts": [["x"]]}],
    "environment": [{"host": {"a": 1}}, {"python": [3]}, "cpu"],
    "shard": ["1/100000000", "0/0", "1/0", "a/b", "1/2/3", "9" * 400 + "/1", 12],
    "row": ["x" * 10_000, 7, "a\nb"],
    "time": ["9999-12-31T23:59:59+99", "now", "", "2026-13-41T99:99:99+0000\n", 1e9],
    "seconds": ["1", -1.0, 10**400, None],
    "nodeid": ["x" * 10**6, "/etc/passwd::x", "../../../etc/passwd::x", "a\0b::x"],
    "reason": ["x" * 10_000_000],
    "report": ["y" * 100_000],
    "notes": ["a", ["b"] * 1000, [1]],
    "known": [{}, "x" * 10_000],
}


def _changed(at: int, **fields: Any) -> bytes:
    records = copy.deepcopy(good())
    records[at] |= fields
    return lines(records)


def _without(at: int, field: str) -> bytes:
    records = copy.deepcopy(good())
    del records[at][field]
    return lines(records)


def _literal(at: int, field: str, literal: str) -> bytes:
    """The good file with text in place of a field's value that need not be JSON."""
    return _changed(at, **{field: "@@@"}).replace(b'"@@@"', literal.encode("utf-8", "surrogatepass"))


def _fields() -> Iterator[tuple[str, bytes]]:
    for at, names in FIELDS.items():
        for name in names:
            for word, value in ODD_VALUES.items():
                yield f"{at} {name} {word}", _changed(at, **{name: value})
    for name, values in WRONG.items():
        for n, value in enumerate(values):
            yield f"wrong {name} {n}", _changed(LAST, **{name: value})
    for name in ("case", "backend", "device", "status", "schema", "kind", "run", "time"):
        yield f"without {name}", _without(LAST, name)
    for name in ("exit", "kind", "run"):
        yield f"end without {name}", _without(END, name)


def _literals() -> Iterator[tuple[str, bytes]]:
    texts = {
        "NaN": "NaN", "infinity": "-Infinity", "400 digits": "1" * 400, "5,000 digits": "1" * 5000, "1e999": "1e999",
        "5,000 levels": "[" * 5000 + "]" * 5000, "100,000 levels": "[" * 100_000, "tables": '{"a":' * 5000,
        "control": '"\x01"', "newline": '"\n"', "half an escape": '"\\u12"', "no value": "", "two values": "1 2",
        "twice": '{"a": 1, "a": 2}', "hexadecimal": "0x10", "single quotes": "'a'", "comment": "1 /* no */",
        "surrogate": '"\ud800"',
    }  # fmt: skip
    for word, text in texts.items():
        yield f"literal {word}", _literal(LAST, "budget", text)


def _files() -> Iterator[tuple[str, bytes]]:
    whole = lines(good())
    parts = whole.splitlines(keepends=True)
    yield from {
        "empty": b"",
        "blank": b"\n\n \n",
        "NUL": b"\0" * 10_000,
        "NUL in the middle": parts[0] + b"\0" * 512 + whole[len(parts[0]) + 512 :],
        "UTF-16": whole.decode().encode("utf-16"),
        "latin": whole.replace(b'"reason": "', b'"reason": "\xff\xfe', 1),
        "binary": bytes(range(256)) * 100,
        "gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
        "HTML": b"<html><body>404</body></html>\n",
        "a list": b"[" + b",".join(part.strip() for part in parts) + b"]\n",
        "null": b"null\n",
        "a list behind a good file": whole + b"[]\n7\n",
        "carriage returns alone": whole.replace(b"\n", b"\r"),
        "one line": whole.replace(b"\n", b" "),
        "a long line": parts[0] + b'{"schema": 3, "x": "' + b"a" * (33 * 2**20) + b'"}\n' + b"".join(parts[1:-1]),
        "a line without an end": whole[:-1] + b'{"schema": 3, "kind": "end"' + b" " * 10_000,
        "a newer schema": whole.replace(b'"schema": 3', b'"schema": 4'),
        "no schema": whole.replace(b'"schema": 3, ', b""),
        "schema 2": whole.replace(b'"schema": 3', b'"schema": 2'),
        "only begin": parts[0],
        "only plan": parts[1],
        "only verdicts": b"".join(parts[2:5]),
        "only end": parts[5],
        "backwards": b"".join(parts[::-1]).replace(b'"verdict"', b'"verdikt"'),
        "a failed exit": whole.replace(b'"exit": 0', b'"exit": 3'),
        "exit 1 and all is green": whole.replace(b'"exit": 0', b'"exit": 1'),
        "a larger plan": whole.replace(b'"total": 3', b'"total": 4'),
        "a plan without its items": _changed(PLAN, items={}),
        "another run's verdict": _changed(LAST, run="another"),
        "another case's verdict": _changed(LAST, nodeid="cases/test_layers.py::test_layers[x]"),
        "a thousand runs": b"".join(whole.replace(b"1-abc", b"%d" % n)[: -len(parts[5])] for n in range(1000)),
    }.items()
    for n in range(6):
        yield f"without line {n}", b"".join(parts[:n] + parts[n + 1 :])
        yield f"cut in line {n}", b"".join(parts[:n]) + parts[n][: len(parts[n]) // 2]
        spoiled = bytearray(parts[n])
        spoiled[len(spoiled) // 2] ^= 0x80
        yield f"a bit flipped in line {n}", b"".join([*parts[:n], bytes(spoiled), *parts[n + 1 :]])


def hostile_results() -> Iterator[tuple[str, bytes]]:
    """(name, content) of each; none of them is a good run."""
    yield from (entry for entry in _fields() if entry[0] not in FREE)
    yield from _literals()
    yield from _files()


def harmless_results() -> Iterator[tuple[str, bytes]]:
    """(name, content) of files that look odd and are good runs."""
    whole = lines(good())
    change: dict[str, Callable[[], bytes]] = {
        "as written": lambda: whole,
        "a byte order mark": lambda: b"\xef\xbb\xbf" + whole,
        "Windows": lambda: whole.replace(b"\n", b"\r\n"),
        "twice": lambda: whole * 2,
        "a new field": lambda: _changed(LAST, new={"a": [1, None]}),
        "a year far away": lambda: whole.replace(TIME.encode(), b"9999-12-31T23:59:59-1200"),
        "no end of the last line": lambda: whole[:-1],
    }
    for name, make in change.items():
        yield name, make()
    yield from (entry for entry in _fields() if entry[0] in FREE)
