"""diagnose/localise.py: it names a stage that alone is broken, and no stage of a correct kernel."""

import functools

import pytest
import torch

from harness.diagnose import failure
from harness.run.case import run_case
from harness.session.session import Session
from tests.support import interpreted  # noqa: F401  first: it skips where nothing is interpreted

from harness.device import Device  # isort: skip
from harness.diagnose.localise import first_wrong, localise  # isort: skip
from harness.problem.case import Case  # isort: skip
from kernels.triton import fused_moe  # isort: skip
from kernels.triton.backend import TritonChunkedMoE, TritonMoE, TritonPermuteMoE  # isort: skip

CPU = Device("cpu")
PLAIN, FP8 = "t20-h128-i64-e4-k2-bf16-random", "t9-h128-i64-e4-k2-bf16-e4m3.block.group-random"


@pytest.fixture(autouse=True)
def every_failure_is_diagnosed(monkeypatch):
    monkeypatch.setattr(failure, "DIAGNOSES", failure.Diagnoses(limit=1000))


def breaking(monkeypatch, name, spoil, at=0):
    """spoil(arguments, result) behind the function of that name, every time (at=0) or only the first or second."""
    original = getattr(fused_moe, name)
    calls = []

    @functools.wraps(original)
    def broken(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        # A call runs twice: once to be judged, once to be looked at. Two GEMMs, two quantizations in each.
        if not at or (len(calls) - 1) % 2 + 1 == at:
            spoil(args, result)
        return result

    monkeypatch.setattr(fused_moe, name, broken)


def other_experts(args, result):
    _, experts, _ = result
    experts[experts >= 0] = (experts[experts >= 0] + 1) % 4


def other_rows(args, result):
    result.hidden_states.copy_(result.hidden_states.roll(1, 0))


def scaled(args, result):
    result[1].mul_(1.5)


def other_columns(args, result):
    args[2][:, 32:] *= 1.01


def other_values(args, result):
    args[1][:, ::2] += 0.05


def last_token(args, result):
    args[2][-1] = 0


@pytest.mark.parametrize(
    "backend, case, name, spoil, at, stage",
    [
        (TritonMoE, PLAIN, "moe_align_block_size", other_experts, 0, "alignment"),
        (TritonPermuteMoE, PLAIN, "moe_permute", other_rows, 0, "permutation"),
        (TritonMoE, FP8, "quantize_fp8", scaled, 1, "quantization"),
        (TritonMoE, PLAIN, "moe_gemm", other_columns, 1, "GEMM 1"),
        (TritonMoE, PLAIN, "activate", other_values, 0, "activation"),
        (TritonMoE, FP8, "quantize_fp8", scaled, 2, "requantization"),
        (TritonMoE, PLAIN, "moe_gemm", other_columns, 2, "GEMM 2"),
        (TritonChunkedMoE, PLAIN, "moe_gemm", other_columns, 2, "GEMM 2"),
        (TritonMoE, PLAIN, "moe_combine", last_token, 0, "combine"),
        (TritonPermuteMoE, PLAIN, "moe_unpermute", lambda args, result: result[-1].zero_(), 0, "combine"),
    ],
)
def test_the_stage_that_is_broken_is_named(monkeypatch, backend, case, name, spoil, at, stage):
    breaking(monkeypatch, name, spoil, at)
    found = run_case(Case.parse(case), backend(), CPU)
    assert (found.status, found.stage) == ("failed", stage), found.report
    assert f"stage         first wrong: {stage} (" in found.report


def test_the_report_names_rows_and_columns(monkeypatch):
    breaking(monkeypatch, "moe_gemm", other_columns, at=1)
    report = run_case(Case.parse(PLAIN), TritonMoE(), CPU).report
    assert "rows of every expert; every token; columns 32-" in report
    monkeypatch.undo()

    def one_expert(args, result):
        mine = args[3].sorted_token_ids[: int(args[3].num_tokens_post_padded)].view(-1, args[4].block_m)[0]
        args[2][mine[mine < len(args[2])].long()] *= 2

    monkeypatch.setattr(failure, "DIAGNOSES", failure.Diagnoses(limit=1000))
    breaking(monkeypatch, "moe_gemm", one_expert, at=2)
    assert "rows of expert 0;" in run_case(Case.parse(PLAIN), TritonMoE(), CPU).report


@pytest.mark.parametrize(
    "backend, text",
    [
        (TritonMoE, "t9-h136-i72-e4-k2-bf16-bias-random"),
        (TritonPermuteMoE, "t9-h128-i64-e4-k2-fp32-gelu-random"),
        (TritonMoE, "t9-h128-i64-e4-k2-fp16-gelu_tanh-limit1-random"),
        (TritonPermuteMoE, "t9-h128-i64-e4-k2-bf16-swigluoai-bias-random"),
        (TritonMoE, "t9-h128-i64-e4-k2-bf16-relu2-invalid-random"),
        (TritonPermuteMoE, "t14-h128-i64-e4-k2-bf16-bias-extreme"),
        (TritonMoE, "t14-h128-i64-e4-k2-fp16-extreme"),
        (TritonPermuteMoE, "t9-h128-i64-e4-k1-bf16-win-bias-random"),
        (TritonMoE, "t9-h128-i64-e4-k1-bf16-e4m3.channel.token-win-random"),
        (TritonPermuteMoE, "t9-h256-i136-e4-k2-bf16-e4m3.block.group-ep2.1-random"),
        (TritonMoE, "t9-h128-i64-e4-k2-bf16-e4m3.tensor.static-random"),
        (TritonPermuteMoE, "t14-h128-i64-e4-k2-bf16-e5m2.tensor.tensor-kn-extreme"),
        (TritonMoE, "t9-h128-i64-e4-k2-bf16-e4m3.block.none-duplicate-random"),
        (TritonPermuteMoE, "t2-h128-i64-e16-k2-bf16-ids64-padded-random"),
        (TritonMoE, "t16-h256-i128-e8-k2-bf16-e4m3.block.group-exact"),
    ],
)
def test_a_correct_kernel_has_no_wrong_stage(backend, text):
    case, backend = Case.parse(text), backend()
    session = Session(case, backend, CPU)
    inputs = session.draw()
    call = session.prepare(case.problem, inputs.backend_layer)
    seen = backend.stages(call, inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)
    assert set(seen) >= {"expert", "x", "h", "a", "operand", "slots", "out"}
    assert first_wrong(seen, inputs, session.plans(case.problem)[0]) is None


class Exposed(TritonMoE):
    """A backend whose recorded values a test may change."""

    def __init__(self, show):
        self.show = show

    def stages(self, call, x, weights, ids):
        return self.show(super().stages(call, x, weights, ids))


def localised(show, change=0.0):
    case, backend = Case.parse(PLAIN), Exposed(show)
    session = Session(case, backend, CPU)
    inputs = session.draw()
    call = session.prepare(case.problem, inputs.backend_layer)
    got = call(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids).double() + change
    return localise(backend, call, inputs, session.plans(case.problem)[0], got)


def test_stages_that_are_not_exposed_are_not_checked():
    def spoilt(seen):
        return {name: value * 2 if name == "h" else value for name, value in seen.items()}

    assert localised(spoilt)[0] == "GEMM 1"
    assert localised(lambda seen: {n: v for n, v in spoilt(seen).items() if n not in ("x", "a")}) == (
        "",
        "none: each follows from the one before, within its rounding",
    )


def test_a_replay_that_differs_or_raises_is_reported():
    assert localised(lambda seen: seen, change=1.0)[1].endswith("the replay returned another output than the call")
    assert localised(lambda seen: 1 / 0) == ("", "not localised: the replay raised ZeroDivisionError: division by zero")


def test_a_backend_without_stages_is_not_localised():
    from tests.support.emulated import Emulated

    case = Case.parse(PLAIN)
    inputs = Session(case, Emulated(), CPU).draw()
    assert localise(Emulated(), print, inputs, None, torch.zeros(1)) == ("", "")
