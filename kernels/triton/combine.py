"""Add up a token's slots: float32, in slot order, reading only what was written."""

import torch
import triton
import triton.language as tl

from kernels.triton.routing import local_expert

BLOCK_TOKENS = 4
BLOCK_COLS = 256


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _combine_kernel(
    slots_ptr, row_of_ptr, ids_ptr, expert_map_ptr, weights_ptr, out_ptr,
    num_tokens, num_rows, top_k, K, num_experts, num_local, stride_slot, stride_out,
    GATHER: tl.constexpr, HAS_MAP: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """GATHER: the pair's row is row_of[pair], -1 if there is none. Otherwise: the pair itself, if its id is valid."""
    col_tiles = tl.cdiv(K, BLOCK_COLS)
    pid = tl.program_id(0)
    tokens = pid // col_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    cols = pid % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = tokens < num_tokens
    in_cols = (cols < K)[None, :]
    acc = tl.zeros([BLOCK_TOKENS, BLOCK_COLS], dtype=tl.float32)
    for slot in range(0, top_k):
        pairs = tokens * top_k + slot
        if GATHER:
            rows = tl.load(row_of_ptr + pairs, mask=inside, other=-1)
            valid = (rows >= 0) & (rows < num_rows)
        else:
            rows = pairs
            valid = local_expert(ids_ptr, pairs, inside, expert_map_ptr, num_experts, num_local, HAS_MAP) >= 0
        # The row of an invalid pair is uninitialized: multiplying it by a zero weight would keep its NaN.
        row_ptrs = slots_ptr + (rows.to(tl.int64) * stride_slot)[:, None] + cols[None, :]
        value = tl.load(row_ptrs, mask=valid[:, None] & in_cols, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            value *= tl.load(weights_ptr + pairs, mask=valid, other=0.0)[:, None]
        acc += value
    out = out_ptr + (tokens.to(tl.int64) * stride_out)[:, None] + cols[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & in_cols)


def moe_combine(
    slots: torch.Tensor,
    topk_ids: torch.Tensor | None,
    out: torch.Tensor,
    *,
    num_experts: int = 0,
    num_local_experts: int = 0,
    expert_map: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    row_of: torch.Tensor | None = None,
) -> None:
    """out [T, K] = sum over valid slots j, ascending, of (topk_weights[t, j] *) slots[row of (t, j)], in float32.

    slots [rows, K] with dense rows. The row of pair t * k + j is the pair itself, valid as topk_ids [T, k], num_experts
    and expert_map say; or, with row_of int32 [T, k], row_of[t, j], valid if slots has it. Invalid rows are not
    read; a token without a valid slot gets zeros. The tables must be contiguous. The caller has validated.
    """
    gather = row_of is not None
    pair_table = row_of if row_of is not None else topk_ids
    assert pair_table is not None, "either topk_ids or row_of"
    num_tokens, top_k = pair_table.shape
    k = out.shape[1]
    grid = (triton.cdiv(num_tokens, BLOCK_TOKENS) * triton.cdiv(k, BLOCK_COLS),)
    if grid[0] == 0:
        return
    _combine_kernel[grid](
        slots, pair_table, pair_table, pair_table if expert_map is None else expert_map,
        slots if topk_weights is None else topk_weights, out,
        num_tokens, slots.shape[0], top_k, k, num_experts, num_local_experts, slots.stride(0), out.stride(0),
        GATHER=gather, HAS_MAP=expert_map is not None, HAS_WEIGHT=topk_weights is not None,
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_COLS=BLOCK_COLS,
    )  # fmt: skip
