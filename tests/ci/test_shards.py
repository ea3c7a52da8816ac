"""ci/durations.py: every item in exactly one shard, balanced by what it took before."""

import json
from random import Random

import pytest

from harness import device
from harness.base.processes import ROOT
from harness.ci import durations, matrix
from harness.ci.durations import Durations, condensed, recorded, split
from harness.ci.matrix import MatrixError
from harness.device import Device
from harness.problem import families
from harness.results.verdict import Verdict
from tests.support.made_up import MINE

pytest_plugins = ["pytester"]


# -- the split --------------------------------------------------------------------------------------------------------
def test_every_key_is_in_one_shard_whatever_the_order():
    for seed in range(200):
        random = Random(seed)
        weights = {f"k{n}": random.choice([0.0, 0.01, 1.0, random.expovariate(1)]) for n in range(random.randrange(60))}
        count = random.randint(1, 8)
        found = split(weights, count)
        assert found.keys() == weights.keys() and set(found.values()) <= set(range(1, count + 1))
        shuffled = list(weights)
        random.shuffle(shuffled)
        assert split({key: weights[key] for key in shuffled}, count) == found
        loads = [sum(w for key, w in weights.items() if found[key] == shard) for shard in range(1, count + 1)]
        # No shard is ahead of a perfect split by more than one item: the last given to it went where least was.
        assert max(loads) <= sum(loads) / count + max(weights.values(), default=0) + 1e-9


def test_the_heaviest_go_first():
    assert split({"a": 3, "b": 3, "c": 2, "d": 2, "e": 2}, 2) == {"a": 1, "b": 2, "c": 1, "d": 2, "e": 1}
    assert split({("x", "cpu"): 1, ("y", "cpu"): 1}, 3) == {("x", "cpu"): 1, ("y", "cpu"): 2}


# -- durations --------------------------------------------------------------------------------------------------------
def record(case, backend, seconds, family="layers", device="cpu"):
    return Verdict(case, backend, device, "passed", family, seconds=seconds).record() | {"schema": 1, "run": "1"}


RECORDS = [
    *(record(f"t{n}-h64", "triton", 0.5) for n in range(1, 9)),
    record("t9-h64", "triton", 9.0),
    record("t1-h64", "eager", 0.25),
    record("t1-h64", "triton", 4.0, device="xpu (emulated)"),
]


def test_a_small_file_holds_what_matters(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text(condensed(RECORDS))
    found = durations.read(path)
    assert found.items == {"cpu": {"t9-h64:triton": 9.0}}
    assert found.means == {
        "cpu": {"layers": {"triton": 0.5, "eager": 0.25}},
        "xpu-emulated": {"layers": {"triton": 4.0}},
    }
    assert found.expected("cpu", "layers", "triton", "t9-h64") == 9.0
    assert found.expected("cpu", "layers", "triton", "t77-h64") == 0.5  # never seen: as its family and backend
    assert found.expected("cpu", "errors", "mine", "t1-h64") == 0.375  # nor these: as its device
    assert found.expected("xpu (emulated)", "layers", "triton", "t9-h64") == 4.0
    assert found.expected("cuda", "layers", "triton", "t9-h64") == durations.UNKNOWN


def test_a_results_file_is_known_item_by_item(tmp_path):
    path = tmp_path / "r.jsonl"
    again = [record("t9-h64", "triton", 11.0) | {"run": "2"}]
    path.write_text("".join(json.dumps({"schema": 1, **r}) + "\n" for r in RECORDS + again))
    found = durations.read(path)
    assert found == recorded(RECORDS + again)
    assert found.expected("cpu", "layers", "triton", "t9-h64") == 10.0  # the mean of its runs
    assert found.expected("cpu", "layers", "triton", "t3-h64") == 0.5


@pytest.mark.parametrize(
    "text, message",
    [(None, "No such file"), ("[mean", "d.toml: "), ("[seconds.cpu]", r"\[seconds\]: the tables are \[mean...\]")],
)
def test_a_durations_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "d.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MatrixError, match=message):
        durations.read(path)


def test_the_committed_durations_balance_the_rows_of_the_matrix():
    """The suite as it is now, by what is known of it: new families and backends are to be recorded."""
    device.start({"cpu"})
    past = durations.read(matrix.DURATIONS)
    for row in matrix.read().values():
        if row.shards == 1:
            continue
        emulated = row.device != row.device.removesuffix("-emulated")
        on = Device(row.device.removesuffix("-emulated"), emulated)
        weights: dict[str, float] = {}
        for module in families.families():
            if module.FAMILY == families.TIMED:
                continue
            for backend in row.floor:
                if hasattr(module, "STAGE") and backend != "triton":
                    continue  # it shows no stages
                assert backend in past.means[row.device][module.FAMILY], (row.name, module.FAMILY, backend)
                for found in families.rows(module, on.on_cpu):
                    seconds = past.expected(str(on), module.FAMILY, backend, str(found.case))
                    weights[str(found.case)] = weights.get(str(found.case), 0) + seconds
        shard = split(weights, row.shards)
        loads = [sum(w for case, w in weights.items() if shard[case] == i) for i in set(shard.values())]
        assert len(loads) == row.shards and max(loads) < 1.05 * min(loads), (row.name, loads)


# -- under pytest -----------------------------------------------------------------------------------------------------
CONFTEST = """
import pytest
from harness.results.verdict import Verdict

pytest_plugins = ["harness.plugin"]

@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    monkeypatch.setattr("harness.run.case.run_case", lambda case, backend, device, family="", spec="": Verdict(
        str(case), backend.name, str(device), "passed", family, spec=spec))
"""
TINY = """
FAMILY = "tiny"
ROWS = {f"t{t}-h64-i64-e4-k2-bf16-exact": "made up" for t in range(1, 10)}
def test_tiny(check):
    check()
def test_that_is_no_case():
    pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """run(*words): the node ids of what ran, and how it ended."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("GITHUB_ACTIONS", matrix.ROW, matrix.SHARD):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(mine=MINE, test_tiny=TINY)
    monkeypatch.syspath_prepend(pytester.path)

    def go(*words, how="inline"):
        both = ("--backend=mine:Mine", "--backend=mine:Other", "-pno:cacheprovider", "--device=cpu")
        run = pytester.runpytest_inprocess if how == "inline" else pytester.runpytest_subprocess
        return run("-v", *both, *words)

    return go


def passed(result):
    return {line.split()[0] for line in result.outlines if " PASSED" in line}


def test_all_shards_together_run_every_item_once(run):
    whole, parts = passed(run()), [passed(run(f"--shard={i}/3")) for i in (1, 2, 3)]
    assert len(whole) == 19 and set().union(*parts) == whole and sum(map(len, parts)) == 19
    assert all(len(part) >= 5 for part in parts)
    for part in parts:  # both backends of a case, or none
        cases = [name.partition("[")[2].split(":")[0] for name in part if "[" in name]
        assert all(cases.count(case) == 2 for case in cases)


def test_a_selection_is_balanced_too(run):
    few = "t1- or t2- or t3- or t4-"
    parts = [passed(run(f"--shard={i}/2", "-k", few)) for i in (1, 2)]
    assert list(map(len, parts)) == [4, 4] and not parts[0] & parts[1]


def test_a_shard_by_durations_and_by_worker_processes(run, pytester):
    path = pytester.path / "d.toml"
    path.write_text("[mean.cpu.tiny]\nmine = 0.1\nother = 0.1\n[slow.cpu]\n't5-h64-i64-e4-k2-bf16-exact:mine' = 60.0\n")
    words = (f"--durations-from={path}", "-k", "test_tiny and not no_case")
    alone, rest = (passed(run(f"--shard={i}/2", *words)) for i in (1, 2))
    assert {name.partition("[")[2].split("-")[0] for name in alone} == {"t5"} and len(alone) == 2 and len(rest) == 16
    spread = run("--shard=1/2", *words, "-p", "xdist", "-n2", how="process")
    spread.assert_outcomes(passed=2)


def test_a_shard_does_not_check_the_floor(run, pytester):
    (pytester.path / "floor.toml").write_text("[cpu]\nmine = 100\n")
    result = run("--shard=1/2", "--floor=floor.toml")
    assert result.ret == 0
    told = "The floor is for whole runs, not for a selection (--shard 1/2): it was not checked."
    assert told in result.outlines


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shard=3/2"], "--shard 3/2: I/N with I from 1 to N"),
        (["--shard=1/2", "--durations-from=no.toml"], "no.toml: No"),
    ],
)
def test_wrong_words(run, words, message):
    result = run(*words)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any(message in line for line in result.errlines)


def test_records_say_which_row_and_shard_made_them(run, pytester, monkeypatch):
    monkeypatch.setenv(matrix.ROW, "gpu")
    monkeypatch.setenv(matrix.SHARD, "1/2")
    run("--shard=1/2", "--results=r.jsonl")
    records = [json.loads(line) for line in (pytester.path / "r.jsonl").read_text().splitlines()]
    assert records and {(r["row"], r["shard"]) for r in records} == {("gpu", "1/2")}


def test_unknown_items_weigh_the_same():
    assert Durations().expected("cpu", "layers", "triton", "t1") == durations.UNKNOWN
