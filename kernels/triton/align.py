"""Sort pairs by expert and pad every expert to whole blocks: a counting sort, stable and without atomics.

The pairs are cut into at most MAX_CHUNKS chunks. Three launches:

    count    each chunk counts its pairs per expert
    offsets  where each expert begins, padded, and within it where each chunk begins
    scatter  each chunk puts its pairs in place, in order

"Bins" are the local experts; invalid pairs, if they are wanted at all, go into one more bin at the end.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import ID_DTYPES, require_dtype, require_expert_map
from kernels.triton.routing import local_expert

MAX_CHUNKS = 64
BLOCK_PAIRS = 128
MIN_CHUNK = 8 * BLOCK_PAIRS


@triton.jit
def _bins_of(
    topk_ids_ptr, pairs, inside, expert_map_ptr, num_experts, num_local,
    HAS_MAP: tl.constexpr, KEEP_INVALID: tl.constexpr,
):  # fmt: skip
    """The bin of each pair, -1 for a pair that is dropped."""
    bins = local_expert(topk_ids_ptr, pairs, inside, expert_map_ptr, num_experts, num_local, HAS_MAP)
    if KEEP_INVALID:
        bins = tl.where(inside & (bins < 0), num_local, bins)
    return bins


@triton.jit(do_not_specialize=["num_pairs", "chunk", "sorted_len", "blocks_len"])
def _align_count_kernel(
    topk_ids_ptr, expert_map_ptr, counts_ptr, sorted_ptr, block_experts_ptr,
    num_pairs, chunk, sorted_len, blocks_len, num_experts, num_local, num_bins,
    HAS_MAP: tl.constexpr, KEEP_INVALID: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_BINS: tl.constexpr,
):  # fmt: skip
    """counts[chunk, bin]. It also fills both outputs with padding, since the scatter, which comes later, only writes
    the places that hold a pair."""
    my_chunk = tl.program_id(0)
    bins = tl.program_id(1) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    first = my_chunk * chunk
    end = tl.minimum(first + chunk, num_pairs)
    count = tl.zeros([BLOCK_BINS], dtype=tl.int32)
    for start in range(first, end, BLOCK_PAIRS):
        pairs = start + tl.arange(0, BLOCK_PAIRS)
        mine = _bins_of(topk_ids_ptr, pairs, pairs < end, expert_map_ptr, num_experts, num_local, HAS_MAP, KEEP_INVALID)
        count += tl.sum((mine[None, :] == bins[:, None]).to(tl.int32), axis=1)
    tl.store(counts_ptr + my_chunk * num_bins + bins, count, mask=bins < num_bins)

    program = tl.program_id(1) * tl.num_programs(0) + my_chunk
    programs = tl.num_programs(0) * tl.num_programs(1)
    for start in range(program * BLOCK_PAIRS, sorted_len, programs * BLOCK_PAIRS):
        places = start + tl.arange(0, BLOCK_PAIRS)
        tl.store(sorted_ptr + places, tl.zeros([BLOCK_PAIRS], tl.int32) + num_pairs, mask=places < sorted_len)
        tl.store(block_experts_ptr + places, tl.full([BLOCK_PAIRS], -1, tl.int32), mask=places < blocks_len)


@triton.jit(do_not_specialize=["num_chunks"])
def _align_offsets_kernel(
    counts_ptr, total_ptr, first_ptr, num_chunks, num_bins, block_size, BINS: tl.constexpr, HAS_FIRST: tl.constexpr
):
    """counts[chunk, bin] becomes the place of the chunk's first pair in that bin; total is the padded length.

    first (int64 [num_bins + 1]), if wanted, gets the place where each bin begins, and the total.
    """
    bins = tl.arange(0, BINS)
    inside = bins < num_bins
    size = tl.zeros([BINS], dtype=tl.int32)
    for c in range(0, num_chunks):
        size += tl.load(counts_ptr + c * num_bins + bins, mask=inside, other=0)
    padded = (size + block_size - 1) // block_size * block_size
    place = tl.cumsum(padded, axis=0) - padded
    total = tl.sum(padded, axis=0)
    tl.store(total_ptr, total)
    if HAS_FIRST:
        tl.store(first_ptr + bins, place.to(tl.int64), mask=inside)
        tl.store(first_ptr + num_bins, total.to(tl.int64))
    for c in range(0, num_chunks):
        count = tl.load(counts_ptr + c * num_bins + bins, mask=inside, other=0)
        tl.store(counts_ptr + c * num_bins + bins, place, mask=inside)
        place += count


@triton.jit(do_not_specialize=["num_pairs", "chunk"])
def _align_scatter_kernel(
    topk_ids_ptr, expert_map_ptr, places_ptr, sorted_ptr, block_experts_ptr,
    num_pairs, chunk, num_experts, num_local, num_bins, block_size,
    HAS_MAP: tl.constexpr, KEEP_INVALID: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_BINS: tl.constexpr,
):  # fmt: skip
    my_chunk = tl.program_id(0)
    bins = tl.program_id(1) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    # Padding bins (>= num_bins) must match no pair, and -1 marks the pairs that are dropped.
    bins = tl.where(bins < num_bins, bins, -2)
    first = my_chunk * chunk
    end = tl.minimum(first + chunk, num_pairs)
    place = tl.load(places_ptr + my_chunk * num_bins + bins, mask=bins >= 0, other=0)
    for start in range(first, end, BLOCK_PAIRS):
        pairs = start + tl.arange(0, BLOCK_PAIRS)
        mine = _bins_of(topk_ids_ptr, pairs, pairs < end, expert_map_ptr, num_experts, num_local, HAS_MAP, KEEP_INVALID)
        here = mine[None, :] == bins[:, None]
        rank = tl.cumsum(here.to(tl.int32), axis=1)
        target = place[:, None] + rank - 1
        tl.store(sorted_ptr + target, tl.zeros_like(target) + pairs[None, :], mask=here)
        # A block exists only because its first place holds a pair, so that pair may announce the block's expert.
        expert = tl.where(bins < num_local, bins, -1)
        opens_block = here & (target % block_size == 0)
        tl.store(block_experts_ptr + target // block_size, tl.zeros_like(target) + expert[:, None], mask=opens_block)
        place += tl.sum(here.to(tl.int32), axis=1)


def aligned_length(num_pairs: int, block_size: int, num_bins: int) -> int:
    """The most places that num_pairs pairs can need: each bin that holds a pair wastes at most block_size - 1.

    A multiple of block_size. No bound on distinct experts per token is assumed: ids may repeat within a token.
    """
    return (num_pairs + min(num_pairs, num_bins) * (block_size - 1)) // block_size * block_size


def counts_shape(num_bins: int) -> tuple[int, int]:
    """Shape of the int32 work space that `align_into` needs, whatever the number of pairs."""
    return MAX_CHUNKS, num_bins


def align_into(
    topk_ids, block_size, num_experts, num_local_experts, expert_map, keep_invalid,
    counts, sorted_token_ids, expert_ids, num_tokens_post_padded, first_place=None,
):  # fmt: skip
    """`moe_align_block_size` into the caller's contiguous int32 buffers; allocates nothing.

    counts: counts_shape(bins), bins = num_local_experts + keep_invalid. sorted_token_ids: aligned_length(P, ...).
    expert_ids: that / block_size. num_tokens_post_padded [1]. first_place: None or int64 [bins + 1], gets the place
    where each bin begins. topk_ids must be contiguous.
    """
    num_pairs = topk_ids.numel()
    num_bins = num_local_experts + int(keep_invalid)
    chunk = max(MIN_CHUNK, triton.cdiv(triton.cdiv(num_pairs, MAX_CHUNKS), BLOCK_PAIRS) * BLOCK_PAIRS)
    num_chunks = max(1, triton.cdiv(num_pairs, chunk))
    flags = dict(HAS_MAP=expert_map is not None, KEEP_INVALID=bool(keep_invalid), BLOCK_PAIRS=BLOCK_PAIRS)
    block_bins = min(16, triton.next_power_of_2(num_bins))
    grid = (num_chunks, triton.cdiv(num_bins, block_bins))
    expert_map = topk_ids if expert_map is None else expert_map  # never read then
    _align_count_kernel[grid](
        topk_ids, expert_map, counts, sorted_token_ids, expert_ids, num_pairs, chunk, sorted_token_ids.numel(),
        expert_ids.numel(), num_experts, num_local_experts, num_bins, BLOCK_BINS=block_bins, **flags,
    )  # fmt: skip
    _align_offsets_kernel[(1,)](
        counts, num_tokens_post_padded, counts if first_place is None else first_place, num_chunks, num_bins,
        block_size, BINS=triton.next_power_of_2(num_bins), HAS_FIRST=first_place is not None,
    )  # fmt: skip
    _align_scatter_kernel[grid](
        topk_ids, expert_map, counts, sorted_token_ids, expert_ids, num_pairs, chunk, num_experts, num_local_experts,
        num_bins, block_size, BLOCK_BINS=block_bins, **flags,
    )  # fmt: skip


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    ignore_invalid_experts: bool = True,
    num_local_experts: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort pairs by local expert and pad each expert's pairs to a multiple of block_size.

    topk_ids int32 or int64 [T, k]; num_experts counts the ids that may occur (the length of expert_map, if any);
    num_local_experts, num_experts by default, bounds the entries of expert_map and only saves memory.
    Returns (sorted_token_ids, expert_ids, num_tokens_post_padded), all int32:

        sorted_token_ids  pairs in ascending order within their expert; padding is P = topk_ids.numel()
        expert_ids        local expert of each block of block_size places; -1 from num_tokens_post_padded on
        num_tokens_post_padded [1]  places in use

    Invalid pairs are left out, or, unless ignore_invalid_experts, stand in blocks of expert -1 behind all others.
    Every element of the outputs is written. TypeError for wrong dtypes, ValueError for wrong shapes and sizes.
    """
    require_dtype("topk_ids", topk_ids, *ID_DTYPES)
    require_expert_map(expert_map, num_experts, topk_ids.device)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}; valid: 1 or more")
    local = num_experts if num_local_experts is None else num_local_experts
    if num_experts < 1 or not 1 <= local <= num_experts:
        raise ValueError(f"num_experts={num_experts}, num_local_experts={local}; valid: 1 <= local <= num_experts")
    num_bins = local + (not ignore_invalid_experts)
    length = aligned_length(topk_ids.numel(), block_size, num_bins)

    def table(*shape):
        return torch.empty(shape, dtype=torch.int32, device=topk_ids.device)

    sorted_token_ids, expert_ids, used = table(length), table(length // block_size), table(1)
    align_into(
        topk_ids.contiguous(), block_size, num_experts, local, expert_map, not ignore_invalid_experts,
        table(*counts_shape(num_bins)), sorted_token_ids, expert_ids, used,
    )  # fmt: skip
    return sorted_token_ids, expert_ids, used
