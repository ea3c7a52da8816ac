"""The router: from logits to experts and their weights, in one launch.

    score   softmax or sigmoid of the logits, in float32
    choice  what experts are chosen by: the logits, which rank as the scores do and lose nothing, or score + bias
    groups  those kept, by their best choice, or, with a bias, by the sum of their two best
    top k   the best choice left, k times; the weight is the score, never the choice

A row's lanes are its experts, group after group, each group padded to a power of two.
"""

import torch
import triton
import triton.language as tl

from kernels import checks

METHODS = ("softmax_topk", "topk_softmax", "sigmoid", "grouped")
SCORINGS = ("softmax", "sigmoid")
TILE = 2048  #: lanes of a program
EPSILON = 1e-20  #: what "grouped" adds to the sum that it renormalizes by: all selected sigmoids may underflow


@triton.jit
def _scores(x, BY_SIGMOID: tl.constexpr):
    """float32 scores of logits x [tokens, lanes]; a lane of -inf scores 0."""
    if BY_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        z = tl.exp(x - tl.max(x, axis=1)[:, None])
        scores = z / tl.sum(z, axis=1)[:, None]
    return scores


@triton.jit
def _in_best_groups(
    choice, topk_groups, GROUPS: tl.constexpr, LANES: tl.constexpr, BY_TWO: tl.constexpr, BLOCK_TOKENS: tl.constexpr
):
    """Whether a lane of choice [tokens, GROUPS * LANES] is in one of its token's best groups, the first of equals."""
    members = tl.reshape(choice, [BLOCK_TOKENS, GROUPS, LANES])
    best = tl.max(members, axis=2)
    if BY_TWO:
        lane = tl.arange(0, LANES)[None, None, :]
        first = tl.min(tl.where(members == best[:, :, None], lane, LANES), axis=2)
        best += tl.max(tl.where(lane == first[:, :, None], float("-inf"), members), axis=2)
    group = tl.arange(0, GROUPS)
    mine, other = best[:, :, None], best[:, None, :]
    ahead = (other > mine) | ((other == mine) & (group[None, None, :] < group[None, :, None]))
    kept = tl.sum(ahead.to(tl.int32), axis=2) < topk_groups
    kept = tl.broadcast_to(kept[:, :, None], [BLOCK_TOKENS, GROUPS, LANES])
    return tl.reshape(kept, [BLOCK_TOKENS, GROUPS * LANES])


@triton.jit(
    do_not_specialize=["num_tokens", "num_experts", "num_groups", "topk_groups", "group_size", "top_k", "num_shared"]
)
def _topk_kernel(
    logits_ptr, bias_ptr, map_ptr, num_valid_ptr, weights_ptr, ids_ptr,
    num_tokens, num_experts, num_groups, topk_groups, group_size, top_k, num_shared, stride_logits,
    factor, shared_weight, epsilon,
    BY_SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MAP: tl.constexpr,
    HAS_NUM_VALID: tl.constexpr, BY_GROUP: tl.constexpr, BY_TWO: tl.constexpr,
    GROUPS: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = (tokens < num_tokens)[:, None]
    lane = tl.arange(0, GROUPS * LANES)
    real = (lane // LANES < num_groups) & (lane % LANES < group_size)
    # A lane without an expert gets a number that no winner has.
    experts = tl.where(real, lane // LANES * group_size + lane % LANES, num_experts)[None, :]
    real = real[None, :]
    at = tokens.to(tl.int64)[:, None] * stride_logits + experts
    x = tl.load(logits_ptr + at, mask=inside & real, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    scores = _scores(x, BY_SIGMOID)
    choice = x
    if HAS_BIAS:
        choice = scores + tl.load(bias_ptr + experts, mask=real, other=0.0)
        # The softmax of a row without a finite logit is NaN, which no comparison would ever choose.
        choice = tl.where(real & (choice == choice), choice, float("-inf"))
    free = (tokens >= 0)[:, None] & real
    if BY_GROUP:
        free &= _in_best_groups(choice, topk_groups, GROUPS, LANES, BY_TWO, BLOCK_TOKENS)

    slot = tl.arange(0, SLOTS)[None, :]
    ids = tl.zeros([BLOCK_TOKENS, SLOTS], tl.int32)
    weights = tl.zeros([BLOCK_TOKENS, SLOTS], tl.float32)
    for k in range(0, top_k):
        best = tl.max(tl.where(free, choice, float("-inf")), axis=1)[:, None]
        # Of free lanes alone: where nothing but -inf is left, taken ones are as good.
        winner = tl.min(tl.where(free & (choice == best), experts, num_experts), axis=1)[:, None]
        weight = tl.sum(tl.where(experts == winner, scores, 0.0), axis=1)[:, None]
        ids = tl.where(slot == k, winner, ids)
        weights = tl.where(slot == k, weight, weights)
        free &= experts != winner
    if RENORMALIZE:
        total = tl.sum(weights, axis=1)[:, None] + epsilon
        weights /= tl.where(total == 0, 1.0, total)
    weights *= factor
    weights = tl.where(slot < top_k, weights, shared_weight)
    ids = tl.where(slot < top_k, ids, num_experts + slot - top_k)
    wanted = inside & (slot < top_k + num_shared)
    if HAS_MAP:
        ids = tl.load(map_ptr + ids, mask=wanted, other=-1)
    if HAS_NUM_VALID:
        valid = (tokens < tl.load(num_valid_ptr))[:, None]
        ids = tl.where(valid, ids, -1)
        weights = tl.where(valid, weights, 0.0)
    at = tokens.to(tl.int64)[:, None] * (top_k + num_shared) + slot
    tl.store(weights_ptr + at, weights, mask=wanted)
    tl.store(ids_ptr + at, ids, mask=wanted)


def fused_topk(
    logits: torch.Tensor,
    top_k: int,
    method: str,
    *,
    renormalize: bool | None = None,
    correction_bias: torch.Tensor | None = None,
    num_groups: int | None = None,
    topk_groups: int | None = None,
    routed_scaling_factor: float = 1.0,
    scoring: str = "sigmoid",
    id_map: torch.Tensor | None = None,
    fused_shared: int = 0,
    scale_later: bool = False,
    num_valid_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of every token, best first: (topk_weights float32, topk_ids int32), both [T, top_k + fused_shared].

    logits [T, E] bf16, fp16 or fp32 with dense rows (a padded row stride is fine); NaN counts as -inf. A token's ids
    are distinct and in range whatever its logits are; at equal choices the smaller id comes first.
    method: "softmax_topk" takes the softmax of all logits, "topk_softmax" of the chosen ones alone, "sigmoid" and
    "grouped" the sigmoid ("grouped": as scoring says). renormalize divides a token's weights by their sum; None: only
    "topk_softmax" does.
    For "grouped" alone: correction_bias float32 [E] steers the choice and enters no weight; the topk_groups best of
    num_groups equal groups are kept (both 1 by default).
    routed_scaling_factor multiplies the weights here, or, with scale_later, the whole layer's output: by the caller.
    fused_shared: slots behind the chosen ones, of the experts E, E + 1, ..., which serve every token. Their weight is
    1, or with scale_later 1 / routed_scaling_factor, which the caller's product makes 1.
    id_map int32 [E + fused_shared]: what is returned for each id, as where experts have been moved.
    num_valid_tokens int32 [1]: tokens from there on are padding: ids -1, weights 0.

    TypeError for dtypes, ValueError for everything else.
    """
    checks.require_dtype("logits", logits, *checks.HIDDEN_DTYPES)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)}; valid: [T, E] with at least one expert")
    checks.require_dense_rows("logits", logits)
    num_tokens, num_experts = logits.shape
    groups, kept = _require_groups(num_experts, top_k, method, correction_bias, num_groups, topk_groups)
    checks.require_one_of("scoring", scoring, SCORINGS)
    if method == "topk_softmax" and renormalize is False:
        raise ValueError("renormalize=False; valid for method 'topk_softmax': True or None")
    if not 0 < routed_scaling_factor < float("inf"):
        raise ValueError(f"routed_scaling_factor={routed_scaling_factor}; valid: a positive number")
    if fused_shared < 0:
        raise ValueError(f"fused_shared={fused_shared}; valid: 0 or more")
    slots = top_k + fused_shared
    _require_table("correction_bias", correction_bias, torch.float32, num_experts, "[E]", logits.device)
    _require_table("id_map", id_map, torch.int32, num_experts + fused_shared, "[E + fused_shared]", logits.device)
    _require_table("num_valid_tokens", num_valid_tokens, torch.int32, 1, "[1]", logits.device)

    weights = torch.empty(num_tokens, slots, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_tokens, slots, dtype=torch.int32, device=logits.device)
    if num_tokens == 0:
        return weights, ids
    size = num_experts // groups
    block_groups, block_members = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    block_tokens = max(1, TILE // (block_groups * block_members))
    _topk_kernel[(triton.cdiv(num_tokens, block_tokens),)](
        logits, logits if correction_bias is None else correction_bias, ids if id_map is None else id_map,
        ids if num_valid_tokens is None else num_valid_tokens, weights, ids,
        num_tokens, num_experts, groups, kept, size, top_k, fused_shared, logits.stride(0),
        1.0 if scale_later else float(routed_scaling_factor), 1.0 / routed_scaling_factor if scale_later else 1.0,
        EPSILON if method == "grouped" else 0.0,
        BY_SIGMOID=method == "sigmoid" or (method == "grouped" and scoring == "sigmoid"),
        RENORMALIZE=method == "topk_softmax" if renormalize is None else bool(renormalize),
        HAS_BIAS=correction_bias is not None, HAS_MAP=id_map is not None, HAS_NUM_VALID=num_valid_tokens is not None,
        BY_GROUP=kept < groups, BY_TWO=correction_bias is not None and size > 1,
        GROUPS=block_groups, LANES=block_members, SLOTS=triton.next_power_of_2(slots), BLOCK_TOKENS=block_tokens,
    )  # fmt: skip
    return weights, ids


def _require_groups(
    num_experts: int,
    top_k: int,
    method: str,
    correction_bias: torch.Tensor | None,
    num_groups: int | None,
    topk_groups: int | None,
) -> tuple[int, int]:
    """(groups, groups kept), both 1 by default; ValueError unless top_k experts can be chosen from those."""
    checks.require_one_of("method", method, METHODS)
    given = dict(correction_bias=correction_bias, num_groups=num_groups, topk_groups=topk_groups)
    for name, value in given.items():
        if method != "grouped" and value is not None:
            raise ValueError(f"{name} is given; valid for method {method!r}: None")
    groups = 1 if num_groups is None else num_groups
    kept = 1 if topk_groups is None else topk_groups
    if groups < 1 or num_experts % groups:
        raise ValueError(f"num_groups={groups}; valid: a divisor of {num_experts}, the number of experts")
    if not 1 <= kept <= groups:
        raise ValueError(f"topk_groups={kept}; valid: 1 to num_groups={groups}")
    reachable = num_experts // groups * kept
    if not 1 <= top_k <= reachable:
        raise ValueError(f"top_k={top_k}; valid: 1 to {reachable}, the experts in {kept} of {groups} groups")
    return groups, kept


def _require_table(
    name: str, table: torch.Tensor | None, dtype: torch.dtype, length: int, meaning: str, device: torch.device
) -> None:
    """TypeError or ValueError unless `table` is None or a contiguous tensor of this dtype and length on `device`."""
    if table is None:
        return
    checks.require_dtype(name, table, dtype)
    checks.require_shape(name, table, (length,), meaning)
    checks.require_device(name, table, device)
    if not table.is_contiguous():
        raise ValueError(f"{name}: stride {table.stride()}; valid: contiguous")
