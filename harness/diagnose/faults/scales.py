"""Faults of scales: those of quantized weights, and those of quantized activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from harness.diagnose.faults.layer import BIASES, GEMMS
from harness.diagnose.faults.registry import fault
from harness.oracle.stages import Answer, Oracle
from reference.formats import round_to
from reference.quant import expand_scale, quantize_activation, saturated
from reference.scheme import ACTIVATION_GRANULARITIES, Granularity, Scheme

#: The largest code of e4m3fnuz, the fp8 of AMD's MI300: half of a bit pattern's value in e4m3.
FNUZ = 240
SCALES = {"both weights' scales": ("w13_scale", "w2_scale"), "w13_scale": ("w13_scale",), "w2_scale": ("w2_scale",)}


# -- scales of the weights --------------------------------------------------------------------------------------------
def _any(granularity: Granularity) -> bool:
    return True


def _per_row(granularity: Granularity) -> bool:
    return granularity.rows == 1


def _blocks_of_n(granularity: Granularity) -> bool:
    return (granularity.rows or 1) > 1


def _blocks_of_k(granularity: Granularity) -> bool:
    return granularity.columns is not None


def _blocks(granularity: Granularity) -> bool:
    return _blocks_of_n(granularity) and _blocks_of_k(granularity)


def _weights(
    id_: str,
    text: str,
    change: Callable[[Tensor], Tensor | None],
    where: Callable[[Granularity], bool] = _any,
    flag: str = "",
    effect: str = "",
) -> None:
    """Register a fault of each weight's scale, and of both: changed, for the granularities that have such scales."""

    @fault(f"{{which}}.{id_}", f"{{which}} {text}", flag=flag, effect=effect, which=SCALES)
    def _(o, which):
        if o.layer.w13_scale is None or not where(o.problem.quant.weights.granularity):
            return None
        changed = {name: change(getattr(o.layer, name)) for name in SCALES[which]}
        return None if any(s is None for s in changed.values()) else o(layer=replace(o.layer, **changed))


def _power_of_two(scale: Tensor, up: bool) -> Tensor:
    """Every scale rounded to a power of two, as an exponent-only format (e8m0) stores it."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - 1 + (mantissa > 0.5) * up)


def _transposed(scale: Tensor) -> Tensor:
    return scale.reshape(len(scale), scale.shape[2], scale.shape[1]).transpose(1, 2)


def _at_half_stride(scale: Tensor) -> Tensor | None:
    """The scale of expert e read at half the stride: from the offset e * size / 2."""
    size = scale[0].numel()
    if size < 2:
        return None
    places = torch.arange(len(scale))[:, None] * (size // 2) + torch.arange(size)
    return scale.reshape(-1)[places].reshape(scale.shape)


_weights("missing", "missing", torch.ones_like, flag="quant", effect="ignored")
_weights("first_expert", "of expert 0 for every expert", lambda s: s[:1].expand_as(s))
_weights("next_expert", "of the next expert", lambda s: s.roll(-1, 0))
_weights("previous_expert", "of the previous expert", lambda s: s.roll(1, 0))
_weights("half_stride", "read at half of an expert's stride", _at_half_stride)
_weights("twice", "applied twice", lambda s: s**2, flag="quant", effect="doubled")
_weights("inverted", "inverted", lambda s: 1 / s)
_weights("rounded_up", "rounded up to a power of two", lambda s: _power_of_two(s, up=True))
_weights("rounded_down", "rounded down to a power of two", lambda s: _power_of_two(s, up=False))
_weights("bf16", "rounded to bf16", lambda s: s.bfloat16().float())
_weights("first_row", "of the first row for all rows", lambda s: s[:, :1].expand_as(s), _per_row)
_weights("next_row", "of the next row", lambda s: s.roll(-1, 1), _per_row)
_weights("previous_row", "of the previous row", lambda s: s.roll(1, 1), _per_row)
_weights("blocks_transposed", "read with the blocks transposed", _transposed, _blocks, "layout", "ignored")
_weights("first_block", "of the first block for all blocks", lambda s: s[:, :1, :1].expand_as(s), _blocks)
_weights("first_block_of_k", "of the first block of K for all of K", lambda s: s[..., :1].expand_as(s), _blocks_of_k)
_weights("last_block_of_k", "of the last block of K for all of K", lambda s: s[..., -1:].expand_as(s), _blocks_of_k)
_weights("next_block_of_k", "of the next block of K", lambda s: s.roll(-1, -1), _blocks_of_k)
_weights("previous_block_of_k", "of the previous block of K", lambda s: s.roll(1, -1), _blocks_of_k)
_weights("first_block_of_n", "of the first block of N for all of N", lambda s: s[:, :1].expand_as(s), _blocks_of_n)
_weights(
    "two_blocks_of_k_share",
    "of every second block of K for the next one as well",
    lambda s: _doubled(s, -1),
    _blocks_of_k,
)
_weights("next_block_of_n", "of the next block of N", lambda s: s.roll(-1, 1), _blocks_of_n)
_weights("previous_block_of_n", "of the previous block of N", lambda s: s.roll(1, 1), _blocks_of_n)


def _doubled(scale: Tensor, dim: int) -> Tensor:
    return scale.index_select(dim, torch.arange(scale.shape[dim]) // 2 * 2)


@fault("w13_scale.of_gate_for_up", "w13_scale of the gate for up as well")
def _(o):
    return _of_halves(o, lambda gate, up: (gate, gate))


@fault("w13_scale.of_up_for_gate", "w13_scale of up for the gate as well")
def _(o):
    return _of_halves(o, lambda gate, up: (up, up))


@fault("w13_scale.gate_up_swapped", "w13_scale of gate and up swapped")
def _(o):
    return _of_halves(o, lambda gate, up: (up, gate))


def _of_halves(o: Oracle, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Answer | None:
    """w13_scale with the scales of the packed gate and up rows changed, where both halves are whole blocks."""
    scale, quant = o.layer.w13_scale, o.problem.quant
    block = quant.weights.granularity.rows if quant else None
    if scale is None or block is None or o.problem.activation in ("swigluoai", "relu2"):
        return None
    if o.problem.intermediate_size % block:
        return None
    return o(layer=replace(o.layer, w13_scale=torch.cat(change(*scale.chunk(2, 1)), 1)))


@fault("weight_scale.swapped", "w13_scale and w2_scale swapped")
def _(o):
    a, b = o.layer.w13_scale, o.layer.w2_scale
    return o(layer=replace(o.layer, w13_scale=b, w2_scale=a)) if a is not None and a.shape == b.shape else None


@fault("{which}.before_scales", "{which} added before the scales", which=BIASES)
def _(o, which):
    """The bias is added to the unscaled sum, and multiplied by all scales that are applied after it."""
    if o.experts.w13_bias is None or o.layer.w13_scale is None:
        return None
    answer = o.right
    if which != "w2_bias":
        more = _scaled_bias(o, "w13", o.s.expert, o.s.x_scale[o.s.row] if o.quantized else None)
        answer = o.resume(h=o.s.h + more)
    if which != "w13_bias":
        more = _scaled_bias(o, "w2", o.s.expert, o.s.a_scale)
        s = answer.stages
        answer = o.resume(h=s.h, a=s.a, a_ratio=s.a_ratio, a_scale=s.a_scale, operand=s.operand, y=s.y + more)
    return answer


def _scaled_bias(o: Oracle, name: str, expert: Tensor, rows: Tensor | None) -> Tensor:
    """[P, N] bias times scales, minus the bias; rows [P, K]: the scale of the operand."""
    bias, scale = getattr(o.experts, f"{name}_bias"), getattr(o.layer, f"{name}_scale")
    factor = torch.ones_like(bias)
    if scale.dim() < 3:  # per expert or row: block scales are applied inside the sum
        factor = factor * scale.reshape(len(scale), -1)
    scheme = o.experts.activation_quant
    taken = rows[:, :1] if rows is not None and scheme and not _blocks_of_k(scheme.granularity) else 1.0
    return bias[expert] * (factor[expert] * taken - 1)


# -- scales of the activations ----------------------------------------------------------------------------------------
@fault("activation_quant.missing", "activations not quantized", flag="quant", effect="ignored")
def _(o):
    return _quantizing(o, False) if o.quantized else None


@fault("activation_quant.unwanted", "activations quantized although they should not be", flag="quant", effect="ignored")
def _(o):
    if not o.experts.activation_quant or o.quantized:
        return None
    return _quantizing(o, True)


@fault(
    "activation_quant.missing.{gemm}",
    "activations not quantized in {gemm}",
    flag="quant",
    effect="ignored",
    gemm=("GEMM 1", "GEMM 2"),
)
def _(o, gemm):
    return _operand(o, gemm, lambda rows, first: rows)


@fault(
    "activation_scale.missing.{gemm}", "activation scale missing in {gemm}", flag="quant", effect="ignored", gemm=GEMMS
)
def _(o, gemm):
    return _rescaled(o, gemm, lambda codes, scale: codes)


@fault("activation_scale.inverted.{gemm}", "activation scale inverted in {gemm}", gemm=GEMMS)
def _(o, gemm):
    return _rescaled(o, gemm, lambda codes, scale: codes / scale)


@fault(
    "activation_scale.twice.{gemm}",
    "activation scale applied twice in {gemm}",
    flag="quant",
    effect="doubled",
    gemm=GEMMS,
)
def _(o, gemm):
    return _rescaled(o, gemm, lambda codes, scale: codes * scale**2)


@fault("activation_scale.first_row.{gemm}", "activation scale of row 0 for every row in {gemm}", gemm=GEMMS)
def _(o, gemm):
    return _rescaled(o, gemm, lambda codes, scale: codes * scale[:1])


@fault("activation_scale.next_row.{gemm}", "activation scale of the next row in {gemm}", gemm=GEMMS, step=(-1,))
@fault("activation_scale.previous_row.{gemm}", "activation scale of the previous row in {gemm}", gemm=GEMMS, step=(1,))
def _(o, gemm, step):
    return _rescaled(o, gemm, lambda codes, scale: codes * scale.roll(step, 0))


@fault(
    "activation_scale.first_group.{gemm}", "activation scale of the first group for all groups in {gemm}", gemm=GEMMS
)
def _(o, gemm):
    return _rescaled(o, gemm, lambda codes, scale: codes * scale[:, :1])


@fault("activation_scale.next_group.{gemm}", "activation scale of the next group in {gemm}", gemm=GEMMS, step=(-1,))
@fault(
    "activation_scale.previous_group.{gemm}", "activation scale of the previous group in {gemm}", gemm=GEMMS, step=(1,)
)
def _(o, gemm, step):
    return _regrouped(o, gemm, lambda scale: scale.roll(step, 1))


@fault(
    "scales.two_groups_share.{gemm}",
    "one scale for two groups of K, for activations and weights, in {gemm}",
    gemm=GEMMS,
)
def _(o, gemm):
    other = o.layer
    if other.w13_scale is not None and _blocks_of_k(o.problem.quant.weights.granularity):
        names = [f"{name}_scale" for name in GEMMS[gemm]]
        other = replace(other, **{name: _doubled(getattr(other, name), -1) for name in names})
    return _regrouped(o.of(other), gemm, lambda scale: _doubled(scale, 1))


@fault("activation_scale.rounded_up.{gemm}", "activation scale rounded up to a power of two in {gemm}", gemm=GEMMS)
def _(o, gemm):
    return _requantized(o, gemm, lambda rows, scale: _power_of_two(scale, up=True))


@fault(
    "activation_scale.rounded_up_after_quantization.{gemm}",
    "activation scale rounded up to a power of two after quantization in {gemm}",
    gemm=GEMMS,
)
def _(o, gemm):
    return _rescaled(o, gemm, lambda codes, scale: codes * _power_of_two(scale, up=True))


@fault("activation_scale.bf16.{gemm}", "activation scale stored in bf16 in {gemm}", gemm=GEMMS)
def _(o, gemm):
    return _rescaled(o, gemm, lambda codes, scale: codes * round_to(scale, "bf16"))


@fault("activation_codes.clamped_at_240.{gemm}", "activation codes clamped at 240 in {gemm}", gemm=GEMMS)
def _(o, gemm):
    if _largest_code(o) <= FNUZ:
        return None
    return _rescaled(o, gemm, lambda codes, scale: codes.clamp(-FNUZ, FNUZ) * scale)


@fault("activation_scale.local_rows_only", "the batch's activation scale from the rows with a local expert only")
def _(o):
    scheme = o.experts.activation_quant
    if scheme is None or scheme.granularity.rows is not None or o.experts.a13_scale is not None or not len(o.s.row):
        return None

    def of_these(rows: Tensor, scale: Tensor) -> Tensor:
        return quantize_activation(rows[o.s.row], scheme)[1][:1, :1].expand_as(scale)

    return _requantized(o, "GEMM 1", of_these)


@fault("activation_scale.for_240.{gemm}", "activation scale for a largest code of 240 in {gemm}", gemm=GEMMS)
def _(o, gemm):
    largest = _largest_code(o)
    return _requantized(o, gemm, lambda rows, scale: scale * largest / FNUZ) if largest > FNUZ else None


@fault(
    "activation_quant.per_{other}.{gemm}",
    "activations quantized per {other} in {gemm}",
    flag="quant",
    effect="ignored",
    other=("tensor", "token", "group"),
    gemm=GEMMS,
)
def _(o, other, gemm):
    if o.experts.activation_quant is None:
        return None
    scheme = replace(o.experts.activation_quant, granularity=ACTIVATION_GRANULARITIES[other])
    return _requantized(o, gemm, lambda rows, scale: quantize_activation(rows, scheme)[1])


@fault("activation_scale.of_other_gemm.{gemm}", "static activation scale of the other GEMM in {gemm}", gemm=GEMMS)
def _(o, gemm):
    pair = (o.experts.a2_scale, o.experts.a13_scale)
    if None in pair:
        return None
    return _requantized(o, gemm, lambda rows, scale: torch.full_like(scale, sum(pair)) - scale)


def _scheme(o: Oracle) -> Scheme:
    """The scheme of the activations of a layer that quantizes them."""
    assert o.experts.activation_quant is not None
    return o.experts.activation_quant


def _largest_code(o: Oracle) -> float:
    return _scheme(o).codes.max if o.quantized else 0.0


def _regrouped(o: Oracle, gemm: str, change: Callable[[Tensor], Tensor]) -> Answer | None:
    """Dequantize the right codes by other scales of groups: change(scales [rows, groups])."""
    if not o.quantized:
        return None
    granularity = _scheme(o).granularity
    if granularity.columns is None:
        return None

    def regrouped(codes: Tensor, scale: Tensor) -> Tensor:
        return codes * expand_scale(change(scale[:, :: granularity.columns]), granularity, codes.shape)

    return _rescaled(o, gemm, regrouped)


def _quantizing(o: Oracle, whether: bool) -> Answer:
    return o(rounding=replace(o.rounding, plan=replace(o.rounding.plan, quantizes_activations=whether)))


def _operand(o: Oracle, gemm: str, change: Callable[[Tensor, bool], Tensor]) -> Answer | None:
    """Replace the operand of a GEMM by change(unquantized rows, whether the GEMM is GEMM 1)."""
    if not o.quantized:
        return None
    answer = o.resume(x=change(o.rows(), True)) if "w13" in GEMMS[gemm] else o.right
    if "w2" in GEMMS[gemm]:
        s = answer.stages
        answer = o.resume(x=s.x, h=s.h, a=s.a, a_ratio=s.a_ratio, a_scale=s.a_scale, operand=change(s.a, False))
    return answer


def _rescaled(o: Oracle, gemm: str, change: Callable[[Tensor, Tensor], Tensor]) -> Answer | None:
    """Dequantize the right codes by change(codes, scale), both [rows, columns]."""

    def again(rows: Tensor, first: bool) -> Tensor:
        static = o.experts.a13_scale if first else o.experts.a2_scale
        return change(*quantize_activation(rows, _scheme(o), static))

    return _operand(o, gemm, again)


def _requantized(o: Oracle, gemm: str, scale: Callable[[Tensor, Tensor], Tensor]) -> Answer | None:
    """Quantize and dequantize with another scale: scale(rows, right scale), both [rows, columns]."""

    def again(rows: Tensor, first: bool) -> Tensor:
        static = o.experts.a13_scale if first else o.experts.a2_scale
        other = scale(rows, quantize_activation(rows, _scheme(o), static)[1])
        return saturated(rows / other, _scheme(o)) * other

    return _operand(o, gemm, again)
