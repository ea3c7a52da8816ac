"""Floating-point formats and the one correct way to round a float64 tensor to them.

`Tensor.to` cannot be that way: from float64 to a 16-bit or 8-bit type it goes through float32 and so rounds
twice.  1 + 2^-8 + 2^-30 lies above the midpoint of the bfloat16 neighbours 1 and 1 + 2^-7; rounded to float32
first it falls onto that midpoint, and the tie then goes down to 1.
"""

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    precision counts the significant bits with the hidden one, emin is the exponent of the smallest normal
    number 2^emin, max the largest finite value.  A format that saturates turns everything beyond max,
    infinities too, into max; the others overflow to infinity as IEEE 754 says.  torch_dtype holds every value
    of the format (tf32 lives in a float32).
    """

    name: str
    precision: int
    emin: int
    max: float
    torch_dtype: torch.dtype
    saturates: bool


def _largest(precision, emax):
    return (2.0 - 2.0 ** (1 - precision)) * 2.0**emax


FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 24, -126, _largest(24, 127), torch.float32, saturates=False),
        Format("tf32", 11, -126, _largest(11, 127), torch.float32, saturates=False),
        Format("bf16", 8, -126, _largest(8, 127), torch.bfloat16, saturates=False),
        Format("fp16", 11, -14, _largest(11, 15), torch.float16, saturates=False),
        # e4m3 gives its all-ones code to NaN and has no infinity, so 448 and not 480 is the largest value.
        Format("e4m3", 4, -6, 448.0, torch.float8_e4m3fn, saturates=True),
        Format("e5m2", 3, -14, 57344.0, torch.float8_e5m2, saturates=True),
    )
}
_FP8 = {f.torch_dtype: f for f in FORMATS.values() if f.saturates}


def fmt(name):
    """The Format of that name; a Format is returned as it is.  ValueError for an unknown name."""
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; valid are {', '.join(FORMATS)}")
    return FORMATS[name]


def require_float64(x, field):
    """TypeError unless x is a float64 tensor: the oracle never computes in anything narrower."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float64:
        found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{field} is {found}; it must be a torch.float64 tensor")


def round_to(x, format):
    """Round float64 x of any shape to the nearest value of format, ties to even (IEEE 754, section 4.3.1).

    Returns float64 of the same shape.  One rounding, subnormals included.  NaN stays NaN and -0.0 stays -0.0,
    also where a negative number underflows.  Beyond the largest value: see Format.
    """
    format = fmt(format)
    require_float64(x, "x")
    step = ulp(x, format)
    # Dividing and multiplying by a power of two is exact here, so torch.round (ties to even) is the one rounding.
    # Infinities and NaN have no step: inf/inf would make NaN of an infinity, hence the `where`.
    rounded = torch.where(torch.isfinite(x), torch.round(x / step) * step, x)
    if format.saturates:
        rounded = rounded.clamp(-format.max, format.max)  # clamp keeps NaN
    else:
        # Rounding past max means x was at least half a step above it, which is IEEE's rule for overflow.
        rounded = torch.where(rounded.abs() > format.max, torch.copysign(torch.full_like(x, torch.inf), x), rounded)
    return torch.copysign(rounded, x)  # the sign of a zero is not left to the device's rounding instruction


def truncate_to(x, format):
    """Float64 x of any shape, rounded toward zero to format: what is left where a unit ignores the lower bits.

    Returns float64 of the same shape; NaN and infinities stay, and so does what lies beyond the largest value."""
    require_float64(x, "x")
    step = ulp(x, format)
    return torch.where(torch.isfinite(x), torch.trunc(x / step) * step, x)


def ulp(x, format):
    """The spacing of format at |x|, 2^(max(floor(log2|x|), emin) - precision + 1), for float64 x of any shape.

    Returns float64 of the same shape.  The spacing at 0 is the smallest subnormal; beyond the largest value it
    goes on growing as if there were no largest value; at an infinity it is inf and at NaN it is NaN.
    """
    format = fmt(format)
    require_float64(x, "x")
    finite = torch.where(torch.isfinite(x), x, 0.0)
    exponent = torch.frexp(finite).exponent - 1  # frexp's mantissa is in [1/2, 1), hence floor(log2|x|)
    exponent = torch.where(finite == 0, format.emin, exponent).clamp(min=format.emin)
    return torch.where(torch.isfinite(x), _power_of_two(exponent - format.precision + 1), x.abs())


def encode(x, format):
    """Round float64 x and store it: a tensor of format.torch_dtype, same shape; decode(encode(x)) == round_to(x).

    NaN becomes a NaN code, its sign and payload unspecified.
    """
    format = fmt(format)
    rounded = round_to(x, format)
    if format.torch_dtype not in _FP8:
        # Exact: every value of bf16, fp16, tf32 and fp32, subnormals included, is a float32, so neither the
        # conversion to float32 nor the one from there changes anything.
        return rounded.to(format.torch_dtype)
    # The codes 0, 1, 2, ... of the non-negative finite values are in ascending order of value, so the place at
    # which an (exactly present) value is found is its code; the sign is the eighth bit.
    values = _fp8_values(format).to(x.device)
    magnitudes = values[: int((values[:128] <= format.max).sum())].contiguous()
    codes = torch.searchsorted(magnitudes, rounded.abs().contiguous(), out_int32=True)
    codes = torch.where(torch.isnan(rounded), 0x7F, codes) + 128 * torch.signbit(rounded)
    return codes.to(torch.uint8).view(format.torch_dtype)


def decode(t):
    """The values of a bfloat16, float16, float32, float8_e4m3fn or float8_e5m2 tensor as float64, exactly."""
    if t.dtype in _FP8:
        return _fp8_values(_FP8[t.dtype]).to(t.device)[t.contiguous().view(torch.uint8).int()]
    valid = {f.torch_dtype for f in FORMATS.values()}
    if t.dtype not in valid:
        raise TypeError(f"dtype of t is {t.dtype}; valid are {', '.join(sorted(str(d) for d in valid))}")
    return t.to(torch.float64)  # widening is exact


def _power_of_two(exponent):
    # Written as bits, because a device's pow or exp2 may be off by an ulp, and because torch.ldexp takes its
    # power in float32.  Every exponent asked for here is inside float64's normal range -1022 .. 1023.
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


@functools.cache
def _fp8_values(format):
    """The 256 values of an fp8 format by code, float64 on the CPU.  Micikevicius et al. 2022, arXiv:2209.05433."""
    mantissa_bits = format.precision - 1
    top_exponent = 2 ** (7 - mantissa_bits) - 1
    values = []
    for code in range(128):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        if exponent == 0:
            value = mantissa * 2.0 ** (format.emin - mantissa_bits)
        else:
            value = (2**mantissa_bits + mantissa) * 2.0 ** (exponent - 1 + format.emin - mantissa_bits)
        if value > format.max:  # e4m3: one NaN; e5m2: as in IEEE 754, an infinity and then NaN
            value = torch.inf if format.name == "e5m2" and mantissa == 0 and exponent == top_exponent else torch.nan
        values.append(value)
    return torch.tensor(values + [-v for v in values], dtype=torch.float64)
