"""Quantize activations to float8_e4m3fn: x ~ code * scale, with one scale per tensor, per token or per 128 columns."""

import torch
import triton
import triton.language as tl

from kernels.checks import HIDDEN_DTYPES, require_dense_rows, require_dtype, require_one_of, require_shape

GRANULARITIES = ("tensor", "token", "group")
GROUP = 128
FP8_MAX = 448.0
#: An all-zero row must get a scale that is neither 0 (0 / 0) nor subnormal (flushed to 0 on some devices); 1e-10 is far
#: below any activation that matters.
AMAX_FLOOR = 1e-10
BLOCK_ROWS = 8
MAX_AMAX_PROGRAMS = 256

_FP8_MAX = tl.constexpr(FP8_MAX)
_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)


@triton.jit
def _load_rows(x_ptr, weight_ptr, rows, cols, stride_x, mask, in_rows, HAS_WEIGHT: tl.constexpr):
    """float32 tile of x, or of x * router_weight, which thus never exists as a tensor; 0 outside of mask."""
    x = tl.load(x_ptr + (rows.to(tl.int64) * stride_x)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        x *= tl.load(weight_ptr + rows, mask=in_rows, other=0.0)[:, None]
    return x


@triton.jit
def _magnitude(x):
    """|x| for amax, where NaN counts as 0: it stays NaN in its code and must not spread through the scale."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def _scale_of(amax):
    return tl.div_rn(tl.where(amax < _AMAX_FLOOR, _AMAX_FLOOR, amax), _FP8_MAX)


@triton.jit
def _codes_of(x, scale, dtype: tl.constexpr):
    """x / scale, saturated before the conversion, since conversions of some devices do not; NaN stays NaN."""
    y = tl.div_rn(x, scale)
    y = tl.where(y > _FP8_MAX, _FP8_MAX, tl.where(y < -_FP8_MAX, -_FP8_MAX, y))
    return y.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_span_kernel(
    x_ptr, weight_ptr, codes_ptr, scale_ptr, num_rows, K, span, stride_x,
    HAS_WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One scale per row and span of columns: span = K for tokens, 128 for groups. The second pass hits the cache."""
    spans = tl.cdiv(K, span)
    pid = tl.program_id(0)
    rows = pid // spans * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < num_rows
    first = pid % spans * span
    end = tl.minimum(first + span, K)
    amax = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for start in range(first, end, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = in_rows[:, None] & (cols < end)[None, :]
        x = _load_rows(x_ptr, weight_ptr, rows, cols, stride_x, mask, in_rows, HAS_WEIGHT)
        amax = tl.maximum(amax, tl.max(_magnitude(x), axis=1))
    scale = _scale_of(amax)
    tl.store(scale_ptr + rows.to(tl.int64) * spans + pid % spans, scale, mask=in_rows)
    for start in range(first, end, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = in_rows[:, None] & (cols < end)[None, :]
        x = _load_rows(x_ptr, weight_ptr, rows, cols, stride_x, mask, in_rows, HAS_WEIGHT)
        codes = _codes_of(x, scale[:, None], codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + (rows.to(tl.int64) * K)[:, None] + cols[None, :], codes, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_amax_kernel(
    x_ptr, weight_ptr, partial_ptr, num_rows, K, stride_x,
    HAS_WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """partial[program] = amax of this program's rows."""
    pid = tl.program_id(0)
    amax = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for first in range(pid * BLOCK_ROWS, num_rows, tl.num_programs(0) * BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        in_rows = rows < num_rows
        for start in range(0, K, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = in_rows[:, None] & (cols < K)[None, :]
            x = _load_rows(x_ptr, weight_ptr, rows, cols, stride_x, mask, in_rows, HAS_WEIGHT)
            amax = tl.maximum(amax, tl.max(_magnitude(x), axis=1))
    tl.store(partial_ptr + pid, tl.max(amax, axis=0))


@triton.jit(do_not_specialize=["num_rows", "num_partials"])
def _quantize_tensor_kernel(
    x_ptr, weight_ptr, codes_ptr, scale_ptr, partial_ptr, num_rows, num_partials, K, stride_x,
    HAS_WEIGHT: tl.constexpr, STATIC: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One scale for all: static (STATIC), or computed by every program from the partial maxima, stored by the first."""
    pid = tl.program_id(0)
    if STATIC:
        scale = tl.load(scale_ptr)
    else:
        lane = tl.arange(0, PARTIALS)
        scale = _scale_of(tl.max(tl.load(partial_ptr + lane, mask=lane < num_partials, other=0.0), axis=0))
        if pid == 0:
            tl.store(scale_ptr, scale)
    col_tiles = tl.cdiv(K, BLOCK_COLS)
    rows = pid // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = pid % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_rows = rows < num_rows
    mask = in_rows[:, None] & (cols < K)[None, :]
    x = _load_rows(x_ptr, weight_ptr, rows, cols, stride_x, mask, in_rows, HAS_WEIGHT)
    codes = _codes_of(x, scale, codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + (rows.to(tl.int64) * K)[:, None] + cols[None, :], codes, mask=mask)


def partial_amax(x: torch.Tensor, router_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Maxima of |x| (or |x * router_weight|), NaN ignored, over disjoint parts of the rows of x [M, K]: fp32 [<= 256].

    Their maximum is the amax of a dynamic per-tensor scale, which `quantize_fp8` takes as `amax`.
    """
    num_rows, k = x.shape
    programs = max(1, min(MAX_AMAX_PROGRAMS, triton.cdiv(num_rows, BLOCK_ROWS)))
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    _quantize_amax_kernel[(programs,)](
        x, x if router_weight is None else router_weight, partial, num_rows, k, x.stride(0),
        HAS_WEIGHT=router_weight is not None, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=256,
    )  # fmt: skip
    return partial


def quantize_fp8(
    x: torch.Tensor,
    granularity: str,
    static_scale: torch.Tensor | None = None,
    router_weight: torch.Tensor | None = None,
    top_k: int = 1,
    amax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [M, K], bf16, fp16 or fp32 with dense rows -> (codes float8_e4m3fn [M, K], scale float32).

    granularity "tensor": scale [1], static_scale if there is one; "token": [M]; "group": [M, ceil(K/128)].
    A dynamic scale is max(amax, AMAX_FLOOR) / 448, amax being the largest magnitude with NaN ignored: a NaN becomes a
    NaN code and changes nothing else. Codes are x / scale, rounded to nearest even, saturated at +-448.
    With router_weight (fp32, one per row; top_k must be 1) x * router_weight is what is quantized.
    amax (granularity "tensor" only): partial_amax of the tensor that the scale is to be taken from, default x itself.
    """
    require_dtype("x", x, *HIDDEN_DTYPES)
    require_dense_rows("x", x)
    require_one_of("granularity", granularity, GRANULARITIES)
    if router_weight is not None and top_k != 1:
        raise ValueError(
            f"top_k={top_k}; valid with router_weight: 1, since a row of several slots has several weights"
        )
    if static_scale is not None and granularity != "tensor":
        raise ValueError(f"granularity={granularity!r}; valid with static_scale: 'tensor'")
    if static_scale is not None:
        require_dtype("static_scale", static_scale, torch.float32)
        require_shape("static_scale", static_scale, (1,), "[1]")
    num_rows, k = x.shape
    codes = torch.empty(num_rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    weight = x if router_weight is None else router_weight
    flags = dict(HAS_WEIGHT=router_weight is not None, BLOCK_ROWS=BLOCK_ROWS)
    if granularity == "tensor":
        if static_scale is None:
            scale = torch.empty(1, dtype=torch.float32, device=x.device)
            maxima = partial_amax(x, router_weight) if amax is None else amax
        else:
            scale = maxima = static_scale  # maxima are not read then
        # With no rows one program still has to store the scale.
        grid = (max(1, triton.cdiv(num_rows, BLOCK_ROWS) * triton.cdiv(k, 256)),)
        _quantize_tensor_kernel[grid](
            x, weight, codes, scale, maxima, num_rows, maxima.numel(), k, x.stride(0),
            STATIC=static_scale is not None, PARTIALS=MAX_AMAX_PROGRAMS, BLOCK_COLS=256, **flags,
        )  # fmt: skip
        return codes, scale
    span, block_cols = (GROUP, GROUP) if granularity == "group" else (k, 512)
    spans = triton.cdiv(k, span)
    scale = torch.empty((num_rows, spans) if granularity == "group" else num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        _quantize_span_kernel[(triton.cdiv(num_rows, BLOCK_ROWS) * spans,)](
            x, weight, codes, scale, num_rows, k, span, x.stride(0), BLOCK_COLS=block_cols, **flags
        )
    return codes, scale
