"""The random fill detects what the exact fill cannot: precision, undeclared roundings, requantization, scale errors.

Each backend has one fault and is judged under the plan that it declares.
"""

import pytest
import torch

from harness.device import Device
from harness.problem.case import Case
from harness.run.case import run_case
from tests.support.emulated import Emulated

BLOCK = "t48-h512-i256-e4-k2-bf16-e4m3.block.group-random"
PLAIN = "t48-h512-i256-e4-k2-{}-random"


class Faulty(Emulated):
    """A backend whose arithmetic (the keywords of Emulated, or an overridden method) is not the plan it declares."""

    def __init__(self, declared=None, **does):
        super().__init__("faulty", **does)
        self.declared = declared or {}

    def plans(self, problem):
        return [{"act": "io", **self.declared}] if problem.dtype != "fp32" else [self.declared]


class DropsLastColumn(Faulty):
    def linear(self, x, w):
        return super().linear(x[:, :-1], w[:, :-1])


class AccumulatesIn16Bits(Faulty):
    def linear(self, x, w):
        total = torch.zeros(len(x), len(w))
        for k in range(0, x.shape[1], 32):
            total = (total + x[:, k : k + 32] @ w[:, k : k + 32].T).bfloat16().float()
        return total


class OnePercent(Faulty):
    def linear(self, x, w):
        return super().linear(x, w) * 1.005


class OneExpertOnePercent(Faulty):
    def weights(self, layer, name, e):
        return super().weights(layer, name, e) * (1.01 if e == 2 else 1.0)


class TanhForErf(Faulty):
    def activation(self, h, problem, io):
        g, u = h.chunk(2, 1)
        return torch.nn.functional.gelu(g, approximate="tanh") * u


class ScalePerToken(Faulty):
    def quantize(self, x, granularity, static):
        return super().quantize(x, "token", static)


class ShiftedScales(Faulty):
    """Uses the scale of a group for the next group."""

    def quantize(self, x, granularity, static):
        right = super().quantize(x, granularity, static)
        if x.shape[1] <= 128:
            return right
        groups = x.unflatten(1, (-1, 128)).abs().amax(2)
        return right * (groups.roll(1, 1) / groups).repeat_interleave(128, 1)


class TruncatesCodes(Faulty):
    def quantize(self, x, granularity, static):
        return super().quantize(x * (1 - 2.0**-5), granularity, static)


@pytest.mark.parametrize(
    "backend, text",
    [
        (DropsLastColumn(), PLAIN.format("bf16")),
        (DropsLastColumn(), BLOCK),
        (AccumulatesIn16Bits(), PLAIN.format("bf16")),
        (AccumulatesIn16Bits(), BLOCK),
        (OnePercent(), PLAIN.format("bf16")),
        (OnePercent(), BLOCK),
        (OneExpertOnePercent(), PLAIN.format("fp16")),
        (OneExpertOnePercent(), BLOCK),
        (TanhForErf(), PLAIN.format("fp32-gelu")),
        (ScalePerToken(), BLOCK),
        (ShiftedScales(), BLOCK),
        (TruncatesCodes(), BLOCK),
        (Faulty(gate_up="io", act_chain=True), PLAIN.format("bf16")),
        (Faulty(gate_up="io"), BLOCK),
        (Faulty(quantizes_activations=False), BLOCK),
        (Faulty({"act": "fp32"}, act="io"), BLOCK),
        (Faulty(slot="io", weight="rounded", combine="io"), PLAIN.format("bf16").replace("k2", "k4")),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__ + "".join(f"-{k}" for k in v.plan),
)
def test_a_fault_of_precision_fails(backend, text):
    verdict = run_case(Case.parse(text), backend, Device("cpu"))
    assert verdict.status == "failed", f"{verdict.budget:.2f} of the budget: {verdict.budgets}"


@pytest.mark.parametrize("text", [PLAIN.format("bf16"), PLAIN.format("fp32-gelu"), BLOCK])
def test_without_the_fault_it_passes(text):
    assert run_case(Case.parse(text), Faulty(), Device("cpu")).status == "passed"
