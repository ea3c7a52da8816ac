"""Roundings that only kernels of others make (reference/plan.py): what each means, and that only the right one fits."""

import pytest
import torch

from harness.device import Device
from harness.inputs.draw import draw
from harness.problem.case import Case
from harness.run.case import run_case
from reference.formats import round_to, truncate_to
from reference.moe import Experts, Rounding, forward
from reference.plan import RoundingPlan, parse_plan
from reference.scheme import activation_scheme
from tests.support.emulated import Emulated

CPU = Device("cpu")


def cut(x):
    """float32 as a unit sees it that ignores the lower 13 bits."""
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def test_truncation_keeps_the_upper_bits():
    x = torch.randn(10_000) * torch.exp(8 * torch.randn(10_000))
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-126, 3.4e38, 1 + 2.0**-10, 1 + 2.0**-11])])
    assert torch.equal(truncate_to(x.double(), "tf32").float(), cut(x))
    assert truncate_to(torch.tensor([torch.inf, -torch.inf]).double(), "tf32").isinf().all()
    assert truncate_to(torch.tensor([torch.nan]).double(), "tf32").isnan().all()


class Cuts(Emulated):
    """Float32 products of operands cut to tf32."""

    def linear(self, x, w):
        return cut(x) @ cut(w).T


class RoundsWeights(Emulated):
    """fp8 codes times their scales are stored in the dtype of hidden_states before the product."""

    def weights(self, layer, name, e):
        io = torch.bfloat16 if layer.problem.dtype == "bf16" else torch.float16
        return super().weights(layer, name, e).to(io).float()


FP32, BLOCK = "t33-h320-i136-e5-k2-fp32-random", "t24-h256-i128-e4-k2-bf16-e4m3.block.none-random"


@pytest.mark.parametrize(
    "kind, case, right, wrong",
    [
        (Cuts, FP32, {"tf32": "truncated"}, {"tf32": True}),
        (Cuts, FP32, {"tf32": "truncated"}, {}),
        (RoundsWeights, BLOCK, {"weights": "io", "quantizes_activations": False}, {"quantizes_activations": False}),
    ],
)
def test_the_right_plan_fits_and_a_finer_one_does_not(kind, case, right, wrong):
    backend = kind("kernel")
    for seed in range(3):
        backend.plan = right
        found = run_case(Case.parse(case).change(seed=seed), backend, CPU)
        assert found.status == "passed", found.report
    worst = []
    for seed in range(3):
        backend.plan = wrong
        worst.append(run_case(Case.parse(case).change(seed=seed), backend, CPU).budget)
    assert max(worst) > 1, worst


def test_a_kernel_that_rounds_is_not_hidden_by_the_plan_that_cuts():
    """What the plan admits is a step of tf32, not a coherent error."""
    backend = Emulated("kernel", tf32="truncated")
    backend.linear = lambda x, w: (x * (1 + 2.0**-9)) @ w.T
    assert run_case(Case.parse(FP32), backend, CPU).status == "failed"


def small(top_k=1):
    rng = torch.Generator().manual_seed(0)
    x, w13, w2 = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((5, 8), (3, 12, 8), (3, 8, 6)))
    weights = torch.rand(5, top_k, generator=rng, dtype=torch.float64) + 0.5
    return x, weights, torch.arange(5)[:, None] % 3, w13, w2


def test_a_weight_on_the_product_meets_operands_that_were_quantized_without_it():
    x, weights, ids, w13, w2 = small()
    experts = Experts(w13, w2, router_weight_on_input=True, activation_quant=activation_scheme("tensor"))
    plain = forward(x, torch.ones_like(weights), ids, experts, Rounding(RoundingPlan()))
    on_product = forward(x, weights, ids, experts, Rounding(RoundingPlan(weighted_input="product")))
    before = forward(x, weights, ids, experts, Rounding(RoundingPlan()))
    assert torch.equal(on_product.x, plain.x * weights) and not torch.equal(before.x, on_product.x)
    assert torch.allclose(round_to(on_product.x_ratio, "e4m3") * on_product.x_scale, on_product.x, rtol=1e-15, atol=0)


def test_a_weight_on_the_product_has_no_meaning_with_shared_experts():
    x, weights, ids, w13, w2 = small()
    experts = Experts(w13, w2, router_weight_on_input=True, shared=1)
    with pytest.raises(ValueError, match="no meaning with shared experts"):
        forward(x, weights, ids % 2, experts, Rounding(RoundingPlan(weighted_input="product")))


@pytest.mark.parametrize(
    "declared, message",
    [
        ({"tf32": "cut"}, "tf32='cut'; valid: False, True, 'truncated'"),
        ({"weights": "fp32"}, "weights='fp32'; valid: 'exact', 'io'"),
        ({"weighted_input": "after"}, "weighted_input='after'; valid: 'accumulator', 'io', 'product'"),
    ],
)
def test_a_word_that_is_none_is_refused_by_name(declared, message):
    with pytest.raises(ValueError, match=message):
        parse_plan(declared)


def test_ids_of_64_bits_lie_densely():
    inputs = draw(Case.parse("t9-h64-i32-e6-k3-bf16-ids64-random"))
    assert inputs.topk_ids.dtype == torch.int64 and inputs.topk_ids.is_contiguous()
