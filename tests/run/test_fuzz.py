"""run/fuzz.py and the command: mistakes that need certain problems are found, and shrunk."""

import re
import sys
from collections import defaultdict

import pytest

from harness import cli
from harness.base.minimal import find_minimal, missing
from harness.device import Device
from harness.problem.case import GRAMMAR, Case
from harness.run import fuzz
from harness.run.isolated import IsolatedRunner

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

CPU = Device("cpu")
SMALL = ["--bytes", "64K", "--seconds", "600"]


def run_fuzz(capsys, *arguments):
    code = cli.main(["fuzz", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def smallest_case(out):
    """The Case that a run ended with."""
    return Case.parse(re.search(r"harness run (\S+) --backend tests\.support\.fuzzed", out)[1])


# -- mistakes it finds -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "backend, smallest",
    [("InnerTail", "t1-h32-i8-e1-k1-bf16-exact"), ("ThreeTokensAndBias", "t3-h32-i8-e1-k1-bf16-bias-exact")],
)
def test_a_mistake_is_found_and_shrunk_and_the_printed_command_repeats_it(capsys, backend, smallest):
    spec = f"tests.support.fuzzed:{backend}"
    code, out, _ = run_fuzz(capsys, "--backend", spec, "--seed", "3", "--examples", "500", *SMALL)
    assert code == 1 and str(smallest_case(out)) == smallest
    assert cli.main(["run", smallest, "--backend", spec]) == 1
    assert f'one line of ROWS in cases/test_layers.py:\n  "{smallest}": "WHY' in out
    count = re.search(r"found after (\d+) problems", out)[1]
    again = re.search(r"\n  python3 -m harness fuzz (.*)\n", out)[1].split()
    assert again[-2:] == ["--examples", count]
    capsys.readouterr()
    code, repeated, _ = run_fuzz(capsys, *again)
    assert code == 1 and _without_seconds(repeated) == _without_seconds(out)


def _without_seconds(out):
    return re.sub(r"in \d+ s .*|judged .*", "", out)


def test_a_process_that_dies_is_a_verdict(capsys):
    code, out, _ = run_fuzz(capsys, "--backend", "tests.support.fuzzed:Dies", "--seed", "1", "--examples", "50", *SMALL)
    assert code == 1 and " crashed: the process ended with SIGSEGV\n" in out and "Segmentation fault" in out
    assert smallest_case(out).problem.padded


def test_a_failure_that_depends_on_earlier_cases_is_reported_as_such(capsys):
    code, out, _ = run_fuzz(
        capsys, "--backend", "tests.support.fuzzed:SecondCall", "--seed", "3", "--examples", "20", *SMALL
    )
    assert code == 1 and "\nit passed in a new process: the failure depends on the cases before it\n" in out


def test_a_call_that_hangs_ends_its_process_only():
    with IsolatedRunner("tests.support.fuzzed:Hangs", CPU, limit=2) as runner:
        hung = runner.run(Case.parse("t3-h64-i32-e4-k2-bf16-exact"))
        assert hung.status == "hung" and hung.reason == "no answer in 2 s" and "in wrong" in hung.report
        assert runner.run(Case.parse("t4-h64-i32-e4-k2-bf16-exact")).status == "passed"


def test_a_right_backend_is_not_accused_and_the_cases_are_counted(capsys):
    code, out, _ = run_fuzz(
        capsys, "--backend", "tests.support.fuzzed:Right", "--seed", "4", "--examples", "40", *SMALL
    )
    assert code == 0 and out.endswith("nothing found\n")
    assert re.search(r"^40 problems in \d+ s \(", out, re.M) and " exact" in out and " fp8" in out


def test_sequences_are_fuzzed_too(capsys):
    backend = ["--backend", "tests.support.stateful:SharedByShape", "--sequences"]
    code, out, _ = run_fuzz(capsys, *backend, "--seed", "0", "--examples", "20", "--seconds", "600")
    assert code == 1 and "-sequence.calls failed: after " in out and "cases/test_sequences.py" in out


# -- cases it draws ----------------------------------------------------------------------------------------------------
def test_every_field_of_the_grammar_is_drawn_within_the_budget():
    seen, cases = defaultdict(set), []

    def ask(case):
        cases.append(case)
        assert Case.parse(str(case)) == case
        for rule in GRAMMAR:
            seen[rule.field].add(rule.show(case))

    assert find_minimal(fuzz.cases(fuzz.Space(), 2**20), ask, seed=0, examples=300, shrinks=0) is None
    assert len(cases) > 250
    sizes = [fuzz.counted(case.problem) for case in cases]
    assert sum(size > 2**20 for size in sizes) <= len(sizes) * 0.05  # the smallest there are: many experts
    few = [rule.field for rule in GRAMMAR if len(seen[rule.field]) < 2]
    assert few == []
    assert {"remote", "nobody", None} <= seen["routing"] and {"exact", "random", "extreme"} == seen["fill"]


# -- the command ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backend", "nobody"], "--backend nobody: no such backend; known: "),
        (
            ["--backend", "tests.support.fuzzed:Right", "--bytes", "12Q"],
            "argument --bytes: 12Q: must be an integer from 1 to 1000000000, or of K, M, G",
        ),
        (
            ["--backend", "tests.support.fuzzed:Right", "--seconds", "0"],
            "argument --seconds: 0: must be a number above 0, at most ",
        ),
        (
            ["--backend", "tests.support.fuzzed:Right", "--examples", "-1"],
            "argument --examples: -1: must be an integer from 1 to ",
        ),
        (
            ["--backend", "tests.support.fuzzed:Right", "--seed", "-1"],
            "argument --seed: -1: must be an integer from 0 to ",
        ),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    code, _, err = run_fuzz(capsys, *arguments)
    assert code == 2 and err.startswith(f"moe-harness: {message}") and err.count("\n") == 1


def test_a_declaration_that_breaks_the_protocol_is_found(capsys):
    code, out, _ = run_fuzz(capsys, "--backend", "tests.support.fuzzed:Gibberish")
    assert code == 1 and " crashed: fuzzed.supports() answered 'because'; valid: None, or text that begins" in out


def test_without_hypothesis_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("harness.base.minimal.find_spec", lambda name: None)
    code, out, err = run_fuzz(capsys, "--backend", "tests.support.fuzzed:Right")
    assert code == 2 and out == ""
    assert err == "moe-harness: fuzz: the package hypothesis is not installed (pip install hypothesis)\n"


def test_a_search_that_ran_nothing_is_not_green(capsys):
    code, out, _ = run_fuzz(capsys, "--backend", "tests.support.fuzzed:Refuses", "--seed", "1", "--seconds", "0.5")
    assert code == 1 and "nothing ran: fuzzed supports none of these problems" in out


def test_a_seed_is_chosen_and_printed(capsys):
    seeds = set()
    for _ in range(2):
        _, out, _ = run_fuzz(capsys, "--backend", "tests.support.fuzzed:Right", "--examples", "1", *SMALL)
        seeds.add(re.match(r"moe-harness: fuzzed on cpu, seed (\d+)\n", out)[1])
    assert len(seeds) == 2


@pytest.mark.parametrize(
    "descriptor, file",
    [
        ("t3-h64-i32-e4-k2-bf16-random-swap.w2", "weight_swap"),
        ("t3-h64-i32-e4-k2-bf16-exact-sequence.calls", "sequences"),
        ("t3-h64-i32-e4-k1-bf16-win-exact", "router_weight_on_input"),
        ("t1-h64-i32-e8-k2-bf16-exact", "low_latency"),
        ("t9-h64-i32-e8-k2-bf16-e4m3.block.none-kn-exact", "fp8_transpose"),
        ("t9-h64-i32-e8-k2-bf16-repeat.bits-exact", "layers"),
    ],
)
def test_each_case_has_a_home(descriptor, file):
    assert fuzz.home(Case.parse(descriptor)) == f"cases/test_{file}.py"
    __import__(f"cases.test_{file}")
    assert f"cases.test_{file}" in sys.modules
