"""What the report says, from records whose answers are known: places, states, tables, series."""

import json

import numpy as np
import pytest

from harness import cli
from harness.report import data, history, performance
from harness.report.history import Place
from harness.results.verdict import Verdict
from tests.support.results_files import write_run

HOST = {"python": "3.12", "torch": "2.11", "host": "x86_64"}


def verdict(case="t1-h64", status="passed", backend="triton", family="layers", day=1, commit="abc", **more):
    run = more.pop("run", f"2026-11-{day:02}T13:00:00+0000 1")
    device = more.pop("device", "cpu")
    fields = {name: more.pop(name) for name in list(more) if name in Verdict.__dataclass_fields__}
    found = Verdict(case, backend, device, status, family, **fields).record()
    time = run.split()[0].replace(":00:00", ":00:30")
    return {"schema": 2, "run": run, "commit": commit, "time": time, "environment": HOST, **found, **more}


def page(*records):
    found = data.payload(list(records), [], "title", "now")
    json.dumps(found, allow_nan=False)
    return found


# -- places and states ------------------------------------------------------------------------------------------------
def test_a_place_is_a_row_or_the_hardware_with_its_versions():
    assert Place.from_record(verdict()) == Place("x86_64", "cpu", "python 3.12, torch 2.11")
    assert Place.from_record(verdict(row="cpu-3.10")) == Place("cpu-3.10", "cpu", "")
    gpu = {"environment": HOST | {"device_name": "NVIDIA H200", "triton": "3.6"}, "device": "cuda"}
    assert Place.from_record(verdict() | gpu) == Place("NVIDIA H200", "cuda", "python 3.12, torch 2.11, triton 3.6")
    assert Place.from_record({"device": "cpu"}) == Place("unknown machine", "cpu")


def state(*records):
    (found,) = history.states(history.runs(records)).values()
    return found


def cases(found):
    return sorted((record["case"], record["status"]) for record in found.records.values())


def test_the_newest_run_is_the_state():
    old = [verdict("t1", "failed"), verdict("t2")]
    now = state(*old, verdict("t1", day=2, commit="def"))
    assert cases(now) == [("t1", "passed")] and cases(now.before) == [("t1", "failed"), ("t2", "passed")]


def test_shards_of_a_commit_are_one_state_whatever_the_order_of_the_files():
    shards = [verdict("t1"), verdict("t2", run="2026-11-01T13:05:00+0000 7"), verdict("t3", backend="mine", day=2)]
    for order in (shards, shards[::-1]):
        assert cases(state(*order)) == [("t1", "passed"), ("t2", "passed"), ("t3", "passed")]
    assert cases(state(*shards[:2], shards[2] | {"commit": "def"})) == [("t3", "passed")]


def test_a_shard_that_is_run_again_replaces_the_one_it_repeats():
    again = verdict("t1", day=2)
    now = state(verdict("t1", "failed"), verdict("t2", run="2026-11-01T13:05:00+0000 7"), again)
    assert cases(now) == [("t1", "passed"), ("t2", "passed")]
    assert cases(now.before) == [("t1", "failed"), ("t2", "passed")]


def test_a_run_of_less_is_another_state_and_said_to_be_less():
    records = [verdict("t1"), verdict("t2"), verdict("t3", family="scratch"), verdict("t1", day=2)]
    records += [verdict("t2", "unsupported", day=2)]
    now = state(*records)
    assert cases(now) == [("t1", "passed"), ("t2", "unsupported")]
    assert history.executed_less(now) == [("triton", "layers", 1, 2), ("triton", "scratch", 0, 1)]
    # What has gone altogether is not forgotten because it was gone before.
    again = state(*records, verdict("t1", day=3), verdict("t2", "unsupported", day=3))
    assert history.executed_less(again) == [("triton", "scratch", 0, 1)]
    assert page(*records)["warnings"] == [
        "triton at x86_64 (cpu) executed fewer cases than before: layers 1 instead of 2, scratch 0 instead of 1"
    ]


def test_two_machines_hide_nothing_of_each_other():
    other = verdict("t1", "failed") | {"environment": HOST | {"torch": "2.13"}}
    found = page(other, verdict("t1", day=2), verdict("t1", device="xpu (emulated)", day=20))
    assert [(p["device"], p["counts"]) for p in found["places"]] == [
        ("cpu", {"passed": 1}),
        ("cpu", {"failed": 1}),
        ("xpu (emulated)", {"passed": 1}),
    ]
    assert found["warnings"] == [
        "x86_64 (cpu) last ran 18 days before the newest run",
        "x86_64 (cpu) last ran 19 days before the newest run",
    ]


def test_what_turned_red_and_what_was_red_before():
    records = [verdict("t1"), verdict("t2", "failed"), verdict("t1", "crashed", day=2), verdict("t2", "failed", day=2)]
    found = page(*records, verdict("t3", "failed", day=2))
    assert found["places"][0]["turned_red"] == [["layers", "triton", "t1"]]
    assert sorted(found["cases"]["tables"]["history"]) == ["f", "ff", "pc"]


# -- tables -----------------------------------------------------------------------------------------------------------
RECORDS = [
    verdict("t1", budget=0.8, statistic="rms", budgets={"rho": 0.5, "rms": 0.8}, calls=1, plan="act=io"),
    verdict("t2", budget=0.95, statistic="rho", budgets={"rho": 0.95}, calls=1),
    verdict("t3", "failed", reason="12 of 64 outputs differ", budget=float("inf"), statistic="equal", report="long"),
    verdict("t4", "failed", reason="7 of 64 outputs differ", budget=3.0, statistic="rms", calls=1),
    verdict("t5", "mistrusted", reason="only 3% of it", budget=0.1, statistic="rms", calls=1),
    verdict("t6", "unsupported", backend="mine", reason="quant: bf16 only"),
    verdict("t7", "unsupported", backend="mine", reason="quant: bf16 only", family="scratch"),
    verdict("t8", "unsupported", backend="mine", reason="shape: odd"),
    verdict("t9", "hung", backend="mine", reason="no answer"),
]


def test_the_matrix_counts_and_has_the_worst_budget():
    cells = {(c["backend"], c["family"]): (c["counts"], c["worst"]) for c in page(*RECORDS)["matrix"]}
    assert cells == {
        ("triton", "layers"): ({"passed": 2, "failed": 2, "mistrusted": 1}, "inf"),
        ("mine", "layers"): ({"unsupported": 2, "hung": 1}, None),
        ("mine", "scratch"): ({"unsupported": 1}, None),
    }


def test_what_did_not_run_and_why():
    assert page(*RECORDS)["not_run"] == [
        {"keyword": "quant", "count": 2, "texts": [["bf16 only", "mine", 2]]},
        {"keyword": "shape", "count": 1, "texts": [["odd", "mine", 1]]},
    ]


def test_reasons_are_one_whatever_numbers_are_in_them():
    found = page(*RECORDS)
    told = [(r["status"], r["count"], found["cases"]["tables"]["case"][r["row"]]) for r in found["reasons"]]
    assert [entry[:2] for entry in told] == [("failed", 2), ("hung", 1), ("mistrusted", 1)]
    assert found["reasons"][0]["backends"] == {"triton": 2}


def test_histograms_hold_what_was_judged_statistically():
    (found,) = page(*RECORDS)["histograms"]
    expected = [0] * (data.BINS + 1)
    expected[2] = expected[16] = expected[19] = expected[20] = 1
    assert found["backend"] == "triton" and found["bins"] == expected


def test_every_record_can_be_put_together_again():
    found = page(*RECORDS)["cases"]
    rows = {}
    for n, case in enumerate(found["case"]):
        texts = {k: found["tables"][k][found[k][n]] for k in ("reason", "backend", "plan", "reproduce", "statistic")}
        budgets = {k: column[n] for k, column in found["budgets"].items() if column[n] is not None}
        rows[found["tables"]["case"][case]] = {**texts, "budgets": budgets, "budget": found["budget"][n]}
    for record in RECORDS:
        told = rows[record["case"]]
        assert told["reproduce"].replace("\0", record["case"]) == record["reproduce"]
        assert {k: told[k] for k in ("reason", "backend", "plan", "budgets", "budget")} == {
            k: record[k] for k in ("reason", "backend", "plan", "budgets", "budget")
        }


def test_reports_of_what_is_red_as_many_as_fit(monkeypatch):
    monkeypatch.setattr(data, "TEXTS", 250)
    monkeypatch.setattr(data, "TEXT", 100)
    red = [verdict(f"t{n}", "failed", report="x" * 500, error_map={}) for n in range(4)]
    other = verdict("t9", "failed", backend="zzz", report="y" * 90)
    found = page(*red, other, verdict("t5", report="passed"))
    names = [found["cases"]["tables"]["case"][found["cases"]["case"][n]] for n in found["texts"]]
    assert sorted(names) == ["t0", "t9"]  # one of each backend before the second of any
    assert sorted(found["texts"].values())[0] == "x" * 100 + "\n... 400 characters more"
    assert found["remarks"] == [
        "3 reports of failures left out of this page, which would be too large: their reproduction lines are here"
    ]


# -- time -------------------------------------------------------------------------------------------------------------
def timed(us, day=1, **more):
    perf = {"device_us": us, "bytes": 4_000_000, "flops": 8_000_000, "operand": "bf16", "floor_us": us / 4}
    return verdict("t1", family="perf", day=day, perf=perf | more)


def test_the_share_of_the_roof():
    perf = {"device_us": 10.0, "bytes": 4e6, "flops": 8e6, "operand": "bf16"}
    ceilings = {"copy_bytes_per_s": 1e12, "flops_per_s": {"bf16": 4e12, "fp8": 1.0}}
    assert performance.roof_share(perf | {"ceilings": ceilings}) == pytest.approx(0.4)  # 4 us to move, 2 to compute
    assert performance.roof_share(perf | {"floor_us": 5.0}) == 0.5
    assert performance.roof_share(perf) is None
    assert performance.roof_share(perf | {"ceilings": ceilings, "operand": "fp32"}) is None


@pytest.mark.parametrize(
    "more",
    [
        {"floor_us": "inf"},
        {"ceilings": {"copy_bytes_per_s": "nan", "flops_per_s": {"bf16": 1.0}}},
        {"ceilings": {"copy_bytes_per_s": 1.0, "flops_per_s": {"bf16": "inf"}}},
        {"ceilings": {"copy_bytes_per_s": 1.0, "flops_per_s": {"bf16": 0}}},
        {"ceilings": {"copy_bytes_per_s": 1.0, "flops_per_s": {"bf16": 1.0}}, "bytes": "inf"},
    ],
)
def test_a_roof_that_is_no_number_is_unknown(more):
    assert performance.roof_share({"device_us": 10.0, "bytes": 4e6, "flops": 8e6, "operand": "bf16"} | more) is None


@pytest.mark.parametrize("perf", ({}, None, {"device_us": 0}, {"device_us": float("nan")}, {"device_us": "fast"}))
def test_a_record_without_a_time(perf):
    assert performance.timed(verdict(perf=perf)) is None


def test_series_over_the_runs():
    old = ["_gemm BLOCK_M=64 BLOCK_N=128"]
    days = [timed(100.0 + 0.1 * (n % 3), n + 1, configurations=old) for n in range(6)]
    days += [timed(120.0 + 0.1 * (n % 3), n + 7, configurations=["_gemm BLOCK_M=64 BLOCK_N=64"]) for n in range(6)]
    found = page(*days)
    (series,) = found["series"]
    assert series["us"][:2] == [100.0, 100.1] and series["runs"] == list(range(12))
    assert series["newest"] == pytest.approx(120.2 / 100.2, rel=0.01)
    (shift,) = series["shifts"]
    assert shift["at"] == 6 and shift["ratio"] == pytest.approx(1.2, rel=0.002) and shift["p"] < 1e-6
    assert shift["with"] == ["configurations BLOCK_N=128 -> BLOCK_N=64"]
    assert found["perf"]["row"] == [0] and found["perf"]["share"] == [0.25]


def noisy(generator, n, sigma=0.01):
    """Log-normal scatter with an outlier in twenty."""
    outliers = (generator.random(n) < 0.05) * generator.exponential(0.15, n)
    return 100 * np.exp(generator.normal(0, sigma, n) + outliers)


def test_shifts_are_found_where_they_are():
    generator = np.random.default_rng(0)
    up, twice, small, quiet = (noisy(generator, 30) for _ in range(4))
    up[12:] *= 1.1
    twice[10:] *= 0.8
    twice[20:] *= 1.3
    found = history.shifts([list(s) for s in (up, twice, small, quiet)])
    at = [[shift.at for shift in series] for series in found]
    assert [len(places) for places in at] == [1, 2, 0, 0]
    assert np.abs(np.array([*at[0], *at[1]]) - [12, 10, 20]).max() <= 1  # an outlier beside a shift may move it
    assert found[0][0].ratio == pytest.approx(1.1, rel=0.01)
    assert [s.ratio for s in found[1]] == pytest.approx([0.8, 1.3], rel=0.02)


def test_noise_alone_is_not_marked():
    generator = np.random.default_rng(1)
    marked = sum(bool(s) for s in history.shifts([list(noisy(generator, 24)) for _ in range(300)]))
    assert marked <= 1


@pytest.mark.parametrize(
    "series, at",
    [
        ([5.0] * 5 + [6.0] * 5, [5]),  # no scatter at all
        ([5.0] * 10, []),
        ([5.0] * 5 + [5.05] * 5, []),  # certain, but one percent
        ([5.0] * 3 + [9.0] * 4, []),  # too few runs to tell
        ([5.0, 5.1, 4.9, 5.0, 9.0, 5.1, 5.0, 4.9, 5.1], []),  # an outlier is no level
        ([], []),
    ],
)
def test_series_that_are_easy_to_judge(series, at):
    assert [shift.at for shift in history.shifts([series])[0]] == at


# -- the command ------------------------------------------------------------------------------------------------------
def test_the_command_writes_one_page(tmp_path, capsys):
    write_run(tmp_path / "r.jsonl", [verdict("t1-h64-i64-e4-k2-bf16-exact")])
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "r.jsonl"), "--out", str(out), "--title", "<Night & day>"]) == 0
    assert "1 record" in capsys.readouterr().out
    text = out.read_text()
    assert "<title>&lt;Night &amp; day&gt;</title>" in text and "Executed 1 verdict: 1 passed." in text
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text


@pytest.mark.parametrize(
    "content, out, said",
    [
        ("hello", "page.html", "no results file: line 1 begins 'hello'"),
        ("", "page.html", "no verdict in it that can be read"),
        ("good", "r.jsonl/page.html", "argument --out: "),
    ],
)
def test_what_the_command_cannot_do(tmp_path, capsys, content, out, said):
    text = json.dumps(verdict("t1-h64")) if content == "good" else content
    (tmp_path / "r.jsonl").write_text(text)
    assert cli.main(["report", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err


def test_a_newest_run_that_is_not_whole_is_a_warning_and_an_exit_code(tmp_path, capsys):
    path, words = tmp_path / "r.jsonl", ["report", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "page.html")]
    one, two = verdict("t1-h64-i64-e4-k2-bf16-exact"), verdict("t2-h64-i64-e4-k2-bf16-exact")
    write_run(path, [one], missing=[two], end=False, run="2020-01-01T00:00:00+0000 1")
    assert cli.main(words) == 1
    assert "1 of 2 planned cases without a verdict" in capsys.readouterr().err
    assert "1 of 2 planned cases without a verdict" in (tmp_path / "page.html").read_text()
    write_run(path, [one])
    assert cli.main(words) == 0, "the older run is history, and stays a warning"
    assert "1 of 2 planned cases without a verdict" in capsys.readouterr().err
    path.write_text(path.read_text() + '{"schema": 3, "kind": "odd"}\n')
    assert cli.main(words) == 1 and "kind='odd': valid is one of begin" in capsys.readouterr().err
