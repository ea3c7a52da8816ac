"""The relations, one function each: a change of the inputs, and what it does to the output.

Each takes the case's inputs and returns derived inputs together with what the first output implies for theirs
(scenarios/metamorphic.py). The layer is in layout "nk" here; the backend gets it in the problem's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from harness.inputs.draw import Inputs, expert_map
from harness.inputs.reshape import padded_rows, reshaped, select, with_experts
from harness.problem.case import ExpertParallel, Problem
from harness.scenarios.metamorphic import Related, batch_is_one, in_batch, other_layer, refuse, relation, tokens_of
from reference.moe import local_experts

MOST_RANKS = 8  #: one call each


def shuffled(n: int, device: torch.device) -> Tensor:
    """A permutation [n] int64 other than the identity (n > 1); always the same for one n."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return (order if not torch.equal(order, torch.arange(n)) else order.flip(0)).to(device)


def _block(problem: Problem) -> int:
    """Columns that stay together where columns move, so that those of one scale go on sharing it."""
    return problem.quant.block if problem.quant and problem.quant.block > 1 else 128


def _within_blocks(problem: Problem, n: int, device: torch.device) -> Tensor:
    """A permutation [n] int64 within every block: columns that share a scale go on sharing it."""
    block = _block(problem)
    return torch.cat([start + shuffled(min(block, n - start), device) for start in range(0, n, block)])


def _local(inputs: Inputs) -> Tensor:
    """The local expert of every slot, [T, k], -1 where none serves it."""
    return local_experts(inputs.topk_ids, inputs.case.problem.num_experts, inputs.layer.expert_map)


def _relabelled(ids: Tensor, label: Tensor) -> Tensor:
    """topk_ids with expert e renamed to label[e]; ids that name no expert stay."""
    valid = (ids >= 0) & (ids < len(label))
    return torch.where(valid, label[ids.clamp(0, len(label) - 1).long()], ids.long()).to(ids.dtype)


# -- the tokens -------------------------------------------------------------------------------------------------------


@relation("token_order")
def token_order(inputs: Inputs) -> Related:
    """The tokens in another order: the same rows in that order."""
    order = shuffled(inputs.case.problem.tokens, inputs.hidden_states.device)
    return Related(
        {"tokens reordered": tokens_of(inputs, order)}, lambda y: y[order.cpu()], holds=in_batch(inputs.case.problem)
    )


@relation("batch_parts")
def batch_parts(inputs: Inputs) -> Related:
    """The batch cut into one token, half of the others and the rest: the parts' rows are the whole's."""
    tokens = inputs.case.problem.tokens
    ends = sorted({0, min(1, tokens), (tokens + 1) // 2, tokens})
    rows = torch.arange(tokens, device=inputs.hidden_states.device)
    parts = {f"tokens {a} to {b - 1} alone": tokens_of(inputs, rows[a:b]) for a, b in zip(ends, ends[1:])}
    refuse(not parts, "scenario: no token to part from others")
    return Related(parts, joined=torch.cat, holds=in_batch(inputs.case.problem))


@relation("repeated_tokens")
def repeated_tokens(inputs: Inputs) -> Related:
    """Every token twice, the second ones behind all first ones: its row twice."""
    rows = torch.arange(inputs.case.problem.tokens, device=inputs.hidden_states.device).repeat(2)
    return Related(
        {"every token twice": tokens_of(inputs, rows)}, lambda y: y.repeat(2, 1),
        holds=in_batch(inputs.case.problem), copies=2,
    )  # fmt: skip


@relation("nan_rows")
def nan_rows(inputs: Inputs) -> Related:
    """Unserved tokens, and weights of slots without an expert, are NaN (a padded batch): they reach no other row."""
    problem = inputs.case.problem
    refuse(batch_is_one(problem), "quant: a NaN in a batch with one dynamic scale is unspecified")
    unserved = (_local(inputs) < 0).all(1)
    refuse(not unserved.any(), "scenario: every token is served")
    refuse(problem.shared_experts > 0, "shared_experts: they serve every token")
    x = torch.where(unserved[:, None], torch.nan, inputs.hidden_states)
    nowhere = (inputs.topk_ids < 0) | (inputs.topk_ids >= problem.num_experts)
    weights = torch.where(nowhere, torch.nan, inputs.topk_weights)
    x = padded_rows(x) if problem.padded else x
    return Related(
        {"NaN in unserved rows": replace(inputs, hidden_states=x, topk_weights=weights)},
        holds="path", nan=True,
    )  # fmt: skip


# -- the slots and their weights --------------------------------------------------------------------------------------


def _refuse_unless_linear(problem: Problem) -> None:
    refuse(problem.router_weight_on_input, "router_weight_on_input: outputs are not linear in it")


@relation("doubled_weights")
def doubled_weights(inputs: Inputs) -> Related:
    """Router weights times two: outputs times two, to the bit, since doubling commutes with every rounding (except of
    subnormal numbers, which random fp16 outputs may be)."""
    problem = inputs.case.problem
    _refuse_unless_linear(problem)
    refuse(problem.shared_experts > 0, "shared_experts: their weight stays 1")
    double = replace(inputs, topk_weights=2 * inputs.topk_weights)
    return Related(
        {"router weights doubled": double}, lambda y: 2 * y, holds="exact" if problem.dtype == "fp16" else "path"
    )


@relation("weight_parts")
def weight_parts(inputs: Inputs) -> Related:
    """Router weights of the even slots alone, and of the odd slots alone: the two outputs add up to the first."""
    problem = inputs.case.problem
    _refuse_unless_linear(problem)
    refuse(problem.shared_experts > 0, "shared_experts: both parts would have them")
    refuse(problem.top_k == 1, "scenario: one slot has no parts")
    odd = torch.arange(problem.top_k, device=inputs.topk_weights.device) % 2
    parts = {
        f"{which} slots weigh nothing": replace(inputs, topk_weights=inputs.topk_weights * (odd == n))
        for n, which in ((0, "odd"), (1, "even"))
    }
    return Related(parts, joined=lambda outs: outs[0] + outs[1])


@relation("zero_weight")
def zero_weight(inputs: Inputs) -> Related:
    """A slot with router weight zero is equal to a slot without an expert."""
    problem = inputs.case.problem
    _refuse_unless_linear(problem)
    tokens, top_k = inputs.topk_ids.shape
    device = inputs.topk_ids.device
    slot = torch.arange(top_k, device=device)
    hit = slot == (torch.arange(tokens, device=device) % (top_k + 1))[:, None]  # of most tokens one slot
    first = replace(inputs, topk_weights=inputs.topk_weights.masked_fill(hit, 0.0))
    ids = inputs.topk_ids.masked_fill(hit, -1)
    without = other_layer(inputs, inputs.layer, {"routing": "invalid"}, topk_ids=ids)
    return Related({"their ids are -1": without}, holds=in_batch(problem), first=first)


@relation("slot_order")
def slot_order(inputs: Inputs) -> Related:
    """The slots of every token in another order."""
    problem = inputs.case.problem
    refuse(problem.top_k == 1, "scenario: one slot has one order")
    order = shuffled(problem.top_k, inputs.topk_ids.device)
    weights, ids = (t[:, order].contiguous() for t in (inputs.topk_weights, inputs.topk_ids))
    return Related({"slots reordered": replace(inputs, topk_weights=weights, topk_ids=ids)})


# -- the experts ------------------------------------------------------------------------------------------------------


@relation("expert_order")
def expert_order(inputs: Inputs) -> Related:
    """The experts under other ids, in topk_ids and in the layer (and, under expert_map, at other local places)."""
    problem, device = inputs.case.problem, inputs.topk_ids.device
    label = shuffled(problem.num_experts, device)
    old = inputs.layer.expert_map
    place = label if old is None else shuffled(problem.local_experts, device)
    layer = with_experts(inputs.layer, place.argsort())
    if old is not None:
        moved = torch.where(old >= 0, place[old.clamp(min=0).long()].to(old.dtype), old)
        layer = replace(layer, expert_map=moved[label.argsort()])
    return Related({"experts relabelled": other_layer(inputs, layer, topk_ids=_relabelled(inputs.topk_ids, label))})


def _enlarged(inputs: Inputs, new: int, front: bool, ids: Callable[[Tensor, Tensor], Tensor]) -> Inputs:
    """Every rank gets one more expert: this rank a copy of local expert `new` (-1: all NaN), in front or behind.
    ids(topk_ids under the new names, the new expert's id [1]) returns the topk_ids of the call."""
    problem, device = inputs.case.problem, inputs.topk_ids.device
    ranks, rank = (problem.ep.size, problem.ep.rank) if problem.ep else (1, 0)
    added = torch.tensor([new], device=device)
    own = torch.arange(problem.local_experts, device=device)
    layer = with_experts(inputs.layer, torch.cat([added, own] if front else [own, added]))
    first = ranks if front else 0
    label = torch.arange(problem.num_experts, device=device) + first
    own_id = torch.tensor([rank if front else problem.num_experts + rank], device=device)
    if (old := inputs.layer.expert_map) is not None:
        moved = old.new_full((problem.num_experts + ranks,), -1)
        moved[label] = torch.where(old >= 0, old + int(front), old)
        moved[own_id] = 0 if front else problem.local_experts
        layer = replace(layer, expert_map=moved)
    new_ids = ids(_relabelled(inputs.topk_ids, label), own_id).to(inputs.topk_ids.dtype)
    return other_layer(inputs, layer, {"num_experts": problem.num_experts + ranks}, topk_ids=new_ids)


@relation("unused_expert")
def unused_expert(inputs: Inputs) -> list[Related]:
    """One more expert, all NaN, in front of the others or behind them, that no token uses: the same outputs."""
    return [
        Related({f"an unused expert {where}": _enlarged(inputs, -1, front, lambda ids, _: ids)}, nan=True)
        for where, front in (("in front", True), ("behind", False))
    ]


@relation("unused_nan")
def unused_nan(inputs: Inputs) -> Related:
    """Every expert that no token uses is NaN: the same outputs."""
    local = _local(inputs)
    own = torch.arange(inputs.case.problem.local_experts, device=local.device)
    used = torch.isin(own, local)
    refuse(bool(used.all()), "scenario: every expert is used")
    layer = with_experts(inputs.layer, torch.where(used, own, -1))
    return Related({"unused experts are NaN": other_layer(inputs, layer)}, holds="path", nan=True)


@relation("expert_copies")
def expert_copies(inputs: Inputs) -> Related:
    """A copy of the busiest expert, which serves every second token of that expert, with all slots of the token: two
    slots at the expert and at its copy would make the same errors, which the oracle takes to be independent."""
    local = _local(inputs)
    refuse(not (local >= 0).any(), "scenario: no expert is used")
    busiest = int(local[local >= 0].mode().values)
    mine = local == busiest
    half = mine & (mine.any(1).cumsum(0) % 2 == 0)[:, None]
    copied = _enlarged(inputs, busiest, False, lambda ids, n: ids.where(~half, n))
    return Related({"half of an expert's tokens at a copy": copied})


@relation("ranks")
def ranks(inputs: Inputs) -> list[Related]:
    """The experts divided among ranks, in runs and in turn: the outputs of the ranks add up to the first."""
    problem, device = inputs.case.problem, inputs.topk_ids.device
    refuse(problem.ep is not None, "expert_map: the layer is a rank's share already")
    refuse(problem.shared_experts > 0, "shared_experts: every rank would add them")
    size = next((n for n in range(2, MOST_RANKS + 1) if problem.num_experts % n == 0), 0)
    refuse(not size, f"shape: {problem.num_experts} experts cannot be dealt out to 2 to {MOST_RANKS} ranks")
    relations = []
    for strided in (False, True):
        shares = {}
        for rank in range(size):
            ep = ExpertParallel(size, rank, strided)
            own = expert_map(replace(problem, ep=ep), device)
            assert own is not None
            layer = replace(with_experts(inputs.layer, torch.nonzero(own >= 0).flatten()), expert_map=own)
            shares[f"rank {ep}"] = other_layer(inputs, layer, {"ep": ep})
        relations.append(Related(shares, joined=lambda outs: torch.stack(outs).sum(0)))
    return relations


# -- the sizes --------------------------------------------------------------------------------------------------------


def _more(problem: Problem, size: int) -> int:
    """By how much a size grows: a multiple of the block stays one, other sizes get another tail."""
    return _block(problem) if problem.quant is not None and size % _block(problem) == 0 else 24


def _ranges(inputs: Inputs) -> tuple[Tensor, Tensor]:
    problem, device = inputs.case.problem, inputs.hidden_states.device
    return torch.arange(problem.hidden_size, device=device), torch.arange(problem.intermediate_size, device=device)


def _columns(inputs: Inputs, hidden: Tensor) -> Tensor:
    """hidden_states with these columns, zeros for -1."""
    x = select(inputs.hidden_states, hidden, 1)
    return padded_rows(x) if inputs.case.problem.padded else x


@relation("wider_hidden")
def wider_hidden(inputs: Inputs) -> Related:
    """More hidden columns, zero in hidden_states and in every weight: the old columns of the output stay."""
    problem = inputs.case.problem
    hidden, inter = _ranges(inputs)
    hidden = torch.cat([hidden, hidden.new_full((_more(problem, problem.hidden_size),), -1)])
    wider = other_layer(
        inputs, reshaped(inputs.layer, hidden, inter, inter), {"hidden_size": len(hidden)},
        hidden_states=_columns(inputs, hidden),
    )  # fmt: skip
    return Related({"a larger hidden size": wider}, lambda y: select(y, hidden.cpu(), 1))


@relation("wider_intermediate")
def wider_intermediate(inputs: Inputs) -> Related:
    """More intermediate columns, copies of the last, whose weights in w2 are zero: the same outputs."""
    problem = inputs.case.problem
    hidden, inter = _ranges(inputs)
    more = _more(problem, problem.intermediate_size)
    copies = torch.cat([inter, inter[-1:].repeat(more)])
    ignored = torch.cat([inter, inter.new_full((more,), -1)])
    layer = reshaped(inputs.layer, hidden, copies, ignored)
    wider = other_layer(inputs, layer, {"intermediate_size": len(copies)})
    return Related({"a larger intermediate size": wider})


@relation("hidden_order")
def hidden_order(inputs: Inputs) -> Related:
    """The hidden columns in another order, in hidden_states, w13 and w2: the columns of the output in that order."""
    _, inter = _ranges(inputs)
    order = _within_blocks(inputs.case.problem, inputs.case.problem.hidden_size, inputs.hidden_states.device)
    layer = reshaped(inputs.layer, order, inter, inter)
    reordered = other_layer(inputs, layer, hidden_states=_columns(inputs, order))
    return Related({"hidden columns reordered": reordered}, lambda y: y[:, order.cpu()])


@relation("intermediate_order")
def intermediate_order(inputs: Inputs) -> Related:
    """The rows of gate and up, and the columns of w2 with them, in another order: the same outputs."""
    hidden, _ = _ranges(inputs)
    order = _within_blocks(inputs.case.problem, inputs.case.problem.intermediate_size, inputs.hidden_states.device)
    reordered = other_layer(inputs, reshaped(inputs.layer, hidden, order, order))
    return Related({"intermediate rows reordered": reordered})


# -- the representation -----------------------------------------------------------------------------------------------


@relation("layout")
def layout(inputs: Inputs) -> Related:
    """The same weights in the other layout: the same outputs."""
    other = "kn" if inputs.case.problem.layout == "nk" else "nk"
    return Related({f"layout {other}": other_layer(inputs, inputs.layer, {"layout": other})})


@relation("representation")
def representation(inputs: Inputs) -> Related:
    """Ids of the other width, and hidden_states with padded rows (or without): the same outputs."""
    problem = inputs.case.problem
    ids = inputs.topk_ids.to(torch.int32 if problem.ids == 64 else torch.int64)
    x = inputs.hidden_states.contiguous() if problem.padded else padded_rows(inputs.hidden_states)
    changes = {"ids": 96 - problem.ids, "padded": not problem.padded}
    other = other_layer(inputs, inputs.layer, changes, topk_ids=ids, hidden_states=x)
    return Related({"other ids and strides": other})
