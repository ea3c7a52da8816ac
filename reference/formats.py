"""Floating-point formats and the one correct way to round a float64 tensor to them.

`Tensor.to` cannot be that way: from float64 to a 16-bit or 8-bit type it goes through float32 and so rounds
twice. 1 + 2^-8 + 2^-30 lies above the midpoint of the bfloat16 neighbours 1 and 1 + 2^-7; rounded to float32
first it falls onto that midpoint, and the tie then goes down to 1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from reference.scheme import FORMATS, Format

__all__ = ["FORMATS", "Format", "decode", "encode", "fmt", "round_to", "torch_dtype", "truncate_to", "ulp"]

#: torch dtypes that say by themselves which format they hold. Codes of other formats are bytes.
_BY_DTYPE = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2",
}  # fmt: skip


def torch_dtype(format: str | Format) -> torch.dtype:
    """The dtype that stores the format."""
    return getattr(torch, fmt(format).storage)


def fmt(name: str | Format) -> Format:
    """The Format of that name; a Format is returned as it is. ValueError for an unknown name."""
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; valid are {', '.join(FORMATS)}")
    return FORMATS[name]


def require_float64(x: object, field: str) -> None:
    """TypeError unless x is a float64 tensor: the oracle never computes in anything narrower."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float64:
        found = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{field} is {found}; it must be a torch.float64 tensor")


def round_to(x: Tensor, format: str | Format) -> Tensor:
    """Round float64 x of any shape to the nearest value of format, ties to even (IEEE 754, section 4.3.1).

    Returns float64 of the same shape. One rounding, subnormals included. NaN stays NaN and -0.0 stays -0.0,
    also where a negative number underflows. Beyond the largest value: see Format.
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


def truncate_to(x: Tensor, format: str | Format) -> Tensor:
    """Float64 x of any shape, rounded toward zero to format: what is left where a unit ignores the lower bits.

    Returns float64 of the same shape; NaN and infinities stay, and so does what lies beyond the largest value."""
    require_float64(x, "x")
    step = ulp(x, format)
    return torch.where(torch.isfinite(x), torch.trunc(x / step) * step, x)


def ulp(x: Tensor, format: str | Format) -> Tensor:
    """The spacing of format at |x|, 2^(max(floor(log2|x|), emin) - precision + 1), for float64 x of any shape.

    Returns float64 of the same shape. The spacing at 0 is the smallest subnormal; beyond the largest value it
    goes on growing as if there were no largest value; at an infinity it is inf and at NaN it is NaN.
    """
    format = fmt(format)
    require_float64(x, "x")
    finite = torch.where(torch.isfinite(x), x, 0.0)
    exponent = torch.frexp(finite).exponent - 1  # frexp's mantissa is in [1/2, 1), hence floor(log2|x|)
    exponent = torch.where(finite == 0, format.emin, exponent).clamp(min=format.emin)
    return torch.where(torch.isfinite(x), _power_of_two(exponent - format.precision + 1), x.abs())


def encode(x: Tensor, format: str | Format) -> Tensor:
    """Round float64 x and store it: a tensor of torch_dtype(format), same shape; decode(encode(x)) == round_to(x).

    NaN becomes a NaN code, its sign and payload unspecified. ValueError for NaN in a format of codes that has none.
    """
    format = fmt(format)
    rounded = round_to(x, format)
    if not format.bits:
        # Exact: every value of bf16, fp16, tf32 and fp32, subnormals included, is a float32, so neither the
        # conversion to float32 nor the one from there changes anything.
        return rounded.to(torch_dtype(format))
    # The codes 0, 1, 2, ... of the non-negative finite values are in ascending order of value, so the place at
    # which an (exactly present) value is found is its code; the sign is the highest bit.
    half = 2 ** (format.bits - 1)
    values = _code_values(format).to(x.device)[:half]
    magnitudes = values[: int((values <= format.max).sum())].contiguous()
    codes = torch.searchsorted(magnitudes, rounded.abs().contiguous(), out_int32=True)
    nan = torch.isnan(rounded)
    if len(magnitudes) == half and nan.any():
        raise ValueError(f"x holds NaN; format {format.name!r} has no code for it")
    codes = torch.where(nan, half - 1, codes) + half * torch.signbit(rounded)
    return codes.to(torch.uint8).view(torch_dtype(format))


def decode(t: Tensor, format: str | Format | None = None) -> Tensor:
    """The values of a tensor as float64, exactly.

    format is that of the codes; None for a dtype that says it: bfloat16, float16, float32, float8_e4m3fn, float8_e5m2.
    """
    if format is None:
        if t.dtype not in _BY_DTYPE:
            valid = ", ".join(sorted(map(str, _BY_DTYPE)))
            raise TypeError(f"dtype of t is {t.dtype}; valid are {valid}")
        format = _BY_DTYPE[t.dtype]
    format = fmt(format)
    if t.dtype != torch_dtype(format):
        raise TypeError(f"dtype of t is {t.dtype}; format {format.name!r} is stored as {torch_dtype(format)}")
    if not format.bits:
        return t.to(torch.float64)  # widening is exact
    return _code_values(format).to(t.device)[t.contiguous().view(torch.uint8).int()]


def _power_of_two(exponent: Tensor) -> Tensor:
    # Written as bits, because a device's pow or exp2 may be off by an ulp, and because torch.ldexp takes its
    # power in float32. Every exponent asked for here is inside float64's normal range -1022 .. 1023.
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


@functools.cache
def _code_values(format: Format) -> Tensor:
    """The values of a format of codes by code, float64 on the CPU; NaN for bytes that are no code.

    Sign, exponent, mantissa, as in Micikevicius et al. 2022, arXiv:2209.05433, and in the OCP Microscaling Formats
    (MX) Specification 1.0, section 5.3. Above max lie NaN and, in e5m2 as in IEEE 754, an infinity.
    """
    mantissa_bits = format.precision - 1
    half = 2 ** (format.bits - 1)
    top_exponent = half // 2**mantissa_bits - 1
    values = []
    for code in range(half):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        if exponent == 0:
            value = mantissa * 2.0 ** (format.emin - mantissa_bits)
        else:
            value = (2**mantissa_bits + mantissa) * 2.0 ** (exponent - 1 + format.emin - mantissa_bits)
        if value > format.max:
            ieee = format.name == "e5m2" and mantissa == 0 and exponent == top_exponent
            value = torch.inf if ieee else torch.nan
        values.append(value)
    strange = [torch.nan] * (256 - 2 * half)
    return torch.tensor(values + [-v for v in values] + strange, dtype=torch.float64)
