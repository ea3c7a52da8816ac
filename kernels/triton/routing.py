"""Which local expert serves a pair: the one place where ids and expert_map are read by kernels."""

import triton
import triton.language as tl


@triton.jit
def local_expert(ids_ptr, pair, inside, expert_map_ptr, num_experts, num_local_experts, HAS_MAP: tl.constexpr):
    """Local expert of each pair, or -1 where the pair is invalid or not `inside`.

    pair and inside are blocks of one shape; ids are int32 or int64, expert_map int32 or int64. An id, or an entry of
    the map, that lies outside of its range is invalid rather than an address.
    """
    expert = tl.load(ids_ptr + pair, mask=inside, other=-1)
    known = inside & (expert >= 0) & (expert < num_experts)
    if HAS_MAP:
        expert = tl.load(expert_map_ptr + expert, mask=known, other=-1)
        known = known & (expert >= 0) & (expert < num_local_experts)
    return tl.where(known, expert, -1).to(tl.int32)
