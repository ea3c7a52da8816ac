"""What a quantization scheme is: the format of the codes, the block that shares a scale, the format of the scales.

Facts and shapes only, in plain Python, so that a descriptor can be read where torch is not installed; quant.py computes
with them. A new scheme is one file that registers what is new in it:

    register_format(Format("e2m3", precision=4, emin=0, max=7.5, storage="uint8", saturates=True, bits=6))
    register_granularity("row64", Granularity(1, 64), of="weights")

and "e2m3.row64.none" is a scheme in every descriptor from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import frexp
from typing import TypeVar

T = TypeVar("T")
#: Bytes of one element of a torch dtype that stores codes or values.
ITEMSIZE = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint8": 1, "int8": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    precision counts the significant bits with the hidden one, emin is the exponent of the smallest normal number
    2^emin, max the largest finite value. A format that saturates turns everything beyond max, infinities too, into max;
    the others overflow to infinity as IEEE 754 says. storage is the name of the torch dtype that holds every value of
    the format (tf32 lives in a float32) or, for codes of less than 8 bits, one code a byte. bits is the size of a code,
    sign included; 0 for formats that only hold values. drawn is the largest code of a random layer (default: max).
    activations is the format of activations that are quantized beside weights of this one.
    """

    name: str
    precision: int
    emin: int
    max: float
    storage: str
    saturates: bool = False
    bits: int = 0
    drawn: float = 0.0
    activations: str = "e4m3"

    @property
    def largest_drawn(self) -> float:
        return self.drawn or self.max

    @property
    def sigma_drawn(self) -> float:
        """Standard deviation of random codes: nearly the whole range is used, 9.3 deviations long."""
        return self.largest_drawn * 3 / 28

    @property
    def saturates_from(self) -> float:
        """The magnitude from which a value rounds to max whatever lies beyond it: half a step above max."""
        return self.max + self.step(self.max) / 2

    def step(self, value: float) -> float:
        """The distance of neighbours at |value|; beyond max as at max."""
        exponent = frexp(min(abs(value), self.max))[1] - 1 if value else self.emin
        return 2.0 ** (max(exponent, self.emin) - self.precision + 1)

    def holds(self, value: float) -> bool:
        """Whether the format has this finite value."""
        return abs(value) <= self.max and value % self.step(value) == 0


@dataclass(frozen=True)
class Granularity:
    """Which elements of a matrix [rows, columns] share a scale: blocks of so many rows and columns, None for all.

    scale is the format of the scales. A static scale is part of the layer, one for all rows.
    """

    rows: int | None
    columns: int | None
    scale: str = "fp32"
    static: bool = False

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of [..., N, K]: a size for each of N and K that is cut into blocks."""
        *lead, n, k = shape
        return (*lead, *(-(-size // block) for size, block in ((n, self.rows), (k, self.columns)) if block is not None))


@dataclass(frozen=True)
class Scheme:
    """How one operand of a GEMM is stored: value = code * scale, a scale for every block."""

    codes: Format
    granularity: Granularity

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return self.granularity.scale_shape(shape)

    def code_bytes(self, elements: int) -> int:
        """Bytes of so many codes."""
        return elements * ITEMSIZE[self.codes.storage]


def _largest(precision: int, emax: int) -> float:
    return (2.0 - 2.0 ** (1 - precision)) * 2.0**emax


#: Every format by its name. e4m3 gives its all-ones code to NaN and has no infinity, so 448 and not 480 is its largest
#: value (Micikevicius et al. 2022, arXiv:2209.05433).
FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 24, -126, _largest(24, 127), "float32"),
        Format("tf32", 11, -126, _largest(11, 127), "float32"),
        Format("bf16", 8, -126, _largest(8, 127), "bfloat16"),
        Format("fp16", 11, -14, _largest(11, 15), "float16"),
        Format("e4m3", 4, -6, 448.0, "float8_e4m3fn", saturates=True, bits=8),
        Format("e5m2", 3, -14, 57344.0, "float8_e5m2", saturates=True, bits=8, drawn=448.0),
    )
}
#: The granularities of weights [N, K] and of activations [M, K] by their names in descriptors.
WEIGHT_GRANULARITIES = {
    "tensor": Granularity(None, None),
    "channel": Granularity(1, None),
    "block": Granularity(128, 128),
}
ACTIVATION_GRANULARITIES = {
    "static": Granularity(None, None, static=True),
    "tensor": Granularity(None, None),
    "token": Granularity(1, None),
    "group": Granularity(1, 128),
}


def weight_scheme(format: str, granularity: str) -> Scheme:
    """The scheme of quantized weights. ValueError for an unknown name."""
    return Scheme(_named("format", format, code_formats()), _named("granularity", granularity, WEIGHT_GRANULARITIES))


def activation_scheme(granularity: str, weights: str = "e4m3") -> Scheme:
    """The scheme of activations that are quantized beside weights of a format. ValueError for an unknown name."""
    codes = FORMATS[_named("format", weights, code_formats()).activations]
    return Scheme(codes, _named("granularity", granularity, ACTIVATION_GRANULARITIES))


def code_formats() -> dict[str, Format]:
    """The formats of codes."""
    return {name: format for name, format in FORMATS.items() if format.bits}


def register_format(format: Format) -> None:
    """Make a format known by its name. ValueError if there is another of that name."""
    if FORMATS.setdefault(format.name, format) != format:
        raise ValueError(f"format {format.name!r}: there is another one of that name")


def register_granularity(name: str, granularity: Granularity, of: str) -> None:
    """Make a granularity of "weights" or "activations" known by its name. ValueError if there is another one."""
    tables: Mapping[str, dict[str, Granularity]] = {
        "weights": WEIGHT_GRANULARITIES,
        "activations": ACTIVATION_GRANULARITIES,
    }
    table = _named("of", of, tables)
    if table.setdefault(name, granularity) != granularity:
        raise ValueError(f"granularity {name!r} of {of}: there is another one of that name")


def power_of_two_above(value: float) -> float:
    """The smallest power of two that is not below a positive value."""
    mantissa, exponent = frexp(value)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def common_scale(values: Sequence[float], format: Format) -> float | None:
    """The smallest power of two that makes values of the format of all these by division; None if there is none."""
    scale = power_of_two_above(max(map(abs, values)) / format.max)
    return scale if all(format.holds(value / scale) for value in values) else None


def itemsize(format: str) -> int:
    """Bytes of one value of a format as it is stored."""
    return ITEMSIZE[FORMATS[format].storage]


def _named(field: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise ValueError(f"{field} is {name!r}; valid are {', '.join(table)}")
    return table[name]
