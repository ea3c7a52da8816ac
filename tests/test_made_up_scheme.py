"""A quantization scheme that the harness has never heard of: codes of six bits, a scale for every 1x64.

This one file registers it. Descriptors name it, layers are drawn in it, a kernel for it is judged. The mistake of a
wrong kernel is named, and its stage.
"""

import pytest
import torch

from harness.device import Device
from harness.inputs.draw import draw
from harness.problem.case import Case
from harness.problem.exactness import inexact
from harness.run.case import run_case
from reference.formats import decode
from reference.scheme import (
    ACTIVATION_GRANULARITIES,
    FORMATS,
    WEIGHT_GRANULARITIES,
    Format,
    Granularity,
    register_format,
    register_granularity,
)

CPU = Device("cpu")
PLAIN, QUANTIZED = "e2m3.row64.none", "e2m3.row64.group64"


@pytest.fixture(autouse=True, scope="module")
def registered():
    """The scheme, for the tests of this file alone: other tests go through all formats that are known."""
    six = Format("e2m3", precision=4, emin=0, max=7.5, storage="uint8", saturates=True, bits=6, activations="e2m3")
    register_format(six)
    register_granularity("row64", Granularity(1, 64), of="weights")
    register_granularity("group64", Granularity(1, 64), of="activations")
    yield
    del FORMATS["e2m3"], WEIGHT_GRANULARITIES["row64"], ACTIVATION_GRANULARITIES["group64"]


#: The 64 values by code: sign, two bits of exponent, three of mantissa; 0, 0.125, ... 7.5.
HALF = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
VALUES = torch.tensor(HALF + [-value for value in HALF])


def spread(scale, columns):
    return scale.repeat_interleave(64, -1)[..., :columns]


def quantized(x):
    """[M, K] float32, each 1x64 rounded to six bits."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 64)).unflatten(1, (-1, 64))
    scale = spread(blocks.abs().nan_to_num(0.0).amax(2).clamp(min=1e-10) / 7.5, x.shape[1])
    ratio = (x / scale).clamp(-7.5, 7.5)
    step = torch.where(ratio.abs() < 2, 0.125, torch.where(ratio.abs() < 4, 0.25, 0.5))
    return torch.round(ratio / step) * step * scale


class SixBits:
    """A kernel for the scheme, in float32; an attribute makes it wrong."""

    name, devices = "six-bits", {"cpu"}
    unsigned = next_block = gate_up_swapped = unquantized = False

    def __init__(self, **wrong):
        vars(self).update(wrong)

    def plans(self, problem):
        return [{}]

    def supports(self, problem):
        plain = problem.activation == "silu" and not problem.shared_experts and problem.limit is None
        return None if plain and problem.layout == "nk" else "activation: silu in layout nk only"

    def prepare(self, problem, layer):
        def call(hidden_states, topk_weights, topk_ids, out=None):
            result = self.stages((problem, layer), hidden_states, topk_weights, topk_ids)["out"]
            return result if out is None else out.copy_(result)

        call.layer = (problem, layer)
        return call

    def weights(self, layer, name, e):
        codes, scale = getattr(layer, name)[e].long(), getattr(layer, f"{name}_scale")[e]
        if self.next_block and name == "w2":
            scale = scale.roll(1, -1)
        value = VALUES[codes & 31 if self.unsigned else codes]
        return value * spread(scale, codes.shape[1])

    def stages(self, call, hidden_states, topk_weights, topk_ids):
        problem, layer = getattr(call, "layer", call)
        quantize = quantized if problem.quant.activation and not self.unquantized else lambda x: x
        tokens, k = topk_ids.shape
        x = quantize(hidden_states.float()).repeat_interleave(k, 0)
        ids = topk_ids.flatten().long()
        local = ids if layer.expert_map is None else layer.expert_map.long()[ids]
        h = x.new_zeros(tokens * k, problem.w13_rows)
        for pair, e in enumerate(local.tolist()):
            if e >= 0:
                h[pair] = x[pair] @ self.weights(layer, "w13", e).T
                h[pair] += 0 if layer.w13_bias is None else layer.w13_bias[e].float()
        gate, up = h.chunk(2, 1)[:: -1 if self.gate_up_swapped else 1]
        a = gate * torch.sigmoid(gate) * up
        operand = quantize(a)
        slots = x.new_zeros(tokens * k, problem.hidden_size)
        for pair, e in enumerate(local.tolist()):
            if e >= 0:
                slots[pair] = operand[pair] @ self.weights(layer, "w2", e).T
                slots[pair] += 0 if layer.w2_bias is None else layer.w2_bias[e].float()
        slots = slots * topk_weights.reshape(-1, 1)
        out = slots.unflatten(0, (tokens, k)).sum(1).to(hidden_states.dtype)
        return {"expert": local, "x": x, "h": h, "a": a, "operand": operand, "slots": slots, "out": out}


def verdict(text, **wrong):
    return run_case(Case.parse(text), SixBits(**wrong), CPU)


@pytest.mark.parametrize("fill", ("exact", "random", "extreme"))
@pytest.mark.parametrize("scheme", (PLAIN, QUANTIZED))
@pytest.mark.parametrize("shape", ("t9-h200-i136-e3-k2-bf16", "t1-h64-i64-e4-k1-fp16", "t33-h130-i72-e5-k3-bf16"))
def test_a_right_kernel_passes(shape, scheme, fill):
    found = verdict(f"{shape}-{scheme}-bias-{fill}")
    assert found.status == "passed", found.report


@pytest.mark.parametrize("scheme", (PLAIN, QUANTIZED))
def test_a_layer_is_drawn_in_codes(scheme):
    for fill in ("exact", "random", "extreme"):
        layer = draw(Case.parse(f"t3-h200-i136-e3-k2-bf16-{scheme}-{fill}")).layer
        assert layer.w13.dtype == torch.uint8 and layer.w13.shape == (3, 272, 200) and int(layer.w13.max()) < 64
        assert layer.w13_scale.shape == (3, 272, 4) and layer.w2_scale.shape == (3, 200, 3)
        assert torch.equal(VALUES[layer.w2.long()].double(), decode(layer.w2, "e2m3"))
        assert len(layer.w13.unique()) > (4 if fill == "exact" else 40)


@pytest.mark.parametrize("fill", ("exact", "random"))
@pytest.mark.parametrize(
    ("wrong", "scheme", "cause", "stage"),
    [
        ("gate_up_swapped", PLAIN, "gate and up swapped", "activation"),
        ("next_block", PLAIN, "w2_scale of the previous block of K", "GEMM 2"),
        ("unquantized", QUANTIZED, "activations not quantized", "quantization"),
        ("unsigned", PLAIN, "", "GEMM 1"),
    ],
)
def test_a_wrong_kernel_is_named_and_localised(wrong, scheme, cause, stage, fill):
    found = verdict(f"t9-h200-i136-e3-k2-bf16-{scheme}-{fill}", **{wrong: True})
    if wrong == "unquantized" and fill == "exact":
        assert found.status == "passed"  # nothing rounds in an exact fill
        return
    assert found.status == "failed" and (found.cause, found.stage) == (cause, stage), found.report


def test_a_problem_whose_weights_have_no_codes_says_so():
    problem = Case.parse("t9-h200-i136-e3-k2-bf16-e2m3.block.none-random").problem
    assert inexact(problem) == "fill: no scale makes e2m3 codes of the weights of an exact fill"
