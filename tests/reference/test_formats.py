"""reference.formats against ml_dtypes, over every bit pattern there is."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from reference.formats import FORMATS, Format, decode, encode, fmt, round_to, ulp

# name: (ml_dtypes or numpy type, integer type, the same bits as a torch tensor)
PEERS = {
    "bf16": (ml_dtypes.bfloat16, np.uint16, torch.bfloat16),
    "fp16": (np.float16, np.uint16, torch.float16),
    "e4m3": (ml_dtypes.float8_e4m3fn, np.uint8, torch.float8_e4m3fn),
    "e5m2": (ml_dtypes.float8_e5m2, np.uint8, torch.float8_e5m2),
}


def all_codes(name):
    """Every bit pattern of the format: (torch tensor of it, its values in float64 according to ml_dtypes)."""
    peer, integer, dtype = PEERS[name]
    bits = np.arange(2 ** (8 * np.dtype(integer).itemsize), dtype=integer)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return torch.from_numpy(bits).view(dtype), torch.from_numpy(bits.view(peer).astype(np.float64))


def same(a, b):
    """Equal, with NaN equal to NaN and -0.0 different from 0.0."""
    nan = torch.isnan(b)
    return torch.equal(torch.isnan(a), nan) and torch.equal(a[~nan].view(torch.int64), b[~nan].view(torch.int64))


def finite_values(name):
    """All finite values in ascending order, one zero."""
    values = all_codes(name)[1]
    return values[torch.isfinite(values)].unique()


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_format_of_six_bits():
    """Codes of less than a byte lie in bytes, one in each."""
    six = Format("e2m3", precision=4, emin=0, max=7.5, storage="uint8", saturates=True, bits=6)
    codes = torch.arange(64, dtype=torch.uint8)
    values = torch.from_numpy(codes.numpy().view(ml_dtypes.float6_e2m3fn).astype(np.float64))
    assert same(decode(codes, six), values) and torch.equal(encode(values, six), codes)
    assert torch.isnan(decode(torch.tensor([64, 255], dtype=torch.uint8), six)).all()
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    peer = x.clamp(-7.5, 7.5).numpy().astype(ml_dtypes.float6_e2m3fn).astype(np.float64)
    assert torch.equal(round_to(x, six), torch.from_numpy(peer)) and six.saturates_from == 7.75
    with pytest.raises(ValueError, match="x holds NaN; format 'e2m3' has no code for it"):
        encode(f64(math.nan), six)
    with pytest.raises(TypeError, match="dtype of t is torch.int8; format 'e2m3' is stored as torch.uint8"):
        decode(codes.view(torch.int8), six)


@pytest.mark.parametrize("name", PEERS)
def test_decode_every_code(name):
    codes, values = all_codes(name)
    assert same(decode(codes), values)


@pytest.mark.parametrize("name", PEERS)
def test_every_value_rounds_to_itself_and_encodes_to_its_own_code(name):
    codes, values = all_codes(name)
    finite = torch.isfinite(values)
    assert same(round_to(values[finite], name), values[finite])
    integer = torch.int16 if codes.element_size() == 2 else torch.uint8
    assert torch.equal(encode(values, name).view(integer)[finite], codes.view(integer)[finite])
    nan = torch.isnan(values)
    assert torch.isnan(round_to(values[nan], name)).all() and torch.isnan(decode(encode(values[nan], name))).all()


@pytest.mark.parametrize("name", PEERS)
def test_midpoints_go_to_the_even_neighbour_and_their_surroundings_to_the_nearer_one(name):
    values = finite_values(name)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2  # exact in float64
    step = torch.minimum((low / ulp(low, name)).abs(), (high / ulp(high, name)).abs())
    assert torch.equal(step, step.round())
    # The even neighbour is the one that is a multiple of twice the spacing between the two.
    spacing = high - low
    even = torch.where(torch.remainder(low / spacing, 2) == 0, low, high)
    assert torch.equal(round_to(middle, name), even)
    infinity = torch.full_like(middle, torch.inf)
    assert torch.equal(round_to(torch.nextafter(middle, infinity), name), high)
    assert torch.equal(round_to(torch.nextafter(middle, -infinity), name), low)
    assert torch.equal(spacing, torch.minimum(ulp(low, name), ulp(high, name)))


@pytest.mark.parametrize("name", PEERS)
def test_random_against_ml_dtypes_where_that_rounds_once(name):
    # ml_dtypes converts float64 -> fp8 and bf16 through float32 or not, as it likes: float32 inputs make it one
    # rounding.  The exponents reach from far below the smallest subnormal to far above the largest value.
    generator = np.random.default_rng(0)
    x32 = np.ldexp(generator.uniform(-2, 2, 400_000), generator.integers(-150, 127, 400_000)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(x32.astype(PEERS[name][0]).astype(np.float64))
    x = torch.from_numpy(x32.astype(np.float64))
    ours = round_to(x, name)
    if FORMATS[name].saturates:  # ml_dtypes overflows to NaN or inf
        beyond = ~torch.isfinite(expected)
        assert (x[beyond].abs() >= FORMATS[name].max).all() and (ours[beyond].abs() == FORMATS[name].max).all()
        ours, expected = ours[~beyond], expected[~beyond]
    assert same(ours, expected)
    assert same(decode(encode(x, name)), round_to(x, name))


def test_float32_against_numpy():
    generator = np.random.default_rng(1)
    x = np.ldexp(generator.uniform(-2, 2, 400_000), generator.integers(-160, 135, 400_000))
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(x.astype(np.float32).astype(np.float64))  # one rounding, by the hardware
    assert same(round_to(torch.from_numpy(x), "fp32"), expected)
    assert same(decode(encode(torch.from_numpy(x), "fp32")), expected)


def _rounded_in_fractions(x, format):
    """Round a Python float by exact rational arithmetic."""
    exponent = max(math.floor(math.log2(abs(x))), format.emin)
    for e in (exponent - 1, exponent, exponent + 1):  # log2 may be off by one next to a power of two
        if e >= format.emin and (Fraction(2) ** e <= abs(Fraction(x)) < Fraction(2) ** (e + 1) or e == format.emin):
            exponent = e
    step = Fraction(2) ** (exponent - format.precision + 1)
    return float(round(Fraction(x) / step) * step)  # Python rounds a Fraction's ties to even


@pytest.mark.parametrize("name", FORMATS)
def test_full_float64_inputs_against_rational_arithmetic(name):
    format = FORMATS[name]
    generator = np.random.default_rng(2)
    top = math.floor(math.log2(format.max))
    # Values of the format, midpoints of it, and both plus something far below float32's reach: double-rounding traps.
    steps = generator.integers(2 ** (format.precision - 1), 2**format.precision, 3000)
    x = (steps + generator.choice([0, 0.5], 3000)) * (1 + generator.choice([0, 1, -1], 3000) * 2.0**-40)
    x = np.ldexp(x, generator.integers(format.emin - format.precision - 3, top - format.precision, 3000))
    x *= generator.choice([-1, 1], 3000)
    expected = torch.tensor([_rounded_in_fractions(float(v), format) for v in x], dtype=torch.float64)
    assert torch.equal(round_to(torch.from_numpy(x), name), expected)


def test_double_rounding_trap():
    trap = f64(1 + 2**-8 + 2**-30)
    assert round_to(trap, "bf16").item() == 1 + 2**-7
    assert encode(trap, "bf16").double().item() == 1 + 2**-7
    # Why Tensor.to is not used.  Should this ever fail, torch has learnt to round once.
    assert trap.to(torch.bfloat16).item() == 1.0
    assert round_to(f64(1 + 2**-4 + 2**-40), "e4m3").item() == 1.125


@pytest.mark.parametrize(
    "name, largest, midpoint",  # midpoint between the largest value and the one that would follow it
    [
        ("fp32", 2.0**128 - 2.0**104, 2.0**128 - 2.0**103),
        ("tf32", 2.0**128 - 2.0**117, 2.0**128 - 2.0**116),
        ("bf16", 2.0**128 - 2.0**120, 2.0**128 - 2.0**119),
        ("fp16", 65504.0, 65520.0),
    ],
)
def test_overflow_follows_ieee(name, largest, midpoint):
    assert FORMATS[name].max == largest
    below = math.nextafter(midpoint, 0.0)
    x = f64(largest, below, midpoint, 1e300, math.inf, -below, -midpoint, -math.inf)
    expected = f64(largest, largest, math.inf, math.inf, math.inf, -largest, -math.inf, -math.inf)
    assert torch.equal(round_to(x, name), expected)
    assert torch.equal(decode(encode(x, name)), expected)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_saturates(name):
    largest = FORMATS[name].max
    x = f64(largest, largest * 1.04, largest * 2, 1e300, math.inf)
    assert (round_to(x, name) == largest).all() and (round_to(-x, name) == -largest).all()
    assert (decode(encode(-x, name)) == -largest).all()


def test_e4m3_subnormals_zeros_and_nan():
    x = f64(2**-10, 1.01 * 2**-10, 3 * 2**-10, -(2**-10), -0.0, 0.0, -1e-320, math.nan)
    expected = f64(0, 2**-9, 2**-8, -0.0, -0.0, 0.0, -0.0, math.nan)  # ties to even: 0 and 2 * 2^-9
    assert same(round_to(x, "e4m3"), expected)
    assert same(decode(encode(x, "e4m3")), expected)


def test_tf32_keeps_ten_fraction_bits_in_a_float32():
    x = f64(1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 2**-136, 2**-137)
    assert torch.equal(round_to(x, "tf32"), f64(1 + 2**-10, 1, 1 + 2**-9, 2**-136, 0))
    assert encode(x, "tf32").dtype == torch.float32


def test_ulp():
    x = f64(1.0, -1.99, 2.0, 448.0, 2**-6, 2**-9, 0.0, math.inf, math.nan)
    assert same(ulp(x, "e4m3"), f64(0.125, 0.125, 0.25, 32, 2**-9, 2**-9, 2**-9, math.inf, math.nan))
    assert ulp(f64(1.0), "bf16").item() == 2**-7 and ulp(f64(math.nextafter(1.0, 0.0)), "bf16").item() == 2**-8


def test_shapes_and_views_are_kept():
    x = torch.randn(3, 5, 7, dtype=torch.float64).transpose(0, 2)
    for name in FORMATS:
        assert encode(x, name).shape == x.shape and torch.equal(decode(encode(x, name)), round_to(x, name))
        assert torch.equal(decode(encode(x, name).transpose(0, 1)), round_to(x, name).transpose(0, 1))
        assert decode(encode(x[:0], name)).shape == x[:0].shape
        assert round_to(x[0, 0, 0], name).shape == ()


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_the_accelerator_agrees_with_the_cpu():
    device = torch.accelerator.current_accelerator()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(100_000, dtype=torch.float64, generator=generator)
    x = x * torch.exp2(torch.randint(-150, 128, x.shape, generator=generator).double())
    x = torch.cat((x, f64(1 + 2**-8 + 2**-30, 0.0, -0.0, 2.0**-1074, math.inf, -math.inf, math.nan)))
    for name in FORMATS:
        assert same(round_to(x.to(device), name).cpu(), round_to(x, name))
        assert same(ulp(x.to(device), name).cpu(), ulp(x, name))
        assert same(decode(encode(x.to(device), name)).cpu(), round_to(x, name))


def test_errors_name_the_field_the_value_and_what_is_valid():
    with pytest.raises(ValueError, match="format is 'fp9'; valid are fp32, tf32, bf16"):
        fmt("fp9")
    with pytest.raises(TypeError, match="x is torch.float32; it must be a torch.float64"):
        round_to(torch.zeros(1), "bf16")
    with pytest.raises(TypeError, match="dtype of t is torch.float64; valid are torch.bfloat16"):
        decode(torch.zeros(1, dtype=torch.float64))
