"""Quantization of weights and activations: each value is stored as code * scale, by a Scheme (reference/scheme.py).

The granularity of a scheme says which elements share a scale. Of those that descriptors name:

    weights [E, N, K]      "tensor"  scale [E]                              one per expert
                           "channel" scale [E, N]                           one per output channel
                           "block"   scale [E, ceil(N/128), ceil(K/128)]    one per 128 x 128 block
    activations [M, K]     "tensor"  scale []                               one for all rows
                           "token"   scale [M]                              one per row
                           "group"   scale [M, ceil(K/128)]                 one per 128 elements of a row

Blocks and groups at the end may be ragged. Scales are float32 tensors: kernels store them so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.formats import decode, encode, require_float64, round_to, ulp
from reference.scheme import Granularity, Scheme

#: Unit roundoff of float32: kernels divide by scales, or multiply by their reciprocals, in float32.
U32 = 2.0**-24


# -- scales -----------------------------------------------------------------------------------------------------------
def expand_scale(scale: Tensor, granularity: Granularity, shape: Sequence[int]) -> Tensor:
    """Give every element its scale: scale of granularity.scale_shape(shape) -> tensor of that shape [..., N, K].

    Keeps the dtype. ValueError if the scale has another shape.
    """
    expected = granularity.scale_shape(shape)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; {granularity} of a tensor of shape {tuple(shape)} needs {expected}"
        )
    n, k = shape[-2:]
    if granularity.columns is None:
        scale = scale.unsqueeze(-1)
    elif granularity.columns > 1:
        scale = scale.repeat_interleave(granularity.columns, -1)[..., :k]
    if granularity.rows is None:
        scale = scale.unsqueeze(-2)
    elif granularity.rows > 1:
        scale = scale.repeat_interleave(granularity.rows, -2)[..., :n, :]
    return scale.expand(*shape)


def block_amax(x: Tensor, granularity: Granularity) -> Tensor:
    """max |x| of the elements that share a scale, NaN ignored: [..., N, K] -> granularity.scale_shape."""
    magnitude = torch.where(torch.isnan(x), 0.0, x.abs())
    if x.numel() == 0:  # no rows: amax refuses to reduce nothing
        return x.new_zeros(granularity.scale_shape(x.shape))
    for dim, block in ((-1, granularity.columns), (-2, granularity.rows)):
        if block is None:
            magnitude = magnitude.amax(dim, keepdim=True)
        elif block > 1:
            magnitude = _pad(magnitude, dim, block).unflatten(dim, (-1, block)).amax(dim)
    return magnitude.reshape(granularity.scale_shape(x.shape))


def _pad(x: Tensor, dim: int, block: int) -> Tensor:
    # Zeros never win a maximum of magnitudes.
    missing = list(x.shape)
    missing[dim] = -x.shape[dim] % block
    return torch.cat((x, x.new_zeros(missing)), dim)


def _scale_for(amax: Tensor, scheme: Scheme) -> Tensor:
    # What a kernel's float32 division gives: rounding a float64 quotient of two float32 numbers once more is
    # the correctly rounded float32 quotient (53 >= 2 * 24 + 2 bits, Figueroa 1995).
    return round_to(round_to(round_to(amax, "fp32") / scheme.codes.max, "fp32"), scheme.granularity.scale)


# -- weights ----------------------------------------------------------------------------------------------------------
def quantize_weight(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Quantize weights w [E, N, K] (float64, finite).

    scale = amax / max, rounded to float32 and to the format of the scales (1 where that is 0); codes = w / scale
    rounded to the format of the codes. Returns (codes [E, N, K] of its dtype, scale float32 of scheme.scale_shape).
    """
    require_float64(w, "w")
    if not torch.isfinite(w).all():
        raise ValueError("w holds NaN or infinity; weights to be quantized must be finite")
    scale = _scale_for(block_amax(w, scheme.granularity), scheme)
    # All zero, or so small that the scale underflows: with scale 1 every code is 0, and nothing is 0/0.
    scale = torch.where(scale == 0, 1.0, scale)
    codes = encode(w / expand_scale(scale, scheme.granularity, w.shape), scheme.codes)
    return codes, encode(scale, "fp32")


def dequantize_weight(codes: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """code * scale, exactly, in float64: codes [E, N, K] or one expert's [N, K], scale of scheme.scale_shape.

    Exact, because the product of an 8-bit and a 24-bit number fits a float64.
    """
    return decode(codes, scheme.codes) * expand_scale(scale.to(torch.float64), scheme.granularity, codes.shape)


# -- activations ------------------------------------------------------------------------------------------------------
def quantize_activation(
    x: Tensor,
    scheme: Scheme,
    static_scale: float | Tensor | None = None,
    amax_floor: float = 1e-10,
    rounded: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantize activations x [M, K] (float64).

    The scale is static_scale (a positive number, one for all rows only) or max(amax, amax_floor) / max of the codes,
    each step rounded to float32; amax ignores NaN, since fmax-based kernels do. The codes are x / scale rounded to
    their format, saturating at its max. rounded=False leaves out that rounding but not the saturation, which is no
    small error that a variance could describe.

    Returns (codes, scale): float64 [M, K] both, the values of the codes and each element's scale. The dequantized x is
    codes * scale. An infinite x makes a dynamic scale infinite: codes 0, NaN where x was infinite, and NaN for
    all of them after dequantization.
    """
    require_float64(x, "x")
    granularity = scheme.granularity
    if static_scale is None:
        floor = torch.full((), amax_floor, dtype=torch.float64, device=x.device)
        scale = _scale_for(torch.maximum(block_amax(x, granularity), floor), scheme)
    else:
        if granularity.rows is not None or granularity.columns is not None:
            raise ValueError(f"{granularity}: a static scale is one for all rows and columns")
        scale = round_to(torch.as_tensor(static_scale, dtype=torch.float64, device=x.device), "fp32")
        if scale.dim() != 0 or not 0 < scale < torch.inf:
            raise ValueError(f"static_scale is {static_scale}; valid is one positive finite number")
    scale = expand_scale(scale, granularity, x.shape)
    return saturated(x / scale, scheme, rounded), scale


def saturated(ratio: Tensor, scheme: Scheme, rounded: bool = True) -> Tensor:
    """The value of the code of x / scale; without the rounding, only as large as a code can be. float64, any shape."""
    return round_to(ratio, scheme.codes) if rounded else ratio.clamp(-scheme.codes.max, scheme.codes.max)


def code_step(ratio: Tensor, scheme: Scheme) -> Tensor:
    """The distance to the next code at x / scale, float64 of any shape; at an infinity as at the largest code."""
    largest = scheme.codes.max
    return ulp(torch.nan_to_num(ratio.abs(), posinf=largest).clamp(max=largest), scheme.codes)


def saturates(ratio: Tensor, scheme: Scheme) -> Tensor:
    """Where x / scale is so large that a neighbour of it gets the largest code as well: bool of any shape."""
    return ratio.abs() > scheme.codes.saturates_from


def near_tie(ratio: Tensor, scheme: Scheme) -> Tensor:
    """Where the division by max, a reciprocal or a division by the scale may tip the code of x / scale."""
    inside = ratio.abs().clamp(max=scheme.codes.max)
    step = code_step(inside, scheme)
    position = inside / step
    near = (position - position.floor() - 0.5).abs() * step <= 8 * U32 * inside
    return near & (ratio.abs() < scheme.codes.saturates_from) & torch.isfinite(ratio)
