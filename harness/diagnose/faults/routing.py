"""Faults of routing: router weights, slots, ids, experts, and the rows of an expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.diagnose.faults.registry import TILES, fault
from harness.oracle.stages import Answer, Oracle
from reference.formats import round_to
from reference.moe import local_experts

#: The value of forgotten rows: zero, or the NaN that unwritten memory is full of.
FATES = {"left out": 0.0, "never written": float("nan")}


@fault("output.zero", "an output of zeros")
def _(o):
    return o.resume(out=torch.zeros_like(o.x))


# -- the router's weights ---------------------------------------------------------------------------------------------
@fault("router_weight.twice", "router weight applied twice", flag="router_weight_on_input", effect="doubled")
def _(o):
    if not o.problem.router_weight_on_input:
        return o(weights=o.weights**2)
    # Twice means on input and on output.
    return None if o.experts.shared else o(x=o.rows(), router_weight_on_input=False)


@fault("router_weight.missing", "router weight missing")
def _(o):
    return o(weights=torch.ones_like(o.weights))


@fault(
    "router_weight.squared_on_input", "router weight squared on input", flag="router_weight_on_input", effect="doubled"
)
def _(o):
    return o(weights=o.weights**2) if o.problem.router_weight_on_input else None


@fault(
    "router_weight.on_output_instead_of_input",
    "router weight on output instead of input",
    flag="router_weight_on_input",
    effect="ignored",
)
def _(o):
    return o(router_weight_on_input=False)


@fault("router_weight.on_input_instead_of_output", "router weight on input instead of output")
def _(o):
    once = torch.ones_like(o.s.weight)
    return None if o.problem.router_weight_on_input else o.resume(h=_weighted_input(o), weight=once)


@fault(
    "router_weight.on_input_and_output",
    "router weight on input as well as on output",
    flag="router_weight_on_input",
    effect="doubled",
)
def _(o):
    return None if o.problem.router_weight_on_input else o.resume(h=_weighted_input(o))


@fault("router_weight.on_gemm_1_output", "router weight applied to GEMM 1's output, bias included")
def _(o):
    return o.resume(h=o.s.h * _pair_weights(o), weight=torch.ones_like(o.s.weight))


@fault("router_weight.first_slot", "router weight of the first slot for every slot")
def _(o):
    return o(weights=o.weights[:, :1].expand_as(o.weights))


@fault("router_weight.next_pair", "router weight of the next pair", step=(-1,))
@fault("router_weight.previous_pair", "router weight of the previous pair", step=(1,))
def _(o, step):
    return o(weights=o.weights.flatten().roll(step).reshape(o.weights.shape))


@fault("router_weight.next_token", "router weight of the next token", step=(-1,))
@fault("router_weight.previous_token", "router weight of the previous token", step=(1,))
def _(o, step):
    return o(weights=o.weights.roll(step, 0))


@fault("router_weight.pair_index_is_token", "router weight of pair t for token t: the index is not multiplied by top_k")
def _(o):
    tokens = torch.arange(len(o.weights))[:, None]
    return o(weights=o.weights.flatten()[tokens].expand_as(o.weights)) if o.weights.numel() else None


@fault("router_weight.transposed", "router weights read as if transposed")
def _(o):
    return o(weights=o.weights.T.reshape(o.weights.shape))


@fault("router_weight.reversed", "router weights, or the experts of the slots, in reverse order")
def _(o):
    return o(weights=o.weights.flip(1))


@fault("router_weight.renormalised", "router weights renormalised to a sum of one")
def _(o):
    return o(weights=o.weights / o.weights.sum(1, keepdim=True)) if o.weights.shape[1] > 1 else None


@fault("router_weight.rounded.{form}", "router weights rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    return o(weights=round_to(o.weights, form))


@fault("router_weight.after_rounding", "router weight applied after the slot is rounded")
def _(o):
    if o.rounding.plan.weight != "before_store" or o.problem.router_weight_on_input:
        return None
    return o.resume(slots=round_to(o.s.y, o.problem.dtype) * o.s.weight[:, None])


@fault("slots.mean", "mean over the slots instead of their sum")
def _(o):
    return o(weights=o.weights / o.weights.shape[1])


# -- slots, ids and experts -------------------------------------------------------------------------------------------
@fault("slots.dropped.{which}", "{which} slot dropped", which=("last", "first"))
def _(o, which):
    return o(ids=_without(o, slice(-1, None) if which == "last" else slice(1)))


@fault("slots.only.{which}", "{which} slot only", which=("last", "first"))
def _(o, which):
    return o(ids=_without(o, slice(-1) if which == "last" else slice(1, None)))


@fault("ids.first_slot", "expert of the first slot for every slot")
def _(o):
    return o(ids=o.ids[:, :1].expand_as(o.ids))


@fault("ids.duplicate_counted_once", "a duplicate expert of a token counted once", flag="routing", effect="ignored")
def _(o):
    earlier = torch.tril(torch.ones(o.ids.shape[1], o.ids.shape[1], dtype=torch.bool), -1)
    again = ((o.ids[:, :, None] == o.ids[:, None, :]) & earlier).any(2)
    return o(ids=torch.where(again, -1, o.ids))


@fault("ids.next_token", "expert of the next token", step=(-1,))
@fault("ids.previous_token", "expert of the previous token", step=(1,))
def _(o, step):
    return o(ids=o.ids.roll(step, 0))


@fault("expert.next", "the next expert's weights", step=(1,))
@fault("expert.previous", "the previous expert's weights", step=(-1,))
def _(o, step):
    return _served(o, lambda local, count: (local + step) % count)


@fault("expert.zero", "expert 0 for every pair")
def _(o):
    return _served(o, lambda local, count: torch.zeros_like(local))


@fault("expert_map.ignored", "expert_map ignored: global ids read as local ids", flag="ep", effect="ignored")
def _(o):
    return o(expert_map=None, num_experts=o.problem.local_experts) if o.experts.expert_map is not None else None


@fault(
    "expert_map.ignored_modulo",
    "expert_map ignored: global ids read modulo the number of local experts",
    flag="ep",
    effect="ignored",
)
def _(o):
    count = o.problem.local_experts
    if o.experts.expert_map is None:
        return None
    return o(expert_map=None, num_experts=count, ids=torch.where(o.ids >= 0, o.ids % count, o.ids))


@fault("expert_map.mask", "expert_map read as a mask: 1 for local experts, 0 for the others")
def _(o):
    own = o.experts.expert_map
    return o(expert_map=(own >= 0).int()) if own is not None and o.problem.local_experts > 1 else None


@fault("expert_map.twice", "expert_map applied twice", flag="ep", effect="doubled")
def _(o):
    own = o.experts.expert_map
    return None if own is None else o(expert_map=torch.where(own >= 0, own[own.clamp(min=0).long()], -1))


@fault("expert_map.remote_read_as.{e}", "experts of other ranks read as local expert {e}", e=(0, "E-1"))
def _(o, e):
    own, last = o.experts.expert_map, o.problem.local_experts - 1
    return None if own is None else o(expert_map=torch.where(own >= 0, own, 0 if e == 0 else last))


@fault("ids.invalid_read_as.{e}", "invalid ids read as expert {e}", flag="routing", effect="ignored", e=(0, "E-1"))
def _(o, e):
    return o(ids=torch.where(o.ids < 0, 0 if e == 0 else o.problem.num_experts - 1, o.ids))


@fault("ids.invalid_drops_token", "all slots of a token with an invalid slot dropped")
def _(o):
    return o(ids=torch.where((o.ids < 0).any(1, keepdim=True), -1, o.ids))


@fault("ids.invalid_drops_later_slots", "slots after an invalid one dropped")
def _(o):
    return o(ids=torch.where((o.ids < 0).cumsum(1) > 0, -1, o.ids))


@fault("slots.unserved_added", "slots without a local expert added all the same")
def _(o):
    return _unwritten(o, lambda served: ~served.all(1))


@fault("tokens.unserved_not_written", "tokens without a local expert never written")
def _(o):
    return _unwritten(o, lambda served: ~served.any(1))


@fault("ids.int64_read_as_int32", "int64 ids read as int32", flag="ids", effect="ignored")
def _(o):
    if o.inputs.topk_ids.dtype != torch.int64:
        return None
    return o(ids=o.ids.view(torch.int32).flatten()[: o.ids.numel()].reshape(o.ids.shape).long())


@fault("expert_rows.{fate}.{which}_expert", "the {which} expert's rows {fate}", fate=FATES, which=("first", "last"))
def _(o, fate, which):
    return keep(o, o.s.expert != (0 if which == "first" else o.problem.local_experts - 1), FATES[fate])


@fault("expert_rows.{fate}.last", "the last row of every expert {fate}", fate=FATES)
def _(o, fate):
    rank, count = _ranks(o)
    return keep(o, rank != count - 1, FATES[fate])


@fault("expert_rows.{fate}.first", "the first row of every expert {fate}", fate=FATES)
def _(o, fate):
    return keep(o, _ranks(o)[0] != 0, FATES[fate])


@fault("expert_rows.{fate}.all_but_first", "all but the first row of every expert {fate}", fate=FATES)
def _(o, fate):
    return keep(o, _ranks(o)[0] == 0, FATES[fate])


@fault(
    "expert_rows.{fate}.tail.{tile}",
    "rows after the last full tile of {tile} of every expert {fate}",
    fate=FATES,
    tile=TILES,
)
def _(o, fate, tile):
    rank, count = _ranks(o)
    return keep(o, rank < count // tile * tile, FATES[fate]) if (count >= tile).any() else None


@fault(
    "expert_rows.{fate}.all_but_first_tile.{tile}",
    "all but the first tile of {tile} rows of every expert {fate}",
    fate=FATES,
    tile=TILES,
)
def _(o, fate, tile):
    return keep(o, _ranks(o)[0] < tile, FATES[fate])


# -- shared helpers ---------------------------------------------------------------------------------------------------
def _pair_weights(o: Oracle) -> Tensor:
    """[P, 1] the router weight of every pair, 1 for shared experts."""
    routed = o.s.slot < o.ids.shape[1]
    return torch.where(routed, o.weights[o.s.token, o.s.slot.clamp(max=o.ids.shape[1] - 1)], 1.0)[:, None]


def _weighted_input(o: Oracle) -> Tensor:
    """[P, 2I] or [P, I] h with GEMM 1's product, but not its bias, multiplied by the router weight."""
    bias = 0.0 if o.experts.w13_bias is None else o.experts.w13_bias[o.s.expert]
    return (o.s.h - bias) * _pair_weights(o) + bias


def _without(o: Oracle, slots: slice) -> Tensor:
    ids = o.ids.clone()
    ids[:, slots] = -1
    return ids


def _served(o: Oracle, change: Callable[[Tensor, int], Tensor]) -> Answer:
    """Every pair with a local expert uses the local expert change(local, count) instead."""
    local = local_experts(o.ids, o.problem.num_experts, o.experts.expert_map)
    count = o.problem.local_experts
    changed = torch.where(local >= 0, change(local.clamp(min=0), count), -1)
    return o(ids=changed, expert_map=None, num_experts=count)


def _unwritten(o: Oracle, tokens: Callable[[Tensor], Tensor]) -> Answer:
    """NaN for the tokens that tokens(served [T, k] bool) -> [T] bool selects; served: the slot has a local expert."""
    lost = tokens(local_experts(o.ids, o.problem.num_experts, o.experts.expert_map) >= 0)
    return o.resume(out=torch.where(lost[:, None], FATES["never written"], o.s.out))


def keep(o: Oracle, pairs: Tensor, instead: float = 0.0) -> Answer:
    """Sum these pairs [P] alone; the others are added as `instead`."""
    return o.resume(slots=torch.where(pairs[:, None], o.s.slots, instead))


def _ranks(o: Oracle) -> tuple[Tensor, Tensor]:
    """[P] and [P]: the position of a pair among the pairs of its expert, and the number of those pairs."""
    same = o.s.expert[:, None] == o.s.expert[None, :]
    return torch.tril(same, -1).sum(1), same.sum(1)
