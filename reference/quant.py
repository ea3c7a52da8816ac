"""fp8 quantisation of weights and activations, each value stored as code * scale.

Granularity says which elements share a scale:

    weights [E, N, K]      "tensor"  scale [E]                              one per expert
                           "channel" scale [E, N]                           one per output channel
                           "block"   scale [E, ceil(N/128), ceil(K/128)]    one per 128 x 128 block
    activations [M, K]     "tensor"  scale []                               one for all rows
                           "token"   scale [M]                              one per row
                           "group"   scale [M, ceil(K/128)]                 one per 128 elements of a row

Blocks and groups at the end may be ragged.  Scales are float32 numbers: kernels store them so.
"""

import torch

from reference.formats import decode, encode, fmt, require_float64, round_to

BLOCK = 128
WEIGHT_GRANULARITIES = ("tensor", "channel", "block")
ACTIVATION_GRANULARITIES = ("tensor", "token", "group")


def scale_shape(granularity, shape):
    """The shape of the scale of a tensor of that shape [..., N, K]; ValueError for an unknown granularity."""
    *lead, n, k = shape
    shapes = {
        "tensor": (*lead,),
        "channel": (*lead, n),
        "token": (*lead, n),
        "group": (*lead, n, -(-k // BLOCK)),
        "block": (*lead, -(-n // BLOCK), -(-k // BLOCK)),
    }
    if granularity not in shapes:
        raise ValueError(f"granularity is {granularity!r}; valid are {', '.join(shapes)}")
    return shapes[granularity]


def expand_scale(scale, granularity, shape):
    """Give every element its scale: scale of scale_shape(granularity, shape) -> tensor of that shape [..., N, K].

    Keeps the dtype.  ValueError if the scale has another shape.
    """
    expected = scale_shape(granularity, shape)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; granularity {granularity!r} of a tensor of shape "
            f"{tuple(shape)} needs {expected}"
        )
    n, k = shape[-2:]
    if granularity == "tensor":
        scale = scale[..., None, None]
    elif granularity in ("channel", "token"):
        scale = scale[..., None]
    else:
        scale = scale.repeat_interleave(BLOCK, -1)[..., :k]
        if granularity == "block":
            scale = scale.repeat_interleave(BLOCK, -2)[..., :n, :]
    return scale.expand(*shape)


def quantize_weight(w, format, granularity):
    """Quantise weights w [E, N, K] (float64, finite) to fp8.

    scale = amax / max, rounded to float32 (1 where that is 0), codes = w / scale rounded to format ("e4m3" or
    "e5m2").  Returns (codes [E, N, K] of the fp8 dtype, scale float32 of scale_shape).
    """
    format = fmt(format)
    require_float64(w, "w")
    _require(granularity, WEIGHT_GRANULARITIES)
    if not format.saturates:
        raise ValueError(f"format is {format.name!r}; valid for quantised weights are 'e4m3' and 'e5m2'")
    if not torch.isfinite(w).all():
        raise ValueError("w holds NaN or infinity; weights to be quantised must be finite")
    scale = _divide_as_fp32(_amax(w, granularity), format.max)
    # All zero, or so small that the scale underflows: with scale 1 every code is 0, and nothing is 0/0.
    scale = torch.where(scale == 0, 1.0, scale)
    codes = encode(w / expand_scale(scale, granularity, w.shape), format)
    return codes, encode(scale, "fp32")


def dequantize_weight(codes, scale, granularity):
    """code * scale, exactly, in float64: codes fp8 [E, N, K] or one expert's [N, K], scale of scale_shape.

    Exact, because the product of a 4-bit and a 24-bit number fits a float64.
    """
    _require(granularity, WEIGHT_GRANULARITIES)
    return decode(codes) * expand_scale(scale.to(torch.float64), granularity, codes.shape)


def quantize_activation(x, granularity, static_scale=None, amax_floor=1e-10, rounded=True):
    """Quantise activations x [M, K] (float64) to e4m3.

    The scale is static_scale (a positive number, granularity "tensor" only) or max(amax, amax_floor) / 448, each
    step rounded to float32; amax ignores NaN, since fmax-based kernels do.  The codes are x / scale rounded to
    e4m3, saturating at 448.  rounded=False leaves out that rounding but not the saturation, which is no small
    error that a variance could describe.

    Returns (codes, scale): float64 [M, K] both, the e4m3 values and each element's scale.  The dequantised x is
    codes * scale.  An infinite x makes a dynamic scale infinite: codes 0, NaN where x was infinite, and NaN for
    all of them after dequantisation.
    """
    require_float64(x, "x")
    _require(granularity, ACTIVATION_GRANULARITIES)
    e4m3 = fmt("e4m3")
    if static_scale is None:
        floor = torch.full((), amax_floor, dtype=torch.float64, device=x.device)
        scale = _divide_as_fp32(torch.maximum(_amax(x, granularity), floor), e4m3.max)
    else:
        if granularity != "tensor":
            raise ValueError(f"granularity is {granularity!r}; a static scale needs 'tensor'")
        scale = round_to(torch.as_tensor(static_scale, dtype=torch.float64, device=x.device), "fp32")
        if scale.dim() != 0 or not 0 < scale < torch.inf:
            raise ValueError(f"static_scale is {static_scale}; valid is one positive finite number")
    scale = expand_scale(scale, granularity, x.shape)
    codes = x / scale
    codes = round_to(codes, e4m3) if rounded else codes.clamp(-e4m3.max, e4m3.max)
    return codes, scale


def _divide_as_fp32(amax, largest):
    # What a kernel's float32 division gives: rounding a float64 quotient of two float32 numbers once more is
    # the correctly rounded float32 quotient (53 >= 2 * 24 + 2 bits, Figueroa 1995).
    return round_to(round_to(amax, "fp32") / largest, "fp32")


def _amax(x, granularity):
    """max |x| of the elements that share a scale, NaN ignored: float64 [..., N, K] -> scale_shape."""
    magnitude = torch.where(torch.isnan(x), 0.0, x.abs())
    if x.numel() == 0:  # no rows: amax refuses to reduce nothing
        return x.new_zeros(scale_shape(granularity, x.shape))
    if granularity == "tensor":
        return magnitude.amax((-2, -1))
    if granularity in ("channel", "token"):
        return magnitude.amax(-1)
    magnitude = _pad(magnitude, -1).unflatten(-1, (-1, BLOCK)).amax(-1)
    if granularity == "block":
        magnitude = _pad(magnitude, -2).unflatten(-2, (-1, BLOCK)).amax(-2)
    return magnitude


def _pad(x, dim):
    # Zeros never win a maximum of magnitudes.
    missing = list(x.shape)
    missing[dim] = -x.shape[dim] % BLOCK
    return torch.cat((x, x.new_zeros(missing)), dim)


def _require(granularity, valid):
    if granularity not in valid:
        raise ValueError(f"granularity is {granularity!r}; valid are {', '.join(valid)}")
