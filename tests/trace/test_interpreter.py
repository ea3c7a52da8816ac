"""The mended interpreter against ml_dtypes: every bit pattern upwards, every tie and every edge downwards."""

import tests.support.interpreted  # isort: skip  # noqa: F401

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from harness.trace import interpreter

NUMPY = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.float16: np.float16,
}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
NARROW = tuple(NUMPY)


@triton.jit
def _copy(src, dst, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dst + i, tl.load(src + i, mask=i < n).to(dst.dtype.element_ty), mask=i < n)


@triton.jit
def _multiply(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision="ieee"))


@triton.jit
def _arithmetic(a, b, total, quotient, less, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(total + i, x + y)
    tl.store(quotient + i, tl.maximum(x * y, -y))
    tl.store(less + i, (x < y).to(tl.int32))


def convert(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, converted by a Triton kernel."""
    out = torch.empty(x.shape, dtype=dtype)
    _copy[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), BLOCK=4096)
    return out


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    bits = dtype.itemsize * 8
    patterns = np.arange(2**bits, dtype=np.uint32).astype(f"uint{bits}")
    return torch.from_numpy(patterns).view(dtype)


def in_numpy(x: torch.Tensor) -> np.ndarray:
    held = NUMPY.get(x.dtype)
    if held is None or held is np.float16:
        return x.numpy()
    return x.view(torch.uint8 if x.dtype.itemsize == 1 else torch.uint16).numpy().view(held)


def same(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal values and equal signs of zero; any NaN is as good as another."""
    a, b = in_numpy(ours).astype(np.float64), theirs.astype(np.float64)
    nan = np.isnan(b)
    np.testing.assert_array_equal(np.isnan(a), nan)
    np.testing.assert_array_equal(a[~nan], b[~nan])
    np.testing.assert_array_equal(np.signbit(a[~nan]), np.signbit(b[~nan]))


def edges(dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers around every decision of a conversion to dtype: its values, the midpoints between neighbours, the
    float32 next to each, and what lies beyond the largest."""
    values = in_numpy(every_pattern(dtype)).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    midpoints = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    top = values[-1].astype(np.float64)
    with np.errstate(over="ignore"):
        beyond = np.array([top * f for f in (1.001, 1.0625, 1.125, 1.5, 2, 1e6)], dtype=np.float32)
    points = np.concatenate([values, midpoints, beyond, -beyond])
    with np.errstate(over="ignore", under="ignore"):
        neighbours = [np.nextafter(points, np.float32(s)) for s in (-np.inf, np.inf)]
    tiny = np.float32([1e-45, 1e-40, 2**-10, 2**-11, 2**-17, 2**-18, 1.1754944e-38])
    special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 500.0, 6e4, 7e4, 3.4e38])
    return torch.from_numpy(np.concatenate([points, *neighbours, tiny, -tiny, special]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_widening_is_exact(dtype):
    x = every_pattern(dtype)
    with np.errstate(invalid="ignore"):
        same(convert(x, torch.float32), in_numpy(x).astype(np.float32))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrowing_rounds_to_nearest_even(dtype):
    x = edges(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.numpy()
        if dtype in LARGEST:
            expected = np.clip(expected, -LARGEST[dtype], LARGEST[dtype])
        same(convert(x, dtype), expected.astype(NUMPY[dtype]))


@pytest.mark.parametrize("source", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_narrow_to_fp8(source, dtype):
    x = every_pattern(source)
    wide = in_numpy(x).astype(np.float32)
    with np.errstate(invalid="ignore"):
        same(convert(x, dtype), np.clip(wide, -LARGEST[dtype], LARGEST[dtype]).astype(NUMPY[dtype]))


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_fp8_saturates_and_keeps_nan(dtype):
    out = convert(torch.tensor([1e30, -1e30, torch.inf, -torch.inf, torch.nan]), dtype).float()
    top = LARGEST[dtype]
    assert out[:4].tolist() == [top, -top, top, -top] and out[4].isnan()


def test_integers_and_bf16():
    whole = torch.arange(-300, 300, dtype=torch.int32)
    same(convert(whole, torch.bfloat16), in_numpy(whole.to(torch.bfloat16)))
    assert convert(torch.tensor([-3.75, 200.0]).bfloat16(), torch.int32).tolist() == [-3, 200]


@pytest.mark.parametrize(
    ("left", "right"),
    [(d, d) for d in (*NARROW, torch.float32)] + [(torch.float8_e4m3fn, torch.float8_e5m2)],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_dot_sums_in_float32(left, right):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(32, 64, generator=generator).to(left)
    b = torch.randn(64, 16, generator=generator).to(right)
    c = torch.empty(32, 16)
    _multiply[(1,)](a, b, c, M=32, N=16, K=64)
    exact = a.double() @ b.double()
    bound = 64 * 2.0**-24 * (a.double().abs() @ b.double().abs())
    assert ((c.double() - exact).abs() <= bound).all()


def test_bf16_operators_round_once():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    total, larger, less = torch.empty_like(a), torch.empty_like(a), torch.empty(256, dtype=torch.int32)
    _arithmetic[(1,)](a, b, total, larger, less, BLOCK=256)
    assert torch.equal(total, a + b)
    assert torch.equal(larger, torch.maximum(a * b, -b))
    assert torch.equal(less.bool(), a < b)


def test_launches_from_threads():
    sizes = [4096 * n + 7 for n in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda n: convert(torch.ones(n), torch.bfloat16), sizes)
        assert [int(r.float().sum()) for r in results] == [int(torch.ones(n).sum()) for n in sizes]


def test_usable_and_idempotent():
    cast = triton.runtime.interpreter.InterpreterBuilder.cast_impl
    interpreter.enable()
    assert triton.runtime.interpreter.InterpreterBuilder.cast_impl is cast
    assert interpreter.usable() is None
