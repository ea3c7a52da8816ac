"""harness/plugin, on a suite of a few rows with made-up verdicts: the number of tokens selects the verdict.

Runs in this process if possible; with xdist, or if the process has to die, in others.
"""

import json
import sys
from collections import Counter

import pytest

from harness import backend, device
from harness.base.processes import ROOT
from harness.device import Device
from harness.plugin.selection import MarkExpression, select_devices
from harness.results.file import SCHEMA
from tests.support.made_up import MINE

pytest_plugins = ["pytester"]

CONFTEST = """
import os, time
import pytest
from harness.device import DeviceLost
from harness.results.verdict import Verdict

pytest_plugins = ["harness.plugin"]
STATUS = {1: "passed", 2: "failed", 3: "unsupported", 4: "mistrusted", 8: "crashed"}
REASON = {2: "off by one", 3: "quant: not mine", 4: "nearly all zero", 8: "IndexError: 7"}

def run(case, backend, device, family="", spec=""):
    tokens = case.problem.tokens
    if tokens == 5:
        raise DeviceLost("cuda does not answer any more: illegal memory access")
    if tokens == 6:
        os._exit(3)
    if tokens == 7:
        time.sleep(60)
    report = "token 0 is wrong\\nin column 3" if tokens == 2 else ""
    budget = {1: 0.5, 2: 3.25}.get(tokens, 0.0)
    reason, status = REASON.get(tokens, ""), STATUS[tokens]
    return Verdict(str(case), backend.name, str(device), status, family, reason, report, budget, spec=spec)

@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    monkeypatch.setattr("harness.run.case.run_case", run)  # of the worker, which is a copy of this process
    monkeypatch.setattr("harness.plugin.verdicts.run_case", run)
"""

TINY = """
FAMILY = "tiny"
ROWS = {%s}
def test_tiny(check):
    check()
"""


def row(tokens, rest="-exact"):
    return f"t{tokens}-h64-i64-e4-k2-bf16{rest}"


@pytest.fixture
def suite(pytester, monkeypatch):
    """suite(1, 2): a directory with one family of these rows."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for other processes
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # no other plugin is needed, and this is faster

    def make(*rows):
        pytester.makeini("[pytest]\naddopts = --strict-markers")
        pytester.makeconftest(CONFTEST)
        texts = [r if isinstance(r, str) else row(r) for r in rows]
        pytester.makepyfile(mine=MINE, test_tiny=TINY % ", ".join(f'"{text}": "why"' for text in texts))
        return pytester

    return make


def run(pytester, *arguments, spec="mine:Mine"):
    return pytester.runpytest_inprocess("--device=cpu", f"--backend={spec}", *arguments)


def run_process(pytester, *arguments):
    return pytester.runpytest_subprocess("--device=cpu", "--backend=mine:Mine", *arguments)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(path):
    return [line for line in lines(path) if line["kind"] == "verdict"]


# -- devices ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "markexpr, named, present, chosen, remarked",
    [
        ("", [], "cpu", ["cpu"], []),
        ("", [], "cpu cuda", ["cpu", "cuda"], []),
        ("cpu", [], "cpu cuda", ["cpu"], []),
        ("cuda", [], "cpu cuda", ["cuda"], []),
        ("not cuda", [], "cpu cuda", ["cpu"], []),
        ("not cpu", [], "cpu cuda", ["cuda"], []),
        ("not cpu", [], "cpu", [], []),
        ("low_latency", [], "cpu cuda", ["cpu", "cuda"], []),
        ("low_latency and not cpu or scratch and cpu and not cpu", [], "cpu cuda", ["cuda"], []),
        ("cuda and (exact or random)", [], "cpu", [], ["cuda"]),
        ("cpu or cuda", [], "cpu", ["cpu"], ["cuda"]),
        ("", ["cuda"], "cpu", [], ["cuda"]),
        ("", ["cuda", "cpu"], "cpu", ["cpu"], ["cuda"]),
        ("cpu", ["cuda"], "cpu cuda", [], []),
        ("xpu", [], "cpu", ["xpu (emulated)"], ["xpu"]),
        ("emulated", [], "cpu", ["cpu", "xpu (emulated)"], ["xpu"]),
        ("", ["xpu"], "cpu cuda", ["xpu (emulated)"], ["xpu"]),
        ("xpu", [], "cpu xpu", ["xpu"], []),
    ],
)
def test_devices_are_those_that_can_match_and_are_here(markexpr, named, present, chosen, remarked):
    found = select_devices(markexpr, named, tuple(present.split()))
    assert [str(d) for d in found.devices] == chosen
    text = "\n".join(found.remarks)
    assert [name for name in ("cuda", "xpu") if f"on {name}" in text or f"{name} is EMULATED" in text] == remarked


def test_names_of_an_expression_are_found_behind_short_circuits():
    assert MarkExpression("cpu and (a or b) and not c").names == {"cpu", "a", "b", "c"}
    assert MarkExpression("").names == set() and MarkExpression("").can_be_true({})


@pytest.mark.skipif("cuda" in device.present(), reason="there is a CUDA device")
def test_an_absent_device_gives_no_items_and_says_why(suite):
    result = suite(1).runpytest_inprocess("-m", "cuda", "--backend=mine:Mine")
    assert result.ret == 5
    result.stdout.fnmatch_lines(["moe-harness: devices: none", "nothing runs on cuda: no CUDA device:*"])


@pytest.mark.skipif("xpu" in device.present(), reason="there is an XPU")
def test_an_absent_xpu_is_emulated_for_those_that_promise_its_contract(suite):
    tests = suite(1)
    result = tests.runpytest_inprocess("-m", "xpu", "--backend=mine:Contract", "-v")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            f"*{row(1)}:contract:xpu*PASSED*",
            "*xpu is EMULATED*",
            "nothing runs on an XPU: no XPU*",
            "contract@xpu-emulated*",
        ]
    )
    result = tests.runpytest_inprocess("-m", "xpu", "--backend=mine:Mine")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: --backend mine:Mine cannot be used here: xpu (emulated): *xpu_contract*"])


# -- items ------------------------------------------------------------------------------------------------------------
def test_ids_order_and_rows_without_a_fill(suite):
    result = run(suite(row(1, ""), row(2)), "--collect-only", "-q", "--backend=mine:Other")
    ids = [line.partition("[")[2].rstrip("]") for line in result.outlines if "[" in line]
    cases = (row(1, "-exact"), row(1, "-random"), row(2))
    assert ids == [f"{case}:{name}:cpu" for case in cases for name in ("mine", "other")]
    assert not any("Executed" in line for line in result.outlines)


@pytest.mark.parametrize(
    "options, executed",
    [
        (["-m", "cpu and tiny and exact"], 3),
        (["-m", "random"], 1),
        (["-m", "not tiny"], 0),
        (["-k", f"{row(1)}:mine:cpu"], 1),
        (["-k", "t1- and not random"], 2),
        ([f"test_tiny.py::test_tiny[{row(4)}:mine:cpu]"], 1),
        (["--fill=random"], 1),
        (["--fill=random", "--fill=exact"], 4),
        (["-p", "no:cacheprovider", "-q"], 4),
    ],
    ids=str,
)
def test_selections(suite, options, executed):
    result = run(suite(row(1, ""), 4, row(1, "-kn-exact")), *options)
    assert result.ret == (0 if executed else 5)
    assert (f"Executed {executed} verdict" in result.stdout.str()) == bool(executed)
    assert ("This was a selection" in result.stdout.str()) == bool(executed)  # --backend alone is one


def test_seed_replaces_every_seed(suite):
    result = run(suite(row(1), row(1, "-exact-s7")), "--collect-only", "-q", "--seed=3")
    assert [line for line in result.outlines if "[" in line] == [f"test_tiny.py::test_tiny[{row(1)}-s3:mine:cpu]"]


def test_markers_are_known(suite):
    assert run(suite(1), "-W", "error").ret == 0


@pytest.mark.parametrize(
    ("descriptor", "line"),
    [
        ("t1-h64-q7", "test_tiny: 't1-h64-q7': no field is written 'q7'; *tokens look like: *"),
        (row(1, "-exact-swap.copi_"), "test_tiny: *: no scenario 'swap.copi_'; did you mean 'swap.copy_'?"),
    ],
)
def test_a_row_that_makes_no_sense_is_one_line(suite, descriptor, line):
    result = run(suite(descriptor))
    assert result.ret == 2
    result.stdout.fnmatch_lines([line.replace("?", "[?]")])
    assert "Traceback" not in result.stdout.str()


def test_a_test_that_does_not_call_check_is_no_pass(suite):
    tests = suite(1)
    tests.makepyfile(test_tiny=(TINY % f'"{row(1)}": "why"').replace("check()", "pass"))
    result = run(tests)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*the test never called check(): it proves nothing*"])


# -- verdicts ---------------------------------------------------------------------------------------------------------
def test_verdicts_become_outcomes_records_and_a_table(suite):
    tests = suite(1, 2, 3, 4, 8)
    path = tests.path / "deep" / "results.jsonl"
    result = run(tests, f"--results={path}", "-rs")
    assert result.ret == 1
    result.assert_outcomes(passed=2, failed=2, skipped=1)
    again = f"python3 -m harness run {row(2)} --backend mine:Mine --device cpu"
    result.stdout.fnmatch_lines(["token 0 is wrong", "in column 3", again, "*"], consecutive=True)
    result.stdout.fnmatch_lines(
        [
            "mine@cpu   1/2/1/1 3.25",
            "  quant  1  mine@cpu: not mine",
            "  1  nearly all zero",
            f"     such as mine@cpu {row(4)}",
            "  failed: mine@cpu: off by one",
            f"    {again}",
            "  crashed: mine@cpu: IndexError: 7",
            "Executed 4 verdicts in * s: 1 passed, 1 failed, 1 crashed, 1 mistrusted.",
            "Not run: 1 unsupported (1 quant).",
            f"Results: {path}",
            "SKIPPED*quant: not mine",
        ]
    )
    found = records(path)
    assert [r["status"] for r in found] == ["passed", "failed", "unsupported", "mistrusted", "crashed"]
    assert {(r["schema"], r["family"], r["device"], r["environment"]["device"]) for r in found} == {
        (SCHEMA, "tiny", "cpu", "cpu")
    }
    assert len({(r["run"], r["commit"]) for r in found}) == 1 and found[1]["reproduce"] == again
    assert run(tests, f"--results={path}", "--lf").ret == 1
    assert [r["status"] for r in records(path)[5:]] == ["failed", "crashed"]


def test_backends_that_are_not_available_are_listed(suite, monkeypatch):
    tests = suite(1, row(1, ""))
    found = []
    monkeypatch.setattr(backend, "installed", lambda: found)
    sys.path.insert(0, str(tests.path))  # pytester restores it
    import mine

    found += [mine.Mine(), mine.Elsewhere()]
    result = tests.runpytest_inprocess("--device=cpu", "-m", "random")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["  elsewhere@cpu missed 1 case: device: elsewhere declares cuda"])


@pytest.mark.parametrize(
    "option, message",
    [
        ("--backend=nobody", "--backend nobody: no such backend; known: triton,*"),
        ("--backend=mine:Nobody", "--backend mine:Nobody: module mine has no 'Nobody'"),
        ("--backend=mine:Elsewhere", "--backend mine:Elsewhere cannot be used here: cpu: device: *declares cuda"),
        ("--floor=none.toml", "--floor none.toml: No such file or directory"),
        ("--results=conftest.py/x", "*--results: conftest.py/x: Not a directory"),
        ("-m=cpu and", "-m 'cpu and': *"),
        ("--device=tpu", "*--device: invalid choice: 'tpu'*"),
        pytest.param(
            "--require-device=xpu", "--require-device xpu: no XPU*",
            marks=pytest.mark.skipif("xpu" in device.present(), reason="there is an XPU"),
        ),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(suite, option, message):
    result = run(suite(1), *option.split("=", 1) if option.startswith("-m") else [option])
    assert result.ret == 4
    result.stderr.fnmatch_lines([message if message.startswith("*") else f"ERROR: *{message}"])
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_the_floor_fails_a_run_that_executed_less(suite):
    tests = suite(1, 3, 4)
    (tests.path / "floor.toml").write_text("[cpu]\nmine = 2\nnot-asked-for = 9\n[cuda]\nmine = 9\n")
    assert run(tests, "--floor=floor.toml").ret == 0
    (tests.path / "floor.toml").write_text("[cpu]\nmine = 3\n")
    result = run(tests, "--floor=floor.toml")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["floor: mine on cpu executed 2 verdicts, at least 3 are due; *python3 -m harness floor RESULTS"]
    )


# -- devices that are lost, processes that die ------------------------------------------------------------------------
COSTLY = (*(row(t, f"-exact-s{s}") for s in (0, 1) for t in (1, 2, 3)), 4, 5, 6, 7)
COUNTS = {"passed": 2, "failed": 2, "unsupported": 2, "mistrusted": 1, "crashed": 2, "hung": 1}


@pytest.mark.parametrize("options", [(), ("-n", "2"), ("-n", "2", "--dist=worksteal")], ids=" ".join)
def test_a_case_that_ends_or_blocks_its_process_costs_itself(suite, monkeypatch, options):
    tests = suite(*COSTLY)
    if options:
        pytest.importorskip("xdist")
        monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")  # with whatever other plugins are here
    result = run_process(tests, *options, "--results=r.jsonl", "--case-timeout=4")
    assert result.ret == 1
    found = records(tests.path / "r.jsonl")
    assert Counter(r["status"] for r in found) == COUNTS
    reasons = {r["case"]: r["reason"] for r in found if r["status"] in ("crashed", "hung")}
    assert reasons[row(5)] == "device lost: cuda does not answer any more: illegal memory access"
    assert reasons[row(6)] == "the process ended with exit code 3"
    assert reasons[row(7)] == "no answer in 4 s"
    result.stdout.fnmatch_lines(
        [
            "mine@cpu   2/5/1/2 3.25",
            "Executed 8 verdicts in * s: 2 passed, 2 failed, 2 crashed, 1 hung, 1 mistrusted.",
            "Not run: 2 unsupported (2 quant).",
        ]
    )


def test_a_run_has_a_beginning_a_plan_and_an_end(suite):
    tests = suite(1, 2, 3)
    run(tests, "--results=r.jsonl", "-m", "exact")
    begin, plan, *_, end = lines(tests.path / "r.jsonl")
    assert (begin["kind"], plan["kind"], end["kind"]) == ("begin", "plan", "end")
    assert begin["options"]["markexpr"] == "exact" and begin["versions"]["pytest"] == pytest.__version__
    assert plan["total"] == 3 and plan["counts"] == {"mine@cpu": {"tiny": 3}}
    assert plan["items"] == {"test_tiny.py::test_tiny": [f"{row(t)}:mine:cpu" for t in (1, 2, 3)]}
    assert (end["exit"], end["planned"], end["verdicts"]) == (1, 3, 3)
    assert end["counts"] == {"passed": 1, "failed": 1, "unsupported": 1}


def test_a_case_without_a_verdict_makes_the_run_red(suite):
    tests = suite(1, 4)
    skips = "def pytest_runtest_setup(item):\n    if 't1-' in item.name:\n        pytest.skip('not today')\n"
    tests.makeconftest(CONFTEST + skips)
    result = run(tests, "--results=r.jsonl")
    assert result.ret == 1
    missing = f"  test_tiny.py::test_tiny[[]{row(1)}:mine:cpu]"
    result.stdout.fnmatch_lines(["1 case of the plan without a verdict:", missing])
    assert lines(tests.path / "r.jsonl")[-1]["exit"] == 1


def test_a_run_that_was_stopped_is_continued(suite):
    tests = suite(1, 2, 4, 8)
    assert run(tests, "--results=r.jsonl", "-x").ret == 1
    assert [r["status"] for r in records(tests.path / "r.jsonl")] == ["passed", "failed"]
    result = run(tests, "--continue=r.jsonl")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*2 deselected*", "Executed 4 verdicts in *: 1 passed, 1 failed, 1 crashed, 1 mistrusted."]
    )
    assert [r["status"] for r in records(tests.path / "r.jsonl")] == ["passed", "failed", "mistrusted", "crashed"]
    assert len({line["run"] for line in lines(tests.path / "r.jsonl")}) == 1
    again = run(tests, "--continue=r.jsonl")
    assert again.ret == 1 and "Executed 4 verdicts" in again.stdout.str()
    result = run(tests, "--continue=r.jsonl", "--seed=3")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: --continue r.jsonl: its run has options *"])


@pytest.mark.parametrize("options", [("--in-process",), ("-s",), ("-p", "no:moe-harness-isolation")], ids=" ".join)
def test_in_one_process_a_lost_device_ends_the_run(suite, options):
    tests = suite(1, 5, 4)
    result = run(tests, "--results=r.jsonl", *options)
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*Exit: cuda does not answer any more: illegal memory access. No result*"])
    result.stdout.fnmatch_lines(["Executed 2 verdicts in * s: 1 passed, 1 crashed."])
    assert [r["status"] for r in records(tests.path / "r.jsonl")] == ["passed", "crashed"]


def test_in_one_process_a_device_is_found_lost_after_a_failure(suite, monkeypatch):
    def synchronize(self):
        raise device.DeviceLost("gone")

    monkeypatch.setattr(Device, "synchronize", synchronize)
    result = run(suite(2, 1), "--in-process")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*Exit: gone. No result after t2-*"])


def test_in_one_process_a_case_that_hangs_is_recorded_before_the_process_ends(suite):
    tests = suite(1, 7, 4)
    result = run_process(tests, "--results=r.jsonl", "--case-timeout=3", "--in-process")
    assert result.ret == 1
    text = result.stderr.str() + result.stdout.str()
    assert "time.sleep(60)" not in text and "in run" in text  # the stacks of all threads
    assert f"hung: no answer in 3 s (--case-timeout)\npython3 -m harness run {row(7)}" in text
    assert [r["status"] for r in records(tests.path / "r.jsonl")] == ["passed", "hung"]


def test_a_kernel_in_somebody_elses_directory(pytester, monkeypatch):
    """Started from there with the command `pytest`, which unlike python -m pytest does not put it on sys.path."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    pytester.makepyfile(mine=MINE)
    start = "import sys, pytest; sys.path[:] = [p for p in sys.path if p]; sys.exit(pytest.main(sys.argv[1:]))"
    family = str(ROOT / "cases" / "test_errors.py")
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--device=cpu"]
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    result = pytester.run(sys.executable, "-c", start, family, "--backend", "mine:Mine", *options)
    assert result.ret == 0, result.stderr.str()
    result.stdout.fnmatch_lines(["*test_errors.py::test_errors[[]t*:mine:cpu]"])
