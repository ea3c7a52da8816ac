"""Correct variants pass: other orders of summation, other storage formats, other places of the router weight."""

import pytest

from harness.device import Device
from harness.problem.case import Case
from harness.run.case import run_case
from tests.support.emulated import CONTROLS

PROBLEMS = (
    "t16-h256-i128-e8-k2-bf16",
    "t16-h256-i128-e8-k2-fp16-bias",
    "t12-h192-i96-e4-k2-fp32",
    "t33-h128-i64-e8-k8-bf16",
    "t9-h256-i128-e8-k1-bf16-bias-win",
    "t16-h128-i128-e8-k2-bf16-gelu_tanh",
    "t16-h128-i128-e8-k2-bf16-swigluoai-bias",
    "t20-h128-i64-e8-k2-bf16-duplicate",
    "t16-h256-i192-e4-k2-bf16-e4m3.block.group",
    "t16-h256-i128-e4-k2-bf16-e4m3.channel.token-swigluoai-limit128",
    "t16-h256-i128-e4-k2-bf16-e4m3.tensor.static",
    "t16-h256-i128-e4-k2-bf16-e4m3.tensor.tensor-relu2",
    "t16-h256-i128-e4-k2-bf16-e5m2.block.none-kn",
)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fill", ("exact", "random", "extreme"))
def test_every_correct_variant_passes(seed, fill):
    failures = []
    for n, text in enumerate(PROBLEMS):
        case = Case.parse(f"{text}-s{seed}-{fill}")
        for control in CONTROLS[(n + seed) % 4 :: 4]:  # four seeds cover every control with every problem
            verdict = run_case(case, control, Device("cpu"))
            if not verdict.green:
                failures.append(f"{control.name} {case}: {verdict.reason}")
    assert not failures, "\n".join(failures)
