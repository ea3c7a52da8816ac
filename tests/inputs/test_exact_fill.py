"""The exact fill rounds nowhere, and every dropped or misplaced part changes many outputs."""

from dataclasses import replace

import pytest
import torch

from harness.inputs.draw import draw
from harness.oracle.experts import exact_output, oracle_experts
from harness.problem.case import Case
from harness.problem.exactness import inexact
from reference.formats import decode, fmt, round_to
from reference.moe import forward

PROBLEMS = [
    "t16-h256-i128-e8-k2-bf16",
    "t16-h64-i64-e4-k1-bf16",
    "t9-h320-i136-e8-k8-bf16-bias",
    "t16-h256-i128-e8-k2-fp16-gelu",
    "t16-h256-i128-e8-k1-bf16-win-bias",
    "t16-h256-i128-e8-k2-bf16-relu2-bias",
    "t16-h256-i256-e8-k2-bf16-swigluoai-limit128-bias",
    "t16-h384-i320-e4-k2-bf16-e4m3.block.group",
    "t16-h384-i320-e4-k2-bf16-e5m2.block.group",
    "t16-h384-i320-e4-k8-bf16-e4m3.channel.token".replace("e4-", "e8-", 1),
    "t16-h256-i320-e4-k1-bf16-e4m3.tensor.tensor-win",
    "t16-h256-i128-e4-k2-bf16-e4m3.tensor.static-bias",
    "t12-h2048-i128-e4-k2-bf16",
]


def stages_of(text: str, seed: int = 0):
    inputs = draw(Case.parse(f"{text}-s{seed}-exact"))
    experts = oracle_experts(inputs.layer)
    return (
        inputs,
        experts,
        forward(decode(inputs.hidden_states), inputs.topk_weights.double(), inputs.topk_ids, experts),
    )


def settled(value):
    """Replace values below float32's smallest number, which a closed gate leaves in float64, by zero, as kernels do."""
    return torch.where(value.abs() < 1e-45, 0.0, value)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", PROBLEMS)
def test_every_intermediate_value_is_representable(text, seed):
    """h, a, each slot and each partial sum over top_k fit the io dtype; quantized values fit e4m3."""
    inputs, _, stages = stages_of(text, seed)
    io = inputs.case.problem.dtype
    for name in ("h", "a", "y"):
        value = settled(getattr(stages, name))
        assert torch.equal(round_to(value, io), value), name
    slots = settled(stages.y * stages.weight[:, None])
    assert torch.equal(round_to(slots, io), slots)
    largest = torch.zeros_like(stages.out).index_add_(0, stages.token, slots.abs())
    unit = slots[slots.abs() > 1e-30].abs().min()
    assert float(largest.max() / unit) <= 2 ** fmt(io).precision * 4
    for ratio in (stages.x_ratio, stages.a_ratio):
        if ratio is not None:
            assert torch.equal(round_to(settled(ratio), "e4m3"), settled(ratio))


@pytest.mark.parametrize("text", PROBLEMS)
def test_dynamic_scales_are_powers_of_two(text):
    _, _, stages = stages_of(text)
    for scale in (stages.x_scale, stages.a_scale):
        if scale is not None:
            assert bool((torch.frexp(scale)[0] == 0.5).all())


def changed(text: str, spoil) -> float:
    """Return the share of outputs that differ after `spoil` changes the inputs."""
    inputs = draw(Case.parse(f"{text}-exact"))
    right = exact_output(inputs)
    other = spoil(
        replace(inputs, layer=replace(inputs.layer, w13=inputs.layer.w13.clone(), w2=inputs.layer.w2.clone()))
    )
    return float((exact_output(other or inputs) != right).double().mean())


def drop_column(inputs, column):
    x = inputs.hidden_states.clone()
    x[:, column] = 0
    return replace(inputs, hidden_states=x)


def test_every_dropped_or_misplaced_part_changes_its_share_of_the_outputs(capsys):
    text = "t16-h256-i128-e8-k2-bf16"
    # Each of the two class columns affects half of the tokens; every other column affects nearly all outputs.
    columns = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:24].tolist()
    shares = {"one K column (least of 24)": min(changed(text, lambda g, c=c: drop_column(g, c)) for c in columns)}

    def zero(tensor, index):
        def spoil(inputs):
            getattr(inputs.layer, tensor)[index] = 0
            return inputs

        return spoil

    inner = [changed(text, zero("w2", (slice(None), slice(None), i))) for i in range(0, 128, 8)]
    shares["one I column (mean of 16)"] = sum(inner) / len(inner)
    shares["w2 block of 128 output columns"] = changed(text, zero("w2", (slice(None), slice(0, 128))))
    shares["w13 block of 64 rows"] = changed(text, zero("w13", (slice(None), slice(0, 64))))
    shares["one expert"] = changed(text, zero("w2", 3))
    shares["a slot"] = changed(
        text, lambda g: replace(g, topk_ids=torch.cat([g.topk_ids[:, :1], g.topk_ids[:, 1:] * 0 - 1], 1))
    )
    shares["neighbour expert"] = changed(text, lambda g: replace(g, topk_ids=(g.topk_ids + 1) % 8))
    shares["weight twice"] = changed(text, lambda g: replace(g, topk_weights=g.topk_weights**2))
    with capsys.disabled():
        print("\n" + "\n".join(f"  {name:<32} changes {share:6.1%} of the outputs" for name, share in shares.items()))
    least = {
        "one K column (least of 24)": 0.45, "one I column (mean of 16)": 0.02, "w2 block of 128 output columns": 0.4,
        "w13 block of 64 rows": 0.5, "one expert": 0.1, "a slot": 0.8, "neighbour expert": 0.9, "weight twice": 0.3,
    }  # fmt: skip
    assert {name: share for name, share in shares.items() if share < least[name]} == {}


def test_a_16_bit_accumulator_changes_outputs():
    """Ramp tokens exceed the exact integers of a bf16 accumulator; a float32 and a 14-bit accumulator stay exact."""
    inputs = draw(Case.parse("t16-h2048-i64-e2-k1-bf16-exact"))
    x, w = inputs.hidden_states.double(), inputs.layer.w13[0].double()
    exact = x @ w.T
    running, peak = torch.zeros_like(exact), torch.zeros_like(exact)
    for k in range(0, 2048, 32):
        step = x[:, k : k + 32] @ w[:, k : k + 32].T
        running = round_to(running + step, "bf16")
        peak = torch.maximum(peak, (x[:, : k + 32] @ w[:, : k + 32].T).abs())
    assert float((running != exact).double().mean()) > 0.02
    assert float(peak.max()) < 2**24


@pytest.mark.parametrize(
    "text, reason",
    [
        ("t4-h64-i32-e4-k2-bf16-swigluoai", "does not saturate"),
        ("t4-h64-i32-e4-k2-bf16-limit7", "clamp at 7"),
        ("t4-h128-i128-e4-k2-bf16-e4m3.block.group-relu2", "relu2"),
        ("t4-h16-i32-e4-k2-bf16", "hidden_size >= 32"),
    ],
)
def test_inexact_gives_the_reason_why_no_exact_fill_exists(text, reason):
    actual = inexact(Case.parse(text).problem)
    assert actual is not None and actual.startswith("fill: ") and reason in actual
