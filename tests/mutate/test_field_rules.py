"""The rules of other projects on outputs made by hand, and their table."""

import math

import pytest
import torch

from harness.base.table import markdown
from harness.inputs.draw import draw
from harness.mutate import summary
from harness.mutate.field_rules import RULES, Judged, Watcher, naive_in_io_dtype
from harness.mutate.outcomes import Outcome
from harness.mutate.protocol import MutantRun
from harness.oracle.experts import exact_output
from harness.problem.case import Case
from harness.run.case import run_case

INPUTS = draw(Case.parse("t8-h64-i32-e4-k2-bf16-random"))


def expected(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 64, generator=generator, dtype=torch.float64).bfloat16().double() * scale


def accepting(out, expected):
    """The rules that accept `out`; the naive layer is wrong by one unit in the last place of bf16 in every element."""
    judged = Judged(out.bfloat16(), expected, INPUTS)
    judged.baseline = judged.expected * (1 + 2**-7)
    return {rule.name for rule in RULES.values() if rule.accepts(judged)}


def test_every_rule_accepts_the_expected_output():
    assert accepting(expected(), expected()) == set(RULES)
    assert accepting(torch.zeros(8, 64), torch.zeros(8, 64)) == set(RULES)


@pytest.mark.parametrize("scale, blind", [(1, set()), (1e-4, {"vllm", "flashinfer_bench", "flash_attention"})])
def test_which_rules_accept_an_output_of_zeros(scale, blind):
    assert accepting(torch.zeros(8, 64), expected(scale)) == blind


def test_a_wrong_row_is_lost_in_a_ratio():
    out = expected()
    out[3, :20] = 0  # 20 of 512 elements: 3.9 %
    assert accepting(out, expected()) == {"flashinfer_bench"}


@pytest.mark.parametrize("factor, accepted", [(1.004, {"fla"}), (1.012, set())])
def test_a_scale_error_of_a_percent(factor, accepted):
    judged = Judged(expected().float() * factor, expected(), INPUTS)
    judged.baseline = judged.expected
    names = {rule.name for rule in RULES.values() if rule.accepts(judged)}
    assert ("fla" in names) == ("fla" in accepted)
    assert "assert_close" not in names, "float32 is compared to 1.3e-6"


def test_expected_nan_and_infinities_count_as_equal():
    due = expected()
    due[2], due[3, 1], due[3, 2] = math.nan, math.inf, -math.inf
    assert accepting(due, due) == set(RULES)
    for place, value in (((2, 0), 1.0), ((3, 1), -math.inf), ((0, 0), math.nan)):
        out = due.clone()
        out[place] = value
        assert accepting(out, due) == set(), (place, value)


def test_triton_kernels_bounds_the_rms_more_tightly_than_the_largest_error():
    due = torch.ones(64, 64)
    one = due.clone().double()
    one[0, 0] = 1.015625  # one element 1.6 % off
    assert "triton_kernels" in accepting(one, due)
    assert "triton_kernels" not in accepting(due * 1.0078125, due), "0.8 % everywhere: rms above 4e-3"


@pytest.mark.parametrize(
    "descriptor",
    [
        "t9-h64-i32-e4-k2-bf16-random", "t9-h64-i32-e4-k2-fp16-bias-swigluoai-random",
        "t9-h64-i32-e4-k1-bf16-win-random", "t9-h64-i32-e4-k2-bf16-gelu-ep2.1-random",
        "t9-h64-i32-e4-k2-fp32-relu2-random", "t9-h64-i32-e4-k2-bf16-shared2-invalid-random",
        "t9-h128-i128-e4-k2-bf16-e4m3.block.none-gelu_tanh-limit1-random",
    ],
)  # fmt: skip
def test_the_naive_layer_is_the_layer_to_the_precision_of_its_dtype(descriptor):
    inputs = draw(Case.parse(descriptor))
    output, exact = naive_in_io_dtype(inputs).double(), exact_output(inputs).double()
    assert output.dtype == torch.float64 and output.shape == exact.shape
    relative = (output - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    unit = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 2**-24}[inputs.case.problem.dtype]
    assert 0 < relative < 8 * unit


def test_a_watcher_sees_what_the_harness_judges():
    watcher = Watcher(("vllm", "fla"))

    class Zeros:
        name, devices = "zeros", {"cpu"}

        def prepare(self, problem, layer):
            return lambda x, weights, ids, out=None: torch.zeros_like(x)

    from harness.device import Device

    verdict = run_case(INPUTS.case, Zeros(), Device("cpu"), observers=[watcher])
    assert verdict.status == "failed"
    assert watcher.take() == {"seen": 1, "rejected": ["vllm", "fla"]} and watcher.take() == {"seen": 0, "rejected": []}


def test_a_watcher_keeps_nothing_alive():
    from harness.device import Device
    from tests.support.emulated import Emulated

    watcher = Watcher(tuple(RULES))
    verdict = run_case(
        Case.parse("t9-h64-i32-e4-k2-bf16-exact-swap.dropped"), Emulated(), Device("cpu"), observers=[watcher]
    )
    assert verdict.status == "passed" and watcher.take()["seen"] == 1, verdict.reason


# -- the table --------------------------------------------------------------------------------------------------------
def outcome(kind, word, *runs):
    runs = [MutantRun("t1-h16-i16-e2-k1-bf16-exact", "tiny", "layers", status, more=more) for status, more in runs]
    return Outcome(f"{kind} {word}", kind, "x#1", word, runs=runs)


def test_the_table_has_our_row_first_and_counts_the_same_calls():
    def seen(*rejected):
        return {"seen": 1, "rejected": list(rejected)}

    outcomes = [
        outcome("made", "killed", ("failed", seen("fla"))),
        outcome("made", "killed", ("passed", seen()), ("promise", seen())),
        outcome("made", "killed", ("died", {})),  # any harness notices it
        outcome("made", "survived", ("passed", seen("vllm"))),
        outcome("made", "stillborn", ("stillborn", {})),
        outcome("controls", "innocent", ("passed", seen()), ("passed", seen("fla")), ("passed", {"seen": 0})),
    ]
    rows = summary.rule_rows(outcomes, ["vllm", "fla"])
    assert [row[0] for row in rows] == ["moe-harness", RULES["vllm"].source, RULES["fla"].source]
    assert [row[2:] for row in rows] == [
        ("3/4 (75.0%)", "1/1 (100.0%)", "0/2 (0.0%)"),
        ("2/4 (50.0%)", "0/1 (0.0%)", "0/2 (0.0%)"),
        ("2/4 (50.0%)", "1/1 (100.0%)", "1/2 (50.0%)"),
    ]
    lines = markdown(summary.RULES_HEADER, rows)
    assert lines[1] == "| --- | --- | --- | --- | --- |" and len(lines) == 5
    assert all(line.count("|") == 6 for line in lines)
