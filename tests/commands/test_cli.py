"""harness/cli.py: each command's output and exit code; verdicts are made up where the case itself does not matter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli, device
from harness.backend import BackendError
from harness.base.errors import UserError
from harness.base.processes import ROOT
from harness.ci.matrix import MatrixError
from harness.commands import compare, mutate
from harness.mutate.bugs import BugError
from harness.perf.count.baseline_file import BaselineError
from harness.problem import families
from harness.problem.case import DescriptorError
from harness.problem.words import glossary
from harness.results import known_failures
from harness.results.file import ResultsError
from harness.results.known_failures import LedgerError
from harness.results.verdict import Verdict
from tests.support.results_files import write_run

CASE = "t4-h64-i64-e8-k2-bf16-limit7-kn-exact"


@pytest.fixture
def made_up(monkeypatch):
    """made_up(status, ...): the verdict that run_case returns."""

    def set_to(status, **more):
        def run(case, backend, device, family="", spec=""):
            return Verdict(str(case), backend.name, str(device), status, family, spec=spec, **more)

        monkeypatch.setattr("harness.run.case.run_case", run)  # of the worker, which is a copy of this process

    return set_to


def main(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


# -- run --------------------------------------------------------------------------------------------------------------
def test_run_prints_everything(made_up, capsys):
    trace = {"launches": ["_gemm", "_gemm", "_combine"], "operators": 3, "allocated_bytes": 64}
    made_up(
        "failed", reason="off by one", report="off by one\n  token 0 is wrong\n", budget=2.5, statistic="rho",
        budgets={"class": 0.0, "rho": 2.5}, plan="act=io", seconds=0.25, calls=2, trace=trace,
    )  # fmt: skip
    code, out, _ = main(capsys, "run", CASE, "--backend", "torch-grouped-mm")
    assert code == 1
    assert (
        out
        == f"""\
{CASE} on torch-grouped-mm, cpu
  sizes         4 tokens of 64, top 2 of 8 experts of 64
  dtype         bf16, unquantized
  layout        kn: w13 [E, K, 2I], w2 [E, I, K]; w13 is 8x64x128
  activation    silu: silu(g) * u; clamp 7
  topk_ids      int32, uniform: all experts alike
  fill          exact: every correct kernel gives the same bits; seed 0
  scenario      once: one call
failed: off by one
  judged        2 calls in 0.25 s, oracle included
  budget used   2.50 (class 0.00, rho 2.50); above 1 fails
  plan          act=io
  launched      _gemm x2, _combine
  traced        3 operators, 64 allocated bytes

  token 0 is wrong

python3 -m harness run {CASE} --backend torch-grouped-mm --device cpu
"""
    )


def test_run_a_kernel_of_ones_own_with_several_seeds(made_up, capsys, tmp_path, monkeypatch):
    text = "class Mine:\n    name, devices = 'mine', {'cpu'}\n    def prepare(self, problem, layer): ..."
    (tmp_path / "own_kernel.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made_up("passed")
    code, out, _ = main(capsys, "run", CASE + "-s5", "--backend", "own_kernel:Mine", "--seeds", "2", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["case"] for r in found] == [CASE + "-s5", CASE + "-s6"]
    assert found[0]["environment"]["device"] == "cpu" and "--backend own_kernel:Mine " in found[0]["reproduce"]


def test_run_says_that_an_unsupported_case_was_not_run_and_counts_seeds(made_up, capsys):
    made_up("unsupported", reason="quant: bf16 only")
    code, out, _ = main(capsys, "run", CASE, "--backend", "torch-grouped-mm", "--seeds", "2")
    assert code == 0 and out.count("\nunsupported, so it was not run: quant: bf16 only\n\n") == 2
    assert out.endswith("\n\n2 seeds: 2 unsupported\n")


def test_run_says_that_a_failure_is_known_and_is_red_still(made_up, capsys, tmp_path, monkeypatch):
    path = tmp_path / "ledger.toml"
    path.write_text(f"""[[known]]
backend = "torch-grouped-mm"
cases = "{CASE}"
says = "off by"
found = "2026-11-23"
shows = "{CASE}"
why = "one is added"
""")
    monkeypatch.setattr(known_failures, "LEDGER", path)
    made_up("failed", reason="off by one")
    code, out, _ = main(capsys, "run", CASE, "--backend", "torch-grouped-mm")
    assert code == 1 and "\nfailed: off by one\n  known         one is added (found here 2026-11-23)\n" in out
    made_up("failed", reason="NaN")
    code, out, _ = main(capsys, "run", CASE, "--backend", "torch-grouped-mm")
    assert code == 1 and "known" not in out
    path.write_text("[[unknown]]")
    code, _, err = main(capsys, "run", CASE, "--backend", "torch-grouped-mm")
    assert code == 2 and "every entry is a table [[known]]" in err


def test_run_says_when_the_device_is_lost(monkeypatch, capsys):
    def lost(*_, **__):
        raise device.DeviceLost("cuda does not answer any more")

    monkeypatch.setattr("harness.run.case.run_case", lost)
    code, out, _ = main(capsys, "run", CASE, "--backend", "torch-grouped-mm")
    assert code == 1 and "\ncrashed: device lost: cuda does not answer any more\n" in out
    monkeypatch.setattr("harness.commands.run.run_case", lost)
    code, _, err = main(capsys, "run", CASE, "--backend", "torch-grouped-mm", "--in-process")
    assert code == 1 and err == "moe-harness: the device is lost: cuda does not answer any more\n"


@pytest.mark.skipif("xpu" in device.present(), reason="there is an XPU")
def test_run_emulates_an_absent_xpu_and_says_so(made_up, capsys):
    made_up("passed")
    code, out, _ = main(capsys, "run", CASE, "--backend", "triton-cached", "--device", "xpu")
    assert code == 0 and out.startswith("xpu is EMULATED") and f"{CASE} on triton-cached, xpu (emulated)" in out
    code, _, err = main(capsys, "run", CASE, "--backend", "triton", "--device", "xpu")
    assert code == 2 and err.endswith("to be emulated, triton must set xpu_contract\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "t4-h64-q", "--backend", "triton"], "'t4-h64-q': no field is written 'q'; tokens look like: "),
        (["run", CASE, "--backend", "nobody"], "--backend nobody: no such backend; known: triton, "),
        (["run", CASE, "--backend", "triton", "--seeds", "0"], "argument --seeds: 0: must be an integer from 1 to "),
        (["list", "--family", "none"], "--family none: no such family; one of "),
        (["floor", "none.jsonl"], "none.jsonl: no such file, directory, or file of this pattern"),
        pytest.param(
            ["run", CASE, "--backend", "triton", "--device", "cuda"], "--device cuda: no CUDA device: ",
            marks=pytest.mark.skipif("cuda" in device.present(), reason="there is a CUDA device"),
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    code, out, err = main(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("moe-harness: " + message) and err.count("\n") == 1


@pytest.mark.parametrize(
    "kind",
    [BackendError, BaselineError, BugError, DescriptorError, LedgerError, MatrixError, ResultsError, UserError],
    ids=lambda kind: kind.__name__,
)
def test_every_error_for_the_user_ends_with_code_2(monkeypatch, capsys, kind):
    def read(*_):
        raise kind("x=3: must be 4")

    monkeypatch.setattr(known_failures, "read", read)
    code, out, err = main(capsys, "run", CASE, "--backend", "torch-grouped-mm")
    assert (code, out, err) == (2, "", "moe-harness: x=3: must be 4\n")


def test_an_error_of_the_harness_is_no_error_for_the_user(monkeypatch):
    def read(*_):
        raise ValueError("a defect")

    monkeypatch.setattr(known_failures, "read", read)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["run", CASE, "--backend", "torch-grouped-mm"])


def test_a_wrong_descriptor_names_the_command_that_lists_them(capsys):
    for words in (["run", "t4-h64", "--backend", "triton"], ["compare", "HEAD", "HEAD", "t4-h64"]):
        code, _, err = main(capsys, *words)
        assert code == 2 and err.endswith("; those in use: python3 -m harness list --why\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "argument COMMAND: rnu: no such word; did you mean 'run'?; see moe-harness --help"),
        (["list", "--family", "layrs"], "--family layrs: no such family; did you mean 'layers'?; one of "),
        (["matrix", "cpuu"], "cpuu: no such row; did you mean 'cpu'?; one of "),
        (["mutate", "alinment"], "alinment: no entry of that name or pattern; did you mean 'alignment'?; classes: "),
        (["run", CASE + "-swap.copi_", "--backend", "x"], f"{CASE}-swap.copi_: no scenario 'swap.copi_'; did you mean"),
        (["run", CASE + "-nix.nix", "--backend", "x"], f"{CASE}-nix.nix: no scenario 'nix.nix'; valid: align.*, "),
        (["run", CASE.replace("bf16", "bf17"), "--backend", "x"], f"'{CASE.replace('bf16', 'bf17')}': no field is "),
    ],
)  # fmt: skip
def test_a_misspelt_word_is_suggested(capsys, words, message):
    code, out, err = main(capsys, *words)
    assert code == 2 and out == "" and err.startswith("moe-harness: " + message) and err.count("\n") == 1


def test_a_full_disk_is_one_line():
    words = [sys.executable, "-m", "harness", "list", "--grammar"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "moe-harness: the output: No space left on device\n")
    for write in (lambda: compare._write(Path("/dev/full"), "a", "x"), lambda: mutate._write(Path("/dev/full"), "x")):
        with pytest.raises(UserError, match="/dev/full: No space left on device"):
            write()


# -- list and doctor --------------------------------------------------------------------------------------------------
def test_list_prints_the_grammar(capsys):
    code, out, _ = main(capsys, "list", "--grammar")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 + len(glossary())
    assert any(line.split() == ["nobody", "routing", "every", "id", "is", "-1"] for line in lines)


def test_list_counts_cases_and_gives_their_reasons(capsys):
    module = next(m for m in families.families() if m.FAMILY == "layers")
    rows = families.rows(module, on_cpu=True)
    code, out, _ = main(capsys, "list")
    line = next(line for line in out.splitlines() if line.startswith(module.FAMILY + " "))
    assert code == 0 and f" {len(rows)} cases" in line and " cases on cpu" in out.splitlines()[-1]
    _, out, _ = main(capsys, "list", "--family", module.FAMILY, "--why")
    assert out.splitlines() == [f"{row.case}  {row.why}" for row in rows]
    _, out, _ = main(capsys, "list", "--family", module.FAMILY, "--backend", "triton-cached")
    assert 0 < int(out.split()[1]) < len(rows) and "for triton-cached" in out


def test_doctor():
    done = subprocess.run([sys.executable, "-m", "harness", "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("python ") and lines[1].startswith("torch ")
    assert any(line.startswith("cpu: ") for line in lines)
    assert any(line.split()[:1] == ["torch-grouped-mm"] for line in lines)
    for name in set(device.DEVICES) - set(device.present()):
        assert f"{name}: {device.why_absent(name)}" in lines


# -- verify and floor -------------------------------------------------------------------------------------------------
def test_verify_is_one_pytest_a_device_and_gives_the_worst_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran, codes = [], {"cpu": 0, "cuda": 1, "xpu": -11}

    def run(command, env):
        ran.append(command)
        name = next(c for c in command if c.startswith("--device=")).partition("=")[2]
        return subprocess.CompletedProcess(command, codes[name])

    monkeypatch.setattr(device, "present", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(subprocess, "run", run)
    code, out, _ = main(capsys, "verify", "--backend", "triton", "--jobs", "3", "--", "-x", "-q")
    assert code == 1 and len(ran) == 2 and "moe-harness: cuda: pytest ended with 1" in out
    assert ran[0][:3] == [sys.executable, "-m", "pytest"]
    assert {"--device=cpu", "--backend=triton", "--dist=worksteal", f"--floor={ROOT}/cases/floor.toml"} <= set(ran[0])
    assert ran[0][-3:] == [str(ROOT / "cases"), "-x", "-q"]
    assert any(c.startswith("--results=results/") and c.endswith("-cpu.jsonl") for c in ran[0])
    assert cli.main(["verify", "--device", "xpu"]) == 128 + 11


def test_floor_prints_a_file(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    records = [Verdict(CASE, "triton", "cpu", "passed", seconds=n).record() for n in range(10)]
    write_run(path, [r | {"family": f"f{n}"} for n, r in enumerate(records)])
    with path.open("a") as cut:
        cut.write('{"sch')
    code, out, err = main(capsys, "floor", str(path))
    assert code == 0 and out.endswith("\n[cpu]\ntriton = 9\n") and "1 line cut off by a crash, left out" in err


def test_a_floor_is_of_a_whole_run(tmp_path, capsys):
    one, two = (Verdict(CASE, "triton", "cpu", "passed", family).record() for family in ("a", "b"))
    write_run(tmp_path / "r.jsonl", [one], missing=[two], end=False)
    code, _, err = main(capsys, "floor", str(tmp_path / "r.jsonl"))
    assert code == 2 and "is not whole: it has no end: it was killed, or is still running" in err


@pytest.mark.parametrize(
    "end, missing, code, said",
    [
        (True, False, 0, ""),
        (True, True, 1, "the run is not whole: 1 of 2 planned cases without a verdict"),
        (False, False, 1, "the run is not whole: it has no end"),
        (None, False, 1, "the run is not whole: results/"),
    ],
)
def test_verify_is_red_if_the_run_is_not_whole(tmp_path, monkeypatch, capsys, end, missing, code, said):
    one, two = (Verdict(CASE, "triton", "cpu", "passed", family).record() for family in ("a", "b"))

    def run(command, env):
        path = next(c for c in command if c.startswith("--results=")).partition("=")[2]
        if end is not None:
            write_run(Path(path), [one], missing=[two] * missing, end=end)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    found, out, _ = main(capsys, "verify", "--device", "cpu")
    assert found == code and said in out and ("not whole" in out) == bool(said)
    assert cli.main(["verify", "--device", "cpu", "--", "--collect-only"]) == 0  # runs nothing
