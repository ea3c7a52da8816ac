"""The activation between the two GEMMs: h [P, 2I] -> a [P, I], in float32, one kernel for all of them."""

import torch
import triton
import triton.language as tl

from kernels.layer import effective_limit
from kernels.triton.routing import local_expert

BLOCK_PAIRS = 8
BLOCK_COLS = 256


@triton.jit
def _sigmoid(x):
    """Without inf / inf: the exponential is at most 1. Exactly 1 from x = 17 up and exactly 0 from x = -104 down."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _gate(g, alpha, ACTIVATION: tl.constexpr):
    """act(g) for the gated activations. float32 -> float32."""
    if ACTIVATION == "silu":
        y = g * _sigmoid(g)
    elif ACTIVATION == "gelu":
        # As torch: 1 + erf cancels below g = -3, where the result is small. Portably, Triton has no erfc.
        y = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z): no cancellation where tanh is close to -1.
        y = g * _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        tl.static_assert(ACTIVATION == "swigluoai", "unknown activation")
        y = g * _sigmoid(alpha * g)
    return y


@triton.jit(do_not_specialize=["num_pairs"])
def _activate_kernel(
    h_ptr, out_ptr, ids_ptr, expert_map_ptr, num_pairs, I, num_experts, num_local, limit, alpha,  # noqa: E741
    stride_h, stride_out,
    ACTIVATION: tl.constexpr, HAS_MAP: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    num_col_tiles = tl.cdiv(I, BLOCK_COLS)
    pid = tl.program_id(0)
    pairs = pid // num_col_tiles * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    cols = pid % num_col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = pairs < num_pairs
    valid = local_expert(ids_ptr, pairs, inside, expert_map_ptr, num_experts, num_local, HAS_MAP) >= 0
    in_cols = (cols < I)[None, :]
    mask = valid[:, None] & in_cols  # h is uninitialized memory in the rows of invalid pairs
    row = h_ptr + (pairs.to(tl.int64) * stride_h)[:, None]
    if ACTIVATION == "relu2":
        x = tl.load(row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x < 0, 0.0, x)
        a = x * x
    else:
        if ACTIVATION == "swigluoai":
            g_ptrs, u_ptrs = row + 2 * cols[None, :], row + 2 * cols[None, :] + 1
        else:
            g_ptrs, u_ptrs = row + cols[None, :], row + I + cols[None, :]
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptrs, mask=mask, other=0.0).to(tl.float32)
        # A comparison with NaN is false, so that clamping by selection keeps NaN on every device; limit may be inf.
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        if ACTIVATION == "swigluoai":
            u += 1.0
        a = _gate(g, alpha, ACTIVATION) * u
    out = out_ptr + (pairs.to(tl.int64) * stride_out)[:, None] + cols[None, :]
    tl.store(out, tl.where(mask, a, 0.0).to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_cols)


def activate(
    h: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    limit: float | None,
    alpha: float,
    topk_ids: torch.Tensor,
    *,
    num_experts: int,
    num_local_experts: int,
    expert_map: torch.Tensor | None = None,
) -> None:
    """out [P, I] = activation(h [P, 2I]; relu2: [P, I]), each computed in float32 and rounded once to out's dtype.

    g, u are the halves of a row (swigluoai: its even and odd columns); g is cut at limit, u at +-limit (default: 7 for
    swigluoai, none otherwise). silu, gelu (erf), gelu_tanh: act(g) * u; swigluoai: g * sigmoid(alpha g) * (u + 1);
    relu2: relu(h)^2. NaN stays NaN.
    Rows of invalid pairs (topk_ids, P ids, contiguous) are not read; they are written as zeros, so that what follows
    (amax, quantization) may read all rows.
    """
    limit = effective_limit(activation, limit)
    num_pairs, size = out.shape
    grid = (triton.cdiv(num_pairs, BLOCK_PAIRS) * triton.cdiv(size, BLOCK_COLS),)
    if grid[0] == 0:
        return
    _activate_kernel[grid](
        h, out, topk_ids, topk_ids if expert_map is None else expert_map, num_pairs, size, num_experts,
        num_local_experts, float("inf" if limit is None else limit), float(alpha), h.stride(0), out.stride(0),
        ACTIVATION=activation, HAS_MAP=expert_map is not None, BLOCK_PAIRS=BLOCK_PAIRS, BLOCK_COLS=BLOCK_COLS,
    )  # fmt: skip
