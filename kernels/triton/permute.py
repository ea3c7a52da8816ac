"""Bring rows into expert order and back, with buffers that may be allocated once."""

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.checks import (
    HIDDEN_DTYPES,
    ID_DTYPES,
    require_dense_rows,
    require_device,
    require_dtype,
    require_expert_map,
    require_shape,
    resolve_device,
)
from kernels.triton.align import align_into, counts_shape
from kernels.triton.combine import moe_combine

BLOCK_ROWS = 4
BLOCK_COLS = 256


@triton.jit(do_not_specialize=["num_pairs"])
def _permute_rows_kernel(
    x_ptr, sorted_ptr, out_ptr, permuted_idx_ptr, inverse_ptr,
    num_pairs, K, top_k, stride_x, stride_out, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out[r] = x[token of the r-th pair], zeros behind the last pair; the first column tile writes the index tables."""
    col_tiles = tl.cdiv(K, BLOCK_COLS)
    pid = tl.program_id(0)
    rows = pid // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_tile = pid % col_tiles
    inside = rows < num_pairs
    pairs = tl.load(sorted_ptr + rows, mask=inside, other=0)
    valid = inside & (pairs < num_pairs)
    if col_tile == 0:
        tl.store(permuted_idx_ptr + rows, tl.where(valid, pairs, -1), mask=inside)
        tl.store(inverse_ptr + pairs, rows, mask=valid)
    cols = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_cols = (cols < K)[None, :]
    x_ptrs = x_ptr + ((pairs // top_k).to(tl.int64) * stride_x)[:, None] + cols[None, :]
    x = tl.load(x_ptrs, mask=valid[:, None] & in_cols, other=0.0)
    tl.store(out_ptr + (rows.to(tl.int64) * stride_out)[:, None] + cols[None, :], x, mask=inside[:, None] & in_cols)


@dataclasses.dataclass(frozen=True)
class PermuteResult:
    """Rows by local expert, tokens in ascending order within one; P = T * k rows, the valid ones first.

    hidden_states [P, K]; rows behind the valid ones are zeros.
    expert_first_token_offset int64 [E + 1]: expert e has rows offset[e] .. offset[e + 1]; the last is the number of
    valid rows. permuted_idx int32 [P]: the pair of each row. inv_permuted_idx int32 [T, k]: the row of each pair.
    expert_ids int32 [P]: the local expert of each row. All of them are -1 where there is none.
    """

    hidden_states: torch.Tensor
    expert_first_token_offset: torch.Tensor
    permuted_idx: torch.Tensor
    inv_permuted_idx: torch.Tensor
    expert_ids: torch.Tensor


class MoEPermuteScratch:
    """Every buffer of moe_permute, allocated once, for at most max_num_tokens tokens of top_k slots each.

    With hidden_size and hidden_dtype the permuted rows, too, live here; otherwise moe_permute allocates them. Results
    of moe_permute are slices of these buffers: the next call overwrites them, and addresses never change.
    """

    def __init__(
        self,
        max_num_tokens: int,
        top_k: int,
        num_experts: int,
        num_local_experts: int | None = None,
        *,
        device: torch.device | str,
        hidden_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ):
        self.max_num_tokens, self.top_k, self.num_experts = max_num_tokens, top_k, num_experts
        self.num_local_experts = num_experts if num_local_experts is None else num_local_experts
        self.hidden_size, self.hidden_dtype = hidden_size, hidden_dtype
        for name in ("max_num_tokens", "top_k", "num_experts", "num_local_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; valid: 1 or more")
        if self.num_local_experts > num_experts:
            raise ValueError(f"num_local_experts={num_local_experts}; valid: at most num_experts={num_experts}")
        if (hidden_size is None) != (hidden_dtype is None):
            raise ValueError(f"hidden_size={hidden_size}, hidden_dtype={hidden_dtype}; valid: both or neither")
        if hidden_dtype is not None and hidden_dtype not in HIDDEN_DTYPES:
            raise ValueError(f"hidden_dtype={hidden_dtype}; valid: {', '.join(map(str, HIDDEN_DTYPES))}")
        self.device = resolve_device(device)
        rows = max_num_tokens * top_k

        def table(*shape, dtype=torch.int32):
            return torch.empty(shape, dtype=dtype, device=self.device)

        self.dense_topk_ids = table(max_num_tokens, top_k, dtype=torch.int64)  # for ids that come strided
        self.counts = table(*counts_shape(self.num_local_experts))
        self.sorted_token_ids = table(rows)
        self.expert_ids = table(rows)
        self.num_rows = table(1)
        self.expert_first_token_offset = table(self.num_local_experts + 1, dtype=torch.int64)
        self.permuted_idx = table(rows)
        self.inv_permuted_idx = table(max_num_tokens, top_k)
        self.hidden_states = None if hidden_size is None else table(rows, hidden_size, dtype=hidden_dtype)

    def validate(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """ValueError unless a batch fits: device, dtype, top_k, number of tokens, hidden size, contiguous buffers."""
        for name, tensor in (("hidden_states", hidden_states), ("topk_ids", topk_ids)):
            if tensor.ndim != 2:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}; valid: two dimensions")
            if tensor.device != self.device:
                raise ValueError(f"{name}: device {tensor.device}; valid: {self.device}, where the scratch is")
        if topk_ids.dtype not in ID_DTYPES:
            raise ValueError(f"topk_ids: dtype {topk_ids.dtype}; valid: {', '.join(map(str, ID_DTYPES))}")
        if topk_ids.shape[1] != self.top_k:
            raise ValueError(f"top_k={topk_ids.shape[1]}; valid: {self.top_k}, which the scratch was made for")
        if topk_ids.shape[0] > self.max_num_tokens:
            raise ValueError(f"num_tokens={topk_ids.shape[0]}; valid: at most max_num_tokens={self.max_num_tokens}")
        if self.hidden_size is not None and hidden_states.shape[1] != self.hidden_size:
            raise ValueError(f"hidden_size={hidden_states.shape[1]}; valid: {self.hidden_size}, as the scratch has")
        if self.hidden_dtype is not None and hidden_states.dtype != self.hidden_dtype:
            raise ValueError(
                f"hidden_states: dtype {hidden_states.dtype}; valid: {self.hidden_dtype}, as the scratch has"
            )
        for name, buffer in vars(self).items():
            if isinstance(buffer, torch.Tensor) and not (buffer.is_contiguous() and buffer.device == self.device):
                raise ValueError(
                    f"scratch.{name}: stride {buffer.stride()} on {buffer.device}; valid: contiguous on {self.device}"
                )


def moe_permute(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    *,
    expert_map: torch.Tensor | None = None,
    scratch: MoEPermuteScratch | None = None,
    num_local_experts: int | None = None,
) -> PermuteResult:
    """Gather rows of hidden_states [T, K] (dense rows) by local expert of topk_ids [T, k] int32 or int64.

    expert_map int32 [num_experts] -> local expert or -1; invalid pairs get no row. The number of local experts is that
    of the scratch, or num_local_experts, or num_experts without a map; with a map alone it is max(expert_map) + 1,
    which waits for the device. With a scratch that holds hidden states nothing is allocated.
    TypeError, ValueError: see `MoEPermuteScratch.validate`. The inputs are not written.
    """
    _validate(hidden_states, topk_ids, num_experts, expert_map)
    if scratch is None:
        if num_local_experts is None:
            num_local_experts = num_experts if expert_map is None else max(1, int(expert_map.max()) + 1)
        scratch = MoEPermuteScratch(
            max(1, topk_ids.shape[0]), topk_ids.shape[1], num_experts, num_local_experts, device=hidden_states.device
        )
    elif scratch.num_experts != num_experts:
        raise ValueError(f"num_experts={num_experts}; valid: {scratch.num_experts}, which the scratch was made for")
    elif num_local_experts not in (None, scratch.num_local_experts):
        raise ValueError(
            f"num_local_experts={num_local_experts}; valid: {scratch.num_local_experts}, as the scratch has"
        )
    scratch.validate(hidden_states, topk_ids)

    num_tokens, top_k = topk_ids.shape
    if not topk_ids.is_contiguous():
        topk_ids = scratch.dense_topk_ids[:num_tokens].copy_(topk_ids)
    k = hidden_states.shape[1]
    rows = num_tokens * top_k
    if scratch.hidden_states is None:
        permuted = torch.empty(rows, k, dtype=hidden_states.dtype, device=hidden_states.device)
    else:
        permuted = scratch.hidden_states[:rows]
    result = PermuteResult(
        permuted, scratch.expert_first_token_offset, scratch.permuted_idx[:rows], scratch.inv_permuted_idx[:num_tokens],
        scratch.expert_ids[:rows],
    )  # fmt: skip
    order = scratch.sorted_token_ids[:rows]
    # The permutation is the alignment to blocks of one row.
    align_into(
        topk_ids, 1, num_experts, scratch.num_local_experts, expert_map, False,
        scratch.counts, order, result.expert_ids, scratch.num_rows, result.expert_first_token_offset,
    )  # fmt: skip
    if rows:
        result.inv_permuted_idx.fill_(-1)  # pairs that get no row are written by nobody else
        _permute_rows_kernel[(triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(k, BLOCK_COLS),)](
            hidden_states, order, permuted, result.permuted_idx, result.inv_permuted_idx,
            rows, k, top_k, hidden_states.stride(0), permuted.stride(0), BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS,
        )  # fmt: skip
    return result


def _validate(hidden_states, topk_ids, num_experts, expert_map):
    require_dtype("hidden_states", hidden_states, *HIDDEN_DTYPES)
    require_dtype("topk_ids", topk_ids, *ID_DTYPES)
    if hidden_states.ndim != 2 or topk_ids.ndim != 2 or hidden_states.shape[0] != topk_ids.shape[0]:
        raise ValueError(
            f"topk_ids: shape {tuple(topk_ids.shape)} with hidden_states {tuple(hidden_states.shape)}; "
            "valid: [T, k] with [T, K]"
        )
    require_dense_rows("hidden_states", hidden_states)
    require_device("topk_ids", topk_ids, hidden_states.device)
    require_expert_map(expert_map, num_experts, hidden_states.device)


def moe_unpermute(
    permuted_out: torch.Tensor,
    topk_weights: torch.Tensor | None,
    inv_permuted_idx: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out [T, K] = sum over slots j of topk_weights[t, j] * permuted_out[inv_permuted_idx[t, j]], in float32.

    permuted_out [P, K] with dense rows; topk_weights float32 [T, k], or None for ones; inv_permuted_idx int32 [T, k],
    -1 for no row. out, if not None, has permuted_out's dtype and dense rows, and is returned.
    """
    require_dtype("permuted_out", permuted_out, *HIDDEN_DTYPES)
    require_dense_rows("permuted_out", permuted_out)
    require_dtype("inv_permuted_idx", inv_permuted_idx, torch.int32)
    if permuted_out.ndim != 2 or inv_permuted_idx.ndim != 2:
        raise ValueError(
            f"inv_permuted_idx: shape {tuple(inv_permuted_idx.shape)} with permuted_out {tuple(permuted_out.shape)}; "
            "valid: [T, k] with [P, K]"
        )
    require_device("inv_permuted_idx", inv_permuted_idx, permuted_out.device)
    shape = (inv_permuted_idx.shape[0], permuted_out.shape[1])
    if topk_weights is not None:
        require_device("topk_weights", topk_weights, permuted_out.device)
        require_dtype("topk_weights", topk_weights, torch.float32)
        require_shape("topk_weights", topk_weights, tuple(inv_permuted_idx.shape), "[T, k], as inv_permuted_idx")
        topk_weights = topk_weights.contiguous()
    if out is None:
        out = torch.empty(shape, dtype=permuted_out.dtype, device=permuted_out.device)
    require_dtype("out", out, permuted_out.dtype)
    require_shape("out", out, shape, "[T, K]")
    require_device("out", out, permuted_out.device)
    require_dense_rows("out", out)
    moe_combine(permuted_out, None, out, topk_weights=topk_weights, row_of=inv_permuted_idx.contiguous())
    return out
