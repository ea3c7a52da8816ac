"""ci/matrix.py and `moe-harness matrix`: the file, what is wrong with one, the jobs, and a row that is run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import cli, device
from harness.base.processes import ROOT
from harness.ci import matrix
from harness.ci.matrix import MatrixError
from harness.commands import matrix as command
from harness.results.floor import read_floor
from harness.results.verdict import Verdict
from tests.support.results_files import write_run

GOOD = 'runner = "r"\ndevice = "cpu"\nfloor = {triton = 2}\nminutes = 5\n'


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """rows(text): matrix.toml is this from now on; the rows read from it."""

    def write(text):
        path = tmp_path / "matrix.toml"
        path.write_text(text)
        monkeypatch.setattr(matrix, "PATH", path)
        return matrix.read()

    return write


# -- the file ---------------------------------------------------------------------------------------------------------
def test_the_rows_of_this_project():
    rows = matrix.read()
    assert {"cpu", "xpu-emulated", "cuda", "xpu"} <= set(rows)
    assert rows["cpu"].shards >= 2 and rows["cpu"].own_labels == rows["xpu-emulated"].own_labels == set()
    assert rows["cuda"].own_labels == {"cuda"} and rows["xpu"].own_labels == {"xpu"}
    assert "--require-device=xpu" in matrix.pytest_command(rows["xpu"], "1/1", Path("r"))
    assert not any("require" in w for w in matrix.pytest_command(rows["xpu-emulated"], "1/1", Path("r")))
    floor = read_floor(ROOT / "cases" / "floor.toml")
    assert rows["cpu"].floor == floor["cpu"] and rows["xpu-emulated"].floor == floor["xpu-emulated"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no rows"),
        ("a = 3", r"a=3: must be a table, \[a\]"),
        (f"[a]\n{GOOD}\n[a]\n{GOOD}", r"matrix.toml: Cannot declare \('a',\) twice|matrix.toml: .*[Ddeclare].* twice"),
        (f"[A]\n{GOOD}", r"\[A\]: a name is of a-z"),
        (
            f"[a]\n{GOOD}shard = 2",
            r"\[a\] shard=2: no such key; did you mean .shards..; valid: runner, .*, shards",
        ),
        (
            f"[a]\n{GOOD.replace('device = ', 'markers = ')}",
            r"\[a\] has no device: one of cpu, cuda, xpu, xpu-emulated",
        ),
        (f"[a]\n{GOOD.replace('cpu', 'tpu')}", r"device='tpu': one of cpu, cuda, xpu, xpu-emulated"),
        (f"[a]\n{GOOD.replace('5', '0')}", "minutes=0: a number, 1 or more"),
        (f"[a]\n{GOOD}shards = true", "shards=True: a number, 1 or more"),
        (f"[a]\n{GOOD}when = ['weekly']", r"when=\['weekly'\]: a list of change, nightly"),
        (f"[a]\n{GOOD}extras = 'test'", "extras='test': a list of strings"),
        (f"[a]\n{GOOD}environment = {{A = 1}}", r"environment=\{'A': 1\}: a table of strings"),
        (f"[a]\n{GOOD}constraints = 'none.txt'", "constraints='none.txt': no such file"),
        (f"[a]\n{GOOD.replace('{triton = 2}', '{triton = 0}')}", "floor=.*: demands nothing"),
        (f"[a]\n{GOOD.replace('{triton = 2}', '{triton = -1}')}", "floor=.*: a floor file, or a table of counts"),
        (f"[a]\n{GOOD.replace('{triton = 2}', repr('no.toml'))}", "floor='no.toml': .*No such file or directory"),
        (f"[a]\n{GOOD.replace('{triton = 2}', repr('matrix.toml'))}", r"floor='matrix.toml': .*\[a\] runner='r'"),
        (f"[a]\nrunner = []\n{GOOD[13:]}", r"runner=\[\]: a label, or a list of labels"),
        ("[a", "matrix.toml: "),
    ],
)
def test_what_is_wrong_is_named(rows, text, message):
    with pytest.raises(MatrixError, match=message):
        rows(text)


def test_a_floor_file_without_the_device_s_section(rows, tmp_path):
    (tmp_path / "floor.toml").write_text("[cuda]\ntriton = 3\ntorch-grouped-mm = 4\n")
    own = GOOD.replace("{triton = 2}", "'floor.toml'")
    with pytest.raises(MatrixError, match=r"floor='floor.toml': has no section \[cpu\]; there: cuda"):
        rows(f"[a]\n{own}")
    own = own.replace("cpu", "cuda")
    assert rows(f"[a]\n{own}")["a"].floor == {"triton": 3, "torch-grouped-mm": 4}
    assert rows(f"[a]\n{own}backends = ['triton']")["a"].floor == {"triton": 3}
    with pytest.raises(MatrixError, match="demands nothing"):
        rows(f"[a]\n{own}backends = ['mine']")


# -- jobs -------------------------------------------------------------------------------------------------------------
OWN = GOOD.replace('"r"', "['self-hosted', 'gpu']") + "when = ['nightly']\n"
TWO = f"[hosted]\n{GOOD}shards = 2\npython = '3.11'\ncompare = []\n[own]\n{OWN}"


def test_a_job_for_every_shard_and_comparison(rows):
    jobs = matrix.jobs(rows(TWO).values())
    first = {"row": "hosted", "runner": ["r"], "python": "3.11", "minutes": 5}
    assert jobs["compare"]["include"] == [first]
    assert jobs["rows"]["include"][:2] == [
        {**first, "shard": "1/2", "name": "hosted-1of2"},
        {**first, "shard": "2/2", "name": "hosted-2of2"},
    ]
    assert [(job["row"], job["shard"]) for job in jobs["rows"]["include"][2:]] == [("own", "1/1")]


@pytest.mark.parametrize(
    "words, chosen, warning",
    [
        ([], ["hosted", "own"], ""),
        (["--when", "change"], ["hosted"], ""),
        (["--when", "change", "--runners", ""], ["hosted"], ""),
        (["--when", "nightly", "--runners", ""], ["hosted"], "own is left out: no runner with the labels gpu"),
        (["--when", "nightly", "--runners", "xpu, gpu"], ["hosted", "own"], ""),
        (["own", "--when", "nightly", "--runners", "gpu"], ["own"], ""),
    ],
)
def test_rows_take_part_where_their_runners_are(rows, capsys, words, chosen, warning):
    rows(TWO)
    assert matrix.main(["--json", *words]) == 0
    printed = capsys.readouterr()
    assert list(dict.fromkeys(job["row"] for job in json.loads(printed.out)["rows"]["include"])) == chosen
    assert warning in printed.err and bool(warning) == bool(printed.err)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
@pytest.mark.parametrize("module, words", [("matrix", ["--json", "--when", "change"]), ("gather", ["--help"])])
def test_nothing_needs_to_be_installed_for_the_jobs_at_either_end(module, words):
    command = [sys.executable, "-S", "-m", f"harness.ci.{module}", *words]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def test_what_is_installed(rows, monkeypatch, tmp_path):
    (tmp_path / "c.txt").touch()
    made = rows(f"[hosted]\n{GOOD}python='3.11'\nextras=['a', 'b']\nconstraints='c.txt'\n[own]\n{GOOD}")
    venv, pip = matrix.install_commands(made["hosted"])
    assert venv[1:] == ["-m", "venv", ".venv"] and pip[-4:] == ["-e", ".[a,b]", "-c", "c.txt"]
    venv, pip = matrix.install_commands(made["own"])
    assert venv[1:] == ["-m", "venv", "--system-site-packages", ".venv"] and pip[-2:] == ["-e", "."]
    (made,) = rows(f"[others]\n{GOOD}packages=['vllm==1', 'x']").values()
    venv, _, alone = matrix.install_commands(made, ".venv-x")
    assert venv[-1] == ".venv-x" and alone[0] == ".venv-x/bin/python" and alone[-3:] == ["--no-deps", "vllm==1", "x"]
    rows(f"[own]\n{GOOD}")
    codes = iter([0, 7])
    monkeypatch.setattr(subprocess, "run", lambda words, cwd: subprocess.CompletedProcess(words, next(codes)))
    assert matrix.main(["own", "--install"]) == 7
    assert matrix.main(["--install"]) == matrix.main(["none", "--json"]) == matrix.main([]) == 2


@pytest.mark.parametrize(
    "text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1 / 2", "１/2", "1/100000000", "1/" + "9" * 400]
)
def test_a_shard_that_is_none(text):
    with pytest.raises(MatrixError, match="I/N with I from 1 to N, such as 2/4"):
        matrix.shard_of(text)


# -- a run ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def ran(monkeypatch):
    """What was started, as (words, environment); ran.code, and ran.records, are what comes of it."""

    class Ran(list):
        code = 0
        records: list[dict] = []
        ends = True

    found = Ran()

    def run(words, env, cwd=None):
        found.append((words, env))
        for word in words:
            if word.startswith("--results="):
                monkeypatch.setenv(matrix.ROW, env[matrix.ROW])
                write_run(Path(word.partition("=")[2]), found.records, end=found.ends)
        return subprocess.CompletedProcess(words, found.code)

    monkeypatch.setattr(command.subprocess, "run", run)
    return found


def test_a_shard_is_run_as_ci_does(rows, ran, tmp_path, capsys):
    rows(
        f"[a]\n{GOOD}shards = 2\nmarkers = 'not real'\nbackends = ['triton']\noptions = ['-x']\nenvironment = {{V='1'}}"
    )
    path = tmp_path / "r.jsonl"
    ran.code = 5
    words = ["matrix", "a", "--shard", "2/2", "--results", str(path), "--", "-k", "x or y"]
    assert cli.main(words) == cli.main([words[0], *words[2:6], words[1], *words[6:]]) == 5
    (found, environment), again = ran
    assert found == again[0]
    assert found[1:3] == ["-m", "pytest"] and found[-3:] == [str(ROOT / "cases"), "-k", "x or y"]
    wanted = ["--device=cpu", "--require-device=cpu", "-m", "not real", "--backend=triton", "--shard=2/2", "-x"]
    assert [word for word in found[3:] if word in wanted] == wanted
    assert f"--durations-from={matrix.DURATIONS}" in found and f"--results={path}" in found
    assert [environment[v] for v in ("V", "MOE_HARNESS_ROW", "MOE_HARNESS_SHARD")] == ["1", "a", "2/2"]
    printed = capsys.readouterr().out
    assert "MOE_HARNESS_ROW=a MOE_HARNESS_SHARD=2/2 python3 -m pytest" in printed and "-k 'x or y'" in printed
    assert "the floor of a is for all its shards" in printed


@pytest.mark.parametrize("count, code", [(2, 0), (1, 1)])
def test_a_row_that_is_run_whole_is_held_to_its_floor(rows, ran, tmp_path, capsys, count, code):
    rows(f"[a]\n{GOOD}")
    good = [Verdict(f"t{n}-h64", "triton", "cpu", "passed").record() for n in range(count)]
    ran.records = [*good, Verdict("t9-h64", "triton", "cpu", "unsupported").record()]
    assert cli.main(["matrix", "a", "--results", str(tmp_path / "r.jsonl")]) == code
    assert not any("--shard" in word for word in ran[0][0])
    assert ("a, floor: triton executed 1 verdicts, at least 2 are due" in capsys.readouterr().out) == bool(code)


def test_a_run_that_is_not_whole_is_red_although_pytest_ended_with_0(rows, ran, tmp_path, capsys):
    rows(f"[a]\n{GOOD}")
    ran.records = [Verdict(f"t{n}-h64", "triton", "cpu", "passed").record() for n in range(2)]
    ran.ends = False
    assert cli.main(["matrix", "a", "--results", str(tmp_path / "r.jsonl")]) == 1
    assert "r.jsonl: the run is not whole: it has no end: it was killed" in capsys.readouterr().out


def test_a_signal_is_said_as_a_shell_would(rows, ran, tmp_path):
    rows(f"[a]\n{GOOD}compare = ['--quick']")
    ran.code = -9
    assert (
        cli.main(["matrix", "a", "--results", str(tmp_path / "r")])
        == cli.main(["matrix", "a", "--compare", "x", "y"])
        == 137
    )


def test_a_row_compares_with_its_own_options(rows, ran, capsys):
    rows(f"[a]\n{GOOD}compare = ['--metric=launches']\n[b]\n{GOOD}")
    assert cli.main(["matrix", "a", "--compare", "main", "HEAD"]) == 0
    assert ran[0][0][1:6] == ["-m", "harness", "compare", "main", "HEAD"] and "--metric=launches" in ran[0][0]
    assert cli.main(["matrix", "b", "--compare", "main", "HEAD"]) == 2
    assert "b: compares nothing" in capsys.readouterr().err


def test_the_list_says_what_can_run_here(rows, monkeypatch, capsys):
    monkeypatch.setattr(device, "present", lambda: ("cpu",))
    monkeypatch.setattr(device, "why_absent", lambda name: f"no {name}")
    rows("".join(f"[{d}]\n{GOOD.replace('cpu', d)}" for d in matrix.DEVICES))
    assert cli.main(["matrix"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in lines[:5]] == [
        ("row", "here"), ("cpu", "yes"), ("cuda", "no"), ("xpu", "no"), ("xpu-emulated", "yes"),
    ]  # fmt: skip
    assert lines[5:] == ["not here: cuda: no cuda", "not here: xpu: no xpu"]
    assert cli.main(["matrix", "cuda"]) == 2
    assert capsys.readouterr().err == "moe-harness: cuda cannot run here: no cuda\n"
    monkeypatch.setattr(device, "present", lambda: ("cpu", "xpu"))
    assert command.absent(matrix.read()["xpu-emulated"]) == "an XPU is here, nothing is emulated"


def test_wrong_words(rows, capsys):
    rows(f"[a]\n{GOOD}")
    assert cli.main(["matrix", "b"]) == cli.main(["matrix", "a", "--shard", "2"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "moe-harness: b: no such row; one of a",
        "moe-harness: --shard 2: I/N with I from 1 to N, such as 2/4; N at most 10000",
    ]
