"""The pipeline with the empty plan is the naive layer, bit for bit, over the grammar of problems."""

from itertools import product
from random import Random

import pytest
import torch

from harness.inputs.draw import draw
from harness.oracle.experts import oracle_experts
from harness.problem.case import ACTIVATIONS, DTYPES, FILLS, Case
from harness.problem.exactness import inexact
from reference.formats import decode
from reference.moe import PIPELINE, Experts, Rounding, Values, forward, resume
from reference.naive import naive
from reference.plan import RoundingPlan

SCHEMES = (
    "e4m3.block.group", "e4m3.tensor.static", "e4m3.channel.token", "e5m2.tensor.tensor", "e5m2.channel.none",
    "e4m3.block.token",
)  # fmt: skip
ROUTINGS = ("", "invalid", "beyond", "nobody", "duplicate", "skewed", "one", "half")
SIZES = ("t9-h136-i72-e8", "t1-h64-i40-e4", "t40-h160-i136-e8", "t3-h32-i8-e16")
FLAGS = ("", "bias", "ep2.1", "shared2", "bias-ids64", "ep2.0s-padded", "shared1-bias", "kn")


def descriptors():
    """Every activation with every routing and scheme; sizes, top_k, flags and fills are drawn."""
    rng = Random(0)
    for activation, routing, scheme in product(ACTIVATIONS, ROUTINGS, ("", *SCHEMES)):
        size = rng.choice(SIZES)
        k = rng.randint(1, min(8, int(size.rsplit("e", 1)[1])))
        dtype = f"{rng.choice(('bf16', 'fp16'))}-{scheme}" if scheme else rng.choice(DTYPES)
        limit = "" if activation == "relu2" else rng.choice(("", "", "limit7", "limit1.5", "limit128"))
        on_input = "win" if k == 1 and rng.random() < 0.8 else ""
        tokens = (size, f"k{k}", dtype, activation, limit, rng.choice(FLAGS), on_input, routing, rng.choice(FILLS))
        case = Case.parse("-".join(t for t in tokens if t))
        yield str(case.change(fill="random") if case.fill == "exact" and inexact(case.problem) else case)


CASES = tuple(dict.fromkeys(descriptors()))


def arguments(text: str) -> tuple[Rounding, tuple]:
    """Return the empty plan and the arguments of both layers, for a descriptor."""
    inputs = draw(Case.parse(text))
    experts = oracle_experts(inputs.layer)
    rounding = Rounding(RoundingPlan(), inputs.case.problem.dtype, repeat=True)
    return rounding, (decode(inputs.hidden_states), inputs.topk_weights.double(), inputs.topk_ids, experts)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit for bit; any NaN equals any other."""
    return (
        a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(
            a.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(torch.int64),
            b.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).view(torch.int64),
        )
    )


@pytest.mark.parametrize("batch", range(8))
def test_the_pipeline_is_the_naive_layer(batch):
    different = []
    for text in CASES[batch::8]:
        rounding, args = arguments(text)
        if not same_bits(forward(*args, rounding).out, naive(*args)):
            different.append(text)
    assert different == []


def test_the_cases_cover_the_grammar():
    problems = [Case.parse(text).problem for text in CASES]
    assert {p.top_k for p in problems} == set(range(1, 9))
    assert {p.activation for p in problems} == set(ACTIVATIONS)
    assert {p.dtype for p in problems} == set(DTYPES)
    assert {Case.parse(text).fill for text in CASES} == set(FILLS)
    for name in ("bias", "router_weight_on_input", "padded", "limit", "ep", "shared_experts", "quant"):
        assert {bool(getattr(p, name)) for p in problems} == {True, False}, name
    on_input = [p for p in problems if p.router_weight_on_input]
    assert any(p.shared_experts and p.quant and p.quant.activation for p in on_input)


def test_the_comparison_is_not_vacuous():
    rounding, (x, weights, ids, experts) = arguments("t9-h64-i40-e8-k2-bf16-bias-random")
    right = forward(x, weights, ids, experts, rounding).out
    assert right.abs().min() > 0
    for changed in ((x, weights * (1 + 2.0**-50), ids), (x, weights, ids.roll(1, 0)), (x.roll(1, 0), weights, ids)):
        assert not same_bits(right, naive(*changed, experts))


def test_one_token_by_hand():
    """A layer small enough for arithmetic on paper: relu2, two slots, one of them of another rank."""
    experts = Experts(
        w13=torch.tensor([[[1.0, -1.0], [0.0, 2.0]]], dtype=torch.float64),
        w2=torch.tensor([[[1.0, 1.0], [3.0, 0.0]]], dtype=torch.float64),
        activation="relu2",
        w13_bias=torch.tensor([[0.0, 1.0]], dtype=torch.float64),
        w2_bias=torch.tensor([[0.5, 0.0]], dtype=torch.float64),
        expert_map=torch.tensor([-1, 0]),
    )
    x, weights = torch.tensor([[3.0, 1.0]], dtype=torch.float64), torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    # h = (3 - 1, 2 + 1) = (2, 3); a = (4, 9); y = (13.5, 12); the second slot's weight is 0.5.
    right = torch.tensor([[6.75, 6.0]], dtype=torch.float64)
    ids = torch.tensor([[0, 1]])
    assert torch.equal(naive(x, weights, ids, experts), right)
    assert torch.equal(forward(x, weights, ids, experts).out, right)


@pytest.mark.parametrize(
    "text", ["t9-h64-i40-e8-k2-bf16-bias-random", "t9-h136-i72-e8-k1-bf16-e4m3.block.group-win-shared1-random"]
)
def test_a_pipeline_resumed_after_any_stage_gives_the_same(text):
    rounding, (x, weights, ids, experts) = arguments(text)
    right = forward(x, weights, ids, experts, rounding)
    values = Values(x, weights, ids)
    for stage in PIPELINE:
        values = stage(values, experts, rounding)
        assert torch.equal(resume(values, experts, rounding, after=stage.__name__).out, right.out)
