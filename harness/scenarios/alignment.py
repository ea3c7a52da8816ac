"""Scenarios of the alignment: topk_ids -> pairs sorted by expert, each expert's padded to whole blocks.

For backends with align(topk_ids, block_size, num_experts, expert_map=None, ignore_invalid_experts=True,
num_local_experts=None) -> (sorted_token_ids, expert_ids, num_tokens_post_padded), int32. The whole contract, for the
pairs 0 to P - 1 of topk_ids [T, k]:

    places      [0, num_tokens_post_padded) of sorted_token_ids hold, expert by expert, every valid pair of the expert
                once, in ascending order, and then P up to the next multiple of block_size
    expert_ids  one local expert a block; an expert without pairs has no block
    invalid     pairs whose id, or its entry of the map, names no expert are left out, or, unless
                ignore_invalid_experts, come last, in blocks of expert -1
    beyond      num_tokens_post_padded both tensors are written too, with P and with -1

The order of an expert's pairs, and the entries beyond, are judged for backends that promise "ascending".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.inputs.draw import expert_map
from harness.scenarios.registry import must_refuse, require_promise, scenario
from harness.scenarios.stage_call import accept, call_stage, require_options, require_tensor, stage
from harness.session.session import Session

BLOCK_SIZES = (1, 3, 16, 64, 128)
#: Ids that name no expert: negative, at the end (num_experts is added to the positive ones), far beyond, and, in 64
#: bits, ids whose lower 32 bits name an expert.
NO_EXPERT = (-1, -2, -(2**31), 0, 1, 2**20)
NO_EXPERT_64 = (-(2**32), 2**32 - 1, 2**32 + 1)


def aligned(
    topk_ids: Tensor, block_size: int, num_experts: int, table: Tensor | None, keep_invalid: bool, num_local: int
) -> tuple[list[int], list[int]]:
    """The contract, naively: (sorted_token_ids in use, expert of each block). table: the expert_map, [num_experts]; an
    entry outside [0, num_local) is no local expert."""
    by_expert: dict[int, list[int]] = {e: [] for e in range(num_local)}
    invalid: list[int] = []
    local = None if table is None else table.tolist()
    for pair, expert in enumerate(topk_ids.flatten().tolist()):
        if 0 <= expert < num_experts:
            expert = expert if local is None else local[expert]
        else:
            expert = -1
        (by_expert[expert] if 0 <= expert < num_local else invalid).append(pair)
    by_expert[-1] = invalid if keep_invalid else []
    places: list[int] = []
    experts: list[int] = []
    for expert, pairs in by_expert.items():
        blocks = -(-len(pairs) // block_size)
        places += pairs + [topk_ids.numel()] * (blocks * block_size - len(pairs))
        experts += [expert] * blocks
    return places, experts


def complaints(
    topk_ids: Tensor, block_size: int, places: list[int], experts: list[int], returned: tuple[Tensor, Tensor, Tensor]
) -> list[str]:
    """A sentence for each wrong element of the tensors that align() returned."""
    sorted_ids, expert_ids, used = (t.tolist() for t in returned)
    pairs = topk_ids.numel()
    if used != [len(places)]:
        return [f"num_tokens_post_padded is {used}, but the pairs fill {len(places)} places"]
    if len(sorted_ids) < len(places) or len(expert_ids) < len(experts):
        capacity = f"{len(sorted_ids)} places in {len(expert_ids)} blocks"
        return [f"there is room for {capacity}, but {len(places)} places in {len(experts)} blocks are in use"]
    lines = []
    wanted = places + [pairs] * (len(sorted_ids) - len(places))
    for place, (got, want) in enumerate(zip(sorted_ids, wanted)):
        if got != want:
            block = place // block_size
            where = f"block {block}, of expert {experts[block]}" if place < len(places) else "beyond the last block"
            lines.append(f"sorted_token_ids[{place}], {where}, is {_pair(got, pairs)} instead of {_pair(want, pairs)}")
    for block, (got, want) in enumerate(zip(expert_ids, experts + [-1] * (len(expert_ids) - len(experts)))):
        if got != want:
            lines.append(f"expert_ids[{block}] is {got} instead of {want}, with {len(experts)} blocks in use")
    return lines


def _pair(pair: int, pairs: int) -> str:
    return f"padding ({pair})" if pair == pairs else f"pair {pair}" if 0 <= pair < pairs else str(pair)


def check(
    s: Session,
    block_size: int,
    topk_ids: Tensor,
    what: str = "",
    *,
    keep_invalid: bool = False,
    pass_num_local: bool = True,
) -> None:
    """Align once and judge the result. pass_num_local: pass num_local_experts, as a layer does."""
    problem = s.case.problem
    table = expert_map(problem, s.device.torch)
    num_local = problem.local_experts if pass_num_local else problem.num_experts
    options: dict[str, Any] = dict(block_size=block_size, num_experts=problem.num_experts)
    if table is not None:
        options["expert_map"] = table
        if pass_num_local:
            options["num_local_experts"] = num_local
    if keep_invalid:
        options["ignore_invalid_experts"] = False
    function = stage(s, "align")
    require_options(s, function, "align", options)
    result = call_stage(s, function, {"topk_ids": topk_ids}, options, what)
    s.require(
        isinstance(result, tuple) and len(result) == 3, f"align() returned {type(result).__name__}, not 3 tensors"
    )
    for name, tensor in zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), result):
        require_tensor(s, name, tensor, None, torch.int32, what)
    on_cpu = tuple(t.cpu() for t in result)
    places, experts = aligned(topk_ids.cpu(), block_size, problem.num_experts, table, keep_invalid, num_local)
    if "ascending" not in s.backend.promises:
        on_cpu = in_order(on_cpu, block_size, places, experts)
    accept(s, complaints(topk_ids, block_size, places, experts, on_cpu), what)


def in_order(
    returned: tuple[Tensor, ...], block_size: int, places: list[int], experts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that align() returned, without the entries beyond num_tokens_post_padded, and with every expert's
    pairs in ascending order."""
    sorted_ids, expert_ids, used = returned
    sorted_ids = sorted_ids[: len(places)].clone()
    blocks = torch.tensor(experts).repeat_interleave(block_size)[: len(sorted_ids)]
    for expert in set(experts):
        mine = blocks == expert
        sorted_ids[mine] = sorted_ids[mine].sort().values
    return sorted_ids, expert_ids[: len(experts)], used


def _blocks(s: Session, block_size: int) -> None:
    """One batch in blocks of this size."""
    check(s, block_size, s.draw().topk_ids)


for _size in BLOCK_SIZES:
    scenario(f"align.b{_size}")(partial(_blocks, block_size=_size))


@scenario("align.kept")
def kept(s: Session) -> None:
    """Invalid pairs in blocks of expert -1, behind all others."""
    for size in (1, 3, 16):
        check(s, size, s.draw().topk_ids, f"blocks of {size}", keep_invalid=True)


@scenario("align.out_of_range")
def out_of_range(s: Session) -> None:
    """Every third id names no expert: in 32 bits, and in 64 bits, whose lower half may name one."""
    n = s.case.problem.num_experts
    for bits, strange in ((32, NO_EXPERT), (64, NO_EXPERT + NO_EXPERT_64)):
        ids = s.draw(ids=bits).topk_ids.clone()
        flat = ids.view(-1)
        for index in range(0, len(flat), 3):
            value = strange[index // 3 % len(strange)]
            flat[index] = value + n if 0 <= value <= 2**20 else value
        for keep in (False, True):
            check(s, 4, ids, f"int{bits}, {'kept' if keep else 'left out'}", keep_invalid=keep)


@scenario("align.local")
def local(s: Session) -> None:
    """An expert_map without num_local_experts, and with it."""
    check(s, 16, s.draw().topk_ids, "not counted", pass_num_local=False)
    check(s, 16, s.draw(ids=64).topk_ids, "counted")


@scenario("align.strided")
def strided(s: Session) -> None:
    """Ids that are columns of a wider table, as with the slots of shared experts behind them."""
    ids = s.draw().topk_ids
    wide = torch.cat([ids, torch.zeros_like(ids)], 1)
    check(s, 16, wide[:, : ids.shape[1]])


@scenario("align.batches")
def batches(s: Session) -> None:
    """Batches that grow and shrink, including an empty batch."""
    most = s.case.problem.tokens
    for tokens in (most, 1, 0, 2 * most + 1, most):
        check(s, 16, s.draw(tokens=tokens).topk_ids, f"{tokens} tokens")


@scenario("align.refuses")
def refuses(s: Session) -> None:
    """Meaningless arguments are refused by an error that names them."""
    require_promise(s, "errors")
    function, ids, n = stage(s, "align"), s.draw().topk_ids, s.case.problem.num_experts
    table = torch.zeros(n, dtype=torch.int32, device=s.device.torch)
    good: dict[str, Any] = dict(topk_ids=ids, block_size=16, num_experts=n)
    for what, words, bad in (
        ("blocks of nothing", ("block_size",), dict(block_size=0)),
        ("no experts", ("num_experts",), dict(num_experts=0)),
        ("more local experts than experts", ("num_local_experts",), dict(num_local_experts=n + 1)),
        ("no local experts", ("num_local_experts",), dict(num_local_experts=0)),
        ("a map that is too short", ("expert_map",), dict(expert_map=table[:-1].contiguous())),
        ("a map of floating point", ("expert_map",), dict(expert_map=table.float())),
        ("ids of floating point", ("topk_ids",), dict(topk_ids=ids.float())),
    ):
        must_refuse(s, what, words, partial(function, **(good | bad)), {"topk_ids": ids})
    check(s, 16, ids, "after the refusals")
