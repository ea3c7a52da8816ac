"""results/verdict.py, floor.py and summary.py: records, the floor, the whole text of the table."""

import json

import pytest

from harness import backend
from harness.base.text import WIDTH, share
from harness.problem import families
from harness.results import summary
from harness.results.file import ResultsError
from harness.results.floor import new_floor, read_floor, shortfalls
from harness.results.summary import Missing
from harness.results.verdict import Verdict


def verdict(status, backend="triton", family="layers", reason="", budget=0.0, device="cpu", case="t1-h64"):
    return Verdict(case, backend, device, status, family, reason, budget=budget).record()


# -- the verdict -----------------------------------------------------------------------------------------------------
def test_a_backend_that_is_not_registered_is_reproduced_by_its_spec():
    found = Verdict("t1-h64", "mine", "xpu (emulated)", "failed", spec="pkg.moe:Mine").record()
    assert found["reproduce"] == "python3 -m harness run t1-h64 --backend pkg.moe:Mine --device xpu"


def test_a_record_is_bounded_and_inert():
    found = Verdict(
        "t1-h64", "triton", "cpu", "failed", reason="\x1b[2J" + "r" * 999, report="head" + "x" * 10**6 + "tail"
    )
    found.output, found.notes = "y" * 10**6, [f"note {n}" for n in range(30)]
    found.trace = {"launches": ["k" * 5000] * 9999, "allocated_bytes": 10**400, "share": float("nan")}
    record = found.record()
    assert len(record["reason"]) <= 500 and record["reason"].startswith("\\x1b[2Jrrr")
    assert len(record["report"]) <= 64_000 and record["report"].startswith("head") and record["report"].endswith("tail")
    assert "characters more" in record["report"] and "characters more" in record["reason"]
    assert len(record["output"]) <= 8_000 and len(record["notes"]) == 20 and record["notes"][-1] == "and 11 notes more"
    assert len(record["trace"]["launches"]) == 4096 and len(record["trace"]["launches"][0]) <= 2_000
    assert record["trace"]["allocated_bytes"] == "inf" and record["trace"]["share"] == "nan"
    assert len(json.dumps(record, allow_nan=False)) < 10**7


def test_a_budget_that_is_no_number_is_infinite():
    found = Verdict("t1-h64", "triton", "cpu", "failed", budget=float("nan"), budgets={"rms": float("inf")}).record()
    assert found["budget"] == "inf" and found["budgets"] == {"rms": "inf"}


# -- the floor --------------------------------------------------------------------------------------------------------
def test_a_new_floor_is_ninety_percent_of_the_last_run(tmp_path):
    old = [verdict("passed") | {"run": "1"}] * 50
    new = [verdict(s) | {"run": "2"} for s in ["passed"] * 15 + ["mistrusted", "failed", "hung", "crashed"]]
    other = [verdict("passed", "torch-grouped-mm", device="xpu (emulated)") | {"run": "0"}] * 10
    text = new_floor([*old, *other, *new, verdict("unsupported") | {"run": "2"}])
    assert text.splitlines()[2:] == ["", "[cpu]", "triton = 17", "", "[xpu-emulated]", "torch-grouped-mm = 9"]
    path = tmp_path / "floor.toml"
    path.write_text(text)
    floor = read_floor(path)
    assert floor == {"cpu": {"triton": 17}, "xpu-emulated": {"torch-grouped-mm": 9}}
    assert shortfalls(floor, new, ["cpu"]) == []
    assert shortfalls(floor, new[:16], ["cpu"], ["torch-grouped-mm"]) == []
    short = shortfalls(floor, new[:16], ["cpu", "xpu (emulated)"])
    assert [line.partition(" are due")[0] for line in short] == [
        "floor: triton on cpu executed 16 verdicts, at least 17",
        "floor: torch-grouped-mm on xpu-emulated executed 0 verdicts, at least 9",
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("cpu = 3", r"cpu=3: must be a table, \[DEVICE\]"),
        ("[cpu]\ntriton = -1", r"\[cpu\] triton=-1: must be a count, 0 or more"),
        ("[cpu]\ntriton = true", r"\[cpu\] triton=True: must be a count, 0 or more"),
        ("[cpu", "--floor .*floor.toml: Expected ']'"),
    ],
)
def test_a_floor_that_makes_no_sense(tmp_path, text, message):
    (tmp_path / "floor.toml").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_floor(tmp_path / "floor.toml")


# -- the table --------------------------------------------------------------------------------------------------------
RECORDS = [
    *[verdict("passed", budget=b) for b in (0.0, 0.81)],
    verdict("failed", family="weight_swap", reason="off by one", budget=12.5, case="t2-h64"),
    *[verdict("unsupported", "torch-grouped-mm", reason="quant: bf16 only")] * 3,
    verdict("unsupported", "torch-grouped-mm", reason="quant: no fp8"),
    verdict("unsupported", "torch-grouped-mm", "weight_swap", reason="scenario: keeps nothing"),
    verdict("mistrusted", "torch-grouped-mm", reason="few outputs are telling", budget=0.5, case="t3-h64"),
    verdict("hung", "triton-cached", "weight_swap", "no answer in 300 s", device="xpu (emulated)", case="t4-h64"),
]


def test_the_whole_summary():
    found = summary.render(
        RECORDS,
        [Missing("eager", "cpu", "package: transformers is not installed", 40)],
        ["nothing runs on cuda: no CUDA device"],
        "-k h64",
        "results/x.jsonl",
        seconds=151.2,
    )
    assert (
        "\n".join(found)
        == """\
nothing runs on cuda: no CUDA device
This was a selection (-k h64), not a whole run.

                                   layers     weight_swap
torch-grouped-mm@cpu         0/0/1/4 0.50       0/0/0/1 -
triton@cpu                   2/0/0/0 0.81   0/1/0/0 12.50
triton-cached@xpu-emulated              -       0/1/0/0 -
A cell: passed/failed+crashed+hung/mistrusted/unsupported, largest share of the error budget (above 1 fails).

Not run because the backend declares that it does not support the case:
  quant     4  mostly torch-grouped-mm@cpu: bf16 only
  scenario  1  torch-grouped-mm@cpu: keeps nothing

Backends that cannot run here:
  eager@cpu missed 40 cases: package: transformers is not installed

Mistrusted, since the output proves little although it matched:
  1  few outputs are telling
     such as torch-grouped-mm@cpu t3-h64

Failures:
  failed: triton@cpu: off by one
    python3 -m harness run t2-h64 --backend triton --device cpu
  hung: triton-cached@xpu-emulated: no answer in 300 s
    python3 -m harness run t4-h64 --backend triton-cached --device xpu

Executed 5 verdicts in 2 min 31 s: 2 passed, 1 failed, 1 hung, 1 mistrusted.
Not run: 5 unsupported (4 quant, 1 scenario).
Results: results/x.jsonl"""
    )


def test_a_short_summary():
    assert (
        "\n".join(summary.render(RECORDS[:3], results="x.jsonl", short=True))
        == """\
              all families
triton@cpu   2/1/0/0 12.50
A cell: passed/failed+crashed+hung/mistrusted/unsupported, largest share of the error budget (above 1 fails).
Failures:
  failed: triton@cpu: off by one
    python3 -m harness run t2-h64 --backend triton --device cpu
Executed 3 verdicts: 2 passed, 1 failed.
Results: x.jsonl"""
    )


def test_why_a_backend_cannot_run_is_one_inert_line():
    (line,) = summary.unavailable([Missing("mine", "cpu", "no\n::error::\x1b[2J" + "x" * 999, 2)])[1:]
    assert line.startswith("  mine@cpu missed 2 cases: no ::error::\\x1b[2Jxxx") and len(line) == 500


def test_nothing_ran_nothing_to_say():
    assert summary.render([]) == []


def test_a_wide_table_is_folded_and_long_lists_are_cut():
    records = [verdict("passed", family=f"family_number_{n:02}") for n in range(20)]
    records += [verdict("failed", reason="x" * 300)] * 12
    found = summary.render(records, selection="x" * 300)
    table = summary.table(records)
    assert max(map(len, found)) == WIDTH and sum(line.startswith("triton@cpu") for line in table) == 5
    assert all(sum(f"number_{n:02}" in line for line in table) == 1 for n in range(20))
    assert found[-3:] == ["  and 2 more", "", "Executed 32 verdicts: 20 passed, 12 failed."]


def test_the_whole_battery_fits_the_width():
    """Families and backends as they are, with large numbers in every cell."""
    columns = [module.FAMILY for module in families.families()]
    names = [b.name for b in backend.installed()]
    statuses = ["passed"] * 1200 + ["failed", "mistrusted"] * 20 + ["unsupported"] * 300
    cell = [verdict(s, budget=12.345) for s in statuses]
    records = [
        r | {"family": f, "backend": b, "device": "xpu (emulated)"} for f in columns for b in names for r in cell
    ]
    lines = summary.table(records)
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.count("1200/20/20/300 12.35") for line in lines) == len(columns) * len(names)
    assert sum(line.split().count(f) for line in lines for f in columns) == len(columns)


def test_mistrusted_verdicts_are_told_by_reason():
    few = [verdict("mistrusted", reason=f"only {n}% of the outputs tell", case=f"t{n}-h64") for n in (3, 4, 5)]
    assert summary.mistrusted([verdict("mistrusted", reason="no token meets an expert"), *few], 1)[1:] == [
        "  3  only 3% of the outputs tell",
        "     such as triton@cpu t3-h64",
        "  and 1 more reason",
    ]


def test_unsupported_verdicts_are_not_executed():
    found = [verdict("unsupported", reason=f"{word}: no") for word in ("shape", "quant", "quant")]
    assert summary.totals(found, 1.25) == [
        "Executed 0 verdicts in 1.2 s: none.",
        "Not run: 3 unsupported (2 quant, 1 shape).",
    ]
    assert summary.totals([verdict("passed")]) == ["Executed 1 verdict: 1 passed."]


@pytest.mark.parametrize(
    "budget, text",
    [
        (0, "0.00"),
        (0.996, "1.00"),
        (1.004, "1.00"),
        (99.99, "99.99"),
        (1234, "1234"),
        (5e6, "5e06"),
        (float("inf"), "inf"),
    ],
)
def test_shares(budget, text):
    assert share(budget) == text


def test_records_are_lines_of_json():
    assert json.loads(json.dumps(verdict("passed"))) == verdict("passed")
