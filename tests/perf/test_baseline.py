"""The structural baseline: its file, what it notices, which versions it compares, and how it is accepted."""

import json
import re
import subprocess
import sys

import pytest

from harness import cli
from harness.base.processes import environment
from harness.device import Device
from harness.perf.count import baseline
from harness.perf.count.baseline_file import BASELINE, Baseline, BaselineError, Block, parse, read, render
from harness.perf.metrics import STRUCTURE, TARGETS
from harness.problem.case import Case
from tests.support import interpreted  # noqa: F401  skips where kernels are not interpreted
from tests.support.emulated import Emulated
from tests.support.tiny_kernels import copy_kernel

CPU = Device("cpu")
DESCRIPTOR = "t4-h64-i32-e4-k2-bf16-random"


class Launching(Emulated):
    """A correct backend that launches a small kernel besides; a commit changes `block`, `clones` or `scale`."""

    block, clones, scale = 64, 0, 1.0

    def prepare(self, problem, layer):
        inner = super().prepare(problem, layer)

        def call(x, weights, ids, out=None):
            for _ in range(Launching.clones):
                x = x.clone()
            copy_kernel[(2,)](x, x.clone(), x.numel(), BLOCK=Launching.block)
            return inner(x, weights, ids, out=out).mul_(Launching.scale)

        return call


KEY = f"{DESCRIPTOR} @ tests.perf.test_baseline:Launching"
NEW = f'["{KEY}"]\nwhy = "a test"\n'


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A baseline with one case that was never accepted."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for name in ("block", "clones", "scale"):
        monkeypatch.setattr(Launching, name, getattr(Launching, name))
    path = tmp_path / "structure.toml"
    path.write_text(NEW)
    return path


def structure(file, *options):
    return cli.main(["structure", "--baseline", str(file), *options])


def test_an_accepted_case_is_compared_and_changes_are_listed(file, capsys):
    assert structure(file, "--no-compile") == 1 and "it is not in the baseline yet" in capsys.readouterr().out
    assert structure(file, "--accept") == 0 and f"accepted: {file}" in capsys.readouterr().out
    accepted = file.read_text()
    assert structure(file, "--accept") == 0 and file.read_text() == accepted
    assert capsys.readouterr().out == "1 cases, 1 compiled kernels: nothing changed\n"

    Launching.block, Launching.clones = 1024, 2
    assert structure(file) == 1
    out = capsys.readouterr().out
    assert KEY in out and "copy_kernel: BLOCK 64 -> 1024" in out
    assert "2 more tensors are allocated (+1024 bytes): clone.default bf16 (4, 64) (+2)" in out
    assert "2 more operators are dispatched: clone.default (+2)" in out
    assert "compiled, copy_kernel BLOCK=1024" in out and "load_bytes" in out
    assert "python3 -m harness structure --accept" in out and file.read_text() == accepted
    assert structure(file, "--json", "--no-compile") == 1
    record = json.loads(capsys.readouterr().out)
    assert list(record["changed"]) == [KEY] and record["not_compared"] == ["compiled (--no-compile)"]

    assert structure(file, "--accept") == 0 and "BLOCK 64 -> 1024" in capsys.readouterr().out
    assert structure(file, "--no-compile") == 0
    assert "BLOCK=1024" in file.read_text() and 'why = "a test"' in file.read_text()


@pytest.fixture
def accepted(file, monkeypatch, capsys):
    """The same, accepted; nothing is compiled."""
    compiled = dict(registers=9, spills=0, shared_bytes=0, tensor_core={}, load_bytes=8, loads={"8": 1}, code_bytes=64)
    monkeypatch.setattr(
        baseline,
        "compile_launches",
        lambda launches, targets: {
            baseline.configuration(spec): {t: dict(compiled) for t in targets} for spec in launches
        },
    )
    assert structure(file, "--accept") == 0
    capsys.readouterr()
    return file


@pytest.mark.parametrize(
    "package, parts",
    [("torch", ("operators", "allocations", "copies", "waits", "functions")), ("triton", ("compiled",)),
     ("python", ("functions",))],
)  # fmt: skip
def test_counts_that_depend_on_another_version_are_not_compared(accepted, capsys, package, parts):
    text = accepted.read_text()
    text = re.sub(rf'{package} = "([^"]*)"', rf'{package} = "0.1"', text, count=1)
    # Were it compared, all of it would differ.
    text = re.sub(r"python_calls = \d+", "python_calls = 1", text) if package != "triton" else text
    text = text.replace("operators = 2", "operators = 1") if package == "torch" else text
    text = text.replace("registers = 9", "registers = 8") if package == "triton" else text
    accepted.write_text(text)
    assert structure(accepted) == 0
    out = capsys.readouterr().out
    for part in parts:
        assert f"not compared: {part} (made with {package} 0.1, here {baseline.versions()[package]})" in out
    assert out.count("not compared") == len(parts) and "nothing changed" in out


def test_launches_are_compared_whatever_the_versions(accepted, capsys):
    text = re.sub(r'^(python|torch|triton) = ".*"', r'\1 = "0.1"', accepted.read_text(), flags=re.M)
    accepted.write_text(text)
    Launching.block = 32
    assert structure(accepted) == 1 and "copy_kernel: BLOCK 64 -> 32" in capsys.readouterr().out


def test_a_case_whose_package_has_another_version_is_not_compared(accepted, capsys):
    text = accepted.read_text().replace('why = "a test"', 'why = "a test"\nneeds = ["pytest"]')
    accepted.write_text(text.replace("[versions]", '[versions]\npytest = "0.1"'))
    assert structure(accepted) == 1
    out = capsys.readouterr().out
    assert (
        f"not compared: {KEY} (made with pytest 0.1, here {pytest.__version__})" in out
        and "nothing could be compared" in out
    )


def test_a_case_that_cannot_run_here_is_not_compared_and_not_accepted(accepted, monkeypatch, capsys):
    monkeypatch.setattr(Launching, "supports", lambda self, problem: "dtype: none today", raising=False)
    before = accepted.read_text()
    assert structure(accepted) == 1
    out = capsys.readouterr().out
    assert f"not compared: {KEY} (dtype: none today)" in out and "nothing could be compared" in out
    assert structure(accepted, "--accept") == 2 and accepted.read_text() == before
    assert "1 cases have no numbers here, so nothing is written" in capsys.readouterr().err


def test_cases_that_cannot_run_here_for_one_reason_share_a_line(accepted, monkeypatch, capsys):
    accepted.write_text(accepted.read_text() + NEW.replace("t4-", "t5-"))
    monkeypatch.setattr(Launching, "supports", lambda self, problem: "dtype: none today", raising=False)
    assert structure(accepted) == 1
    line = "not compared: 2 cases of tests.perf.test_baseline:Launching (dtype: none today)"
    assert line in capsys.readouterr().out.splitlines()


def test_a_wrong_answer_is_a_change_and_not_accepted(accepted, capsys):
    Launching.scale, before = 2.0, accepted.read_text()
    assert structure(accepted) == 1
    assert "it is not answered correctly any more: failed: " in capsys.readouterr().out
    assert structure(accepted, "--accept") == 2 and accepted.read_text() == before


def test_machine_code_that_the_file_lacks_is_a_change(accepted, capsys):
    text = accepted.read_text()
    accepted.write_text(text[: text.index("[compiled")])
    assert structure(accepted) == 1 and "not in the baseline yet: copy_kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [(["--device", "xpu"], "--device xpu: needs a DESCRIPTOR"), (["--target", "sm_90"], "--target: needs a DESCRIPTOR"),
     (["--accept", "--no-compile"], "leave --no-compile out"), ([DESCRIPTOR], "needs --backend SPEC"),
     ([DESCRIPTOR, "--backend", "triton", "--accept"], "--accept takes no case"),
     ([DESCRIPTOR, "--backend", "triton", "--target", "h100"], "--target 'h100'; valid: sm_<number> or gfx<number>"),
     (["t4", "--backend", "triton"], "missing")],
)  # fmt: skip
def test_wrong_arguments(file, capsys, options, message):
    assert structure(file, *options) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [("x = 1", "'x': must be a table"), ("[x]", 'must be a table, ["DESCRIPTOR @ BACKEND"]'), ("x", "Expected '='"),
     ('["a @ b"]', "must be the reason for this case"),
     ('["a @ b"]\nwhy = "w"\nnumbers = { launches = 1 }', "accept it anew"),
     ('["a @ b"]\nwhy = "w"\nnumber = 3', "number: no such key")],
)  # fmt: skip
def test_a_file_that_is_no_baseline(file, capsys, text, message):
    file.write_text(text)
    assert structure(file) == 2
    error = capsys.readouterr().err
    assert str(file) in error and message in error


def test_no_file(tmp_path, capsys):
    assert structure(tmp_path / "none.toml") == 2 and "No such file" in capsys.readouterr().err


def test_one_case_is_shown_whole(capsys):
    assert cli.main(["structure", DESCRIPTOR, "--backend", "tests.perf.test_baseline:Launching", "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert "copy_kernel[2]" in out and "clone.default bf16 (4, 64)" in out and "tests.perf.test_baseline.call" in out
    options = ["--backend", "tests.perf.test_baseline:Launching", "--no-compile", "--json"]
    assert cli.main(["structure", DESCRIPTOR, *options]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["launches"] == 1


def test_the_command_in_a_process_of_its_own():
    """Where nothing has chosen yet whether Triton compiles or interprets."""
    command = [sys.executable, "-m", "harness", "structure", "t1-h64-i32-e8-k1-bf16-random", "--backend", "triton"]
    done = subprocess.run([*command, "--target", "sm_90"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "_combine_kernel[1]" in done.stdout and "  sm_90    registers" in done.stdout and "gfx" not in done.stdout


def test_the_text_holds_all_that_is_compared():
    record = {
        "metrics": {name: n for n, name in enumerate(STRUCTURE)},
        "kernels": ["k[2,3]", "k[1]"], "configurations": ["k B=1 (*bf16 16)", "k (1)"],
        "operators": {"a.default": 2}, "copies": {"to the host: item": 1}, "waits": {},
        "allocations": ["empty bf16 (2, 3)"] * 3 + ['odd "name" (1,)'], "functions": {"m.<genexpr>": 2, "m.n.f": 1},
    }  # fmt: skip
    whole = Baseline({"python": "3.11"}, [Block("a", "p.q:R", "why: “so”", ("numpy",), record), Block("b", "c", "new")])
    whole.compiled = {"k (1)": {"sm_80": {"registers": 1, "loads": {"16": 2, "tma": 1}}, "sm_90": {"error": 'a "b"'}}}
    assert parse(render(whole)) == whole


# -- the repository's own ---------------------------------------------------------------------------------------------
OWN = read(BASELINE)


def has(backend, *tokens, without=()):
    """A case of this backend whose descriptor has these tokens."""
    return any(
        block.backend == backend and set(tokens) <= set(block.descriptor.split("-")) - set(without)
        for block in OWN.blocks
    )


def test_the_baseline_is_whole():
    assert {"python", "torch", "triton"} <= set(OWN.versions) and 15 <= len(OWN.blocks) <= 30
    launched = set()
    for block in OWN.blocks:
        assert str(Case.parse(block.descriptor)) == block.descriptor and block.record, block.key
        assert block.record["metrics"]["launches"] == len(block.record["kernels"])
        assert block.record["metrics"]["python_calls"] == sum(block.record["functions"].values())
        assert block.record["metrics"]["allocations"] == len(block.record["allocations"])
        launched |= set(block.record["configurations"])
    assert launched == set(OWN.compiled)
    assert all(tuple(targets) == TARGETS for targets in OWN.compiled.values())
    assert render(OWN) == BASELINE.read_text(encoding="utf-8")


def test_the_baseline_covers_what_was_lost_before():
    for dtype in ("bf16", "fp16", "fp32"):
        assert has("triton", dtype)
    for quant in ("e4m3.tensor.tensor", "e4m3.tensor.static", "e4m3.channel.token", "e4m3.block.group"):
        assert has("triton", quant), quant
    for tokens in (["e5m2.channel.none"], ["win", "bf16"], ["win", "e4m3.tensor.tensor"], ["bias"], ["relu2"],
                   ["swigluoai"], ["ep2.1"], ["kn"]):  # fmt: skip
        assert has("triton", *tokens), tokens
    assert has("triton-permute", "scratch.reuse") and has("triton-permute", "win") and has("triton-cached", "kn")
    for backend in ("torch-grouped-mm", "transformers-eager", "transformers-batched-mm", "transformers-grouped-mm"):
        assert has(backend, "bf16"), backend
    tiles = {(f"BLOCK_M={m}", f"ALIGNED={a}") for m, a in ((16, False), (16, True), (64, True), (128, True))}
    assert all(any(set(tile) <= set(text.split()) for text in OWN.compiled) for tile in tiles)


def test_the_paths_that_are_promised_are_in_the_baseline():
    for block in OWN.blocks:
        names = {kernel.partition("[")[0] for kernel in block.record["kernels"]}
        if block.descriptor.startswith("t2-"):
            assert names and not any("align" in name for name in names), block.key
    found = {b.key: b.record for b in OWN.blocks}
    plain, scratch = (
        found[f"t16-h256-i128-e16-k2-bf16-exact{scenario} @ triton-permute"] for scenario in ("", "-scratch.reuse")
    )
    assert scratch["metrics"]["allocations"] < plain["metrics"]["allocations"]
    kinds = {kind for targets in OWN.compiled.values() for n in targets.values() for kind in n.get("tensor_core", ())}
    assert kinds == {"mma.sync", "wgmma", "tcgen05", "mfma"}


def test_reading_names_the_file(tmp_path):
    with pytest.raises(BaselineError, match="none.toml: No such file"):
        read(tmp_path / "none.toml")


def test_a_baseline_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(BaselineError, match="none/structure.toml: No such file or directory"):
        baseline.write(tmp_path / "none" / "structure.toml", Baseline({}))
