"""The family "alignment": broken aligners are noticed, a right one is not accused."""

from tests.support.interpreted import poisoned  # isort: skip  # noqa: F401

import pytest
import torch

from cases import test_alignment as family
from harness.device import Device
from harness.problem.families import rows
from harness.run.case import run_case

CPU = Device("cpu")


def plain(topk_ids, block_size, num_experts, expert_map=None, ignore_invalid_experts=True, num_local_experts=None):
    """The contract by one stable sort of all pairs."""
    local = num_experts if num_local_experts is None else num_local_experts
    if block_size < 1 or not 1 <= local <= num_experts or topk_ids.is_floating_point():
        raise ValueError(f"block_size={block_size}, {num_experts=}, {num_local_experts=}, topk_ids {topk_ids.dtype}")
    if expert_map is not None and (expert_map.is_floating_point() or len(expert_map) != num_experts):
        raise ValueError(f"expert_map: {tuple(expert_map.shape)} {expert_map.dtype}")
    ids = topk_ids.flatten().long()
    known = (ids >= 0) & (ids < num_experts)
    ids = torch.where(known, ids, 0)
    ids = expert_map.long()[ids] if expert_map is not None else ids
    ids = torch.where(known & (ids >= 0) & (ids < local), ids, local)
    counts = torch.bincount(ids, minlength=local + 1)
    if ignore_invalid_experts:
        counts[local] = 0
    blocks = (counts + block_size - 1) // block_size
    first = (blocks.cumsum(0) - blocks) * block_size
    order = ids.argsort(stable=True)
    everyone = torch.bincount(ids, minlength=local + 1)
    rank = torch.arange(len(ids)) - (everyone.cumsum(0) - everyone)[ids[order]]
    used = int(blocks.sum()) * block_size
    places = torch.full((used + 2 * block_size,), len(ids), dtype=torch.int32)
    wanted = counts[ids[order]] > 0
    places[(first[ids[order]] + rank)[wanted]] = order[wanted].int()
    experts = torch.full((used // block_size + 2,), -1, dtype=torch.int32)
    number = torch.arange(local + 1)
    number[local] = -1
    experts[: used // block_size] = number.repeat_interleave(blocks).int()
    return places, experts, torch.tensor([used], dtype=torch.int32)


FAULTS = {}


def fault(function):
    FAULTS[function.__name__] = function
    return function


@fault
def tail_of_experts_zero(ids, block_size, num_experts, **options):
    """expert_ids beyond the blocks in use are expert 0."""
    places, experts, used = plain(ids, block_size, num_experts, **options)
    experts[int(used) // block_size :] = 0
    return places, experts, used


@fault
def tail_unwritten(ids, block_size, num_experts, **options):
    """sorted_token_ids beyond the blocks in use are what was in memory."""
    places, experts, used = plain(ids, block_size, num_experts, **options)
    found = torch.empty_like(places)
    found[: int(used)] = places[: int(used)]
    return found, experts, used


@fault
def padding_is_pair_zero(ids, block_size, num_experts, **options):
    """Padding is 0, which is a pair."""
    places, experts, used = plain(ids, block_size, num_experts, **options)
    return torch.where(places == ids.numel(), 0, places), experts, used


@fault
def last_pair_lost(ids, block_size, num_experts, **options):
    """The last pair is padding."""
    places, experts, used = plain(ids, block_size, num_experts, **options)
    return torch.where(places == ids.numel() - 1, ids.numel(), places), experts, used


@fault
def not_in_order(ids, block_size, num_experts, **options):
    """Pairs of an expert in any order, as atomics leave them."""
    places, experts, used = plain(ids, block_size, num_experts, **options)
    blocks = places[: int(used)].view(-1, block_size)
    places[: int(used)] = torch.where(blocks < ids.numel(), blocks, -1).sort(1, descending=True).values.flatten()
    return torch.where(places < 0, ids.numel(), places), experts, used


@fault
def a_block_too_many(ids, block_size, num_experts, **options):
    """An expert with a whole number of blocks gets another one."""
    places, experts, used = plain(ids, block_size, num_experts, **options)
    return places, experts, used + block_size * (ids.numel() % block_size == 0)


@fault
def counts_pairs(ids, block_size, num_experts, **options):
    """num_tokens_post_padded is not padded."""
    places, experts, _ = plain(ids, block_size, num_experts, **options)
    return places, experts, (places < ids.numel()).sum()[None].int()


@fault
def without_map(ids, block_size, num_experts, expert_map=None, num_local_experts=None, **options):
    """The map is forgotten."""
    return plain(ids, block_size, num_experts, **options)


@fault
def invalid_always_dropped(ids, block_size, num_experts, ignore_invalid_experts=True, **options):
    """Invalid pairs are left out although they are wanted."""
    return plain(ids, block_size, num_experts, **options)


@fault
def only_minus_one_is_invalid(ids, block_size, num_experts, **options):
    """Ids at and beyond the number of experts count for the last one."""
    return plain(ids.clamp(max=num_experts - 1), block_size, num_experts, **options)


@fault
def low_32_bits(ids, block_size, num_experts, **options):
    """Of 64-bit ids only the low half is read."""
    return plain(ids.int(), block_size, num_experts, **options)


@fault
def long_places(ids, block_size, num_experts, **options):
    """int64 where int32 is read."""
    places, experts, used = plain(ids, block_size, num_experts, **options)
    return places.long(), experts, used


@fault
def one_chunk(ids, block_size, num_experts, **options):
    """Pairs beyond the first 1024 are not seen."""
    return plain(
        torch.where(torch.arange(ids.numel()).view_as(ids) < 1024, ids, -1), block_size, num_experts, **options
    )


@fault
def as_if_dense(ids, block_size, num_experts, **options):
    """Rows of ids are taken to lie one behind the other."""
    return plain(ids.as_strided(ids.shape, (ids.shape[1], 1)), block_size, num_experts, **options)


class Aligner:
    """A backend whose alignment is this function."""

    devices, promises, name = frozenset({"cpu"}), frozenset({"errors", "ascending"}), "aligner"

    def __init__(self, align, *promises):
        self.align = align
        self.promises = frozenset(promises) or self.promises

    def prepare(self, problem, layer):
        raise NotImplementedError("only the alignment is asked about")


CASES = sorted((row.case for row in rows(family, on_cpu=True)), key=lambda c: c.problem.tokens * c.problem.top_k)


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_aligner_is_noticed(name):
    function = FAULTS[name]

    def align(topk_ids, block_size, num_experts, **options):
        return function(topk_ids, block_size, num_experts, **options)

    results = (case for case in CASES if case.scenario != "align.refuses")
    verdicts = (run_case(case, Aligner(align), CPU, "alignment") for case in results)
    noticed = next((v for v in verdicts if not v.green), None)
    assert noticed is not None and noticed.status == "failed", noticed


@pytest.mark.parametrize("name", ["not_in_order", "tail_unwritten", "plain"])
def test_order_and_what_is_beyond_are_asked_of_those_that_promise_them(name):
    aligner = Aligner(FAULTS.get(name, plain), "errors")
    verdicts = [run_case(case, aligner, CPU, "alignment") for case in CASES[::4] if case.scenario != "align.refuses"]
    assert [f"{v.case}: {v.status} {v.reason}" for v in verdicts if v.status != "passed"] == []


def test_without_the_promise_a_pair_in_another_expert_s_block_is_still_noticed():
    def swapped(ids, block_size, num_experts, **options):
        places, experts, used = plain(ids, block_size, num_experts, **options)
        if int(used) > block_size:
            places[[0, block_size]] = places[[block_size, 0]]
        return places, experts, used

    verdicts = [
        run_case(case, Aligner(swapped, "errors"), CPU, "alignment") for case in CASES if case.scenario == "align.b1"
    ]
    assert any(v.status == "failed" for v in verdicts)


def test_a_right_aligner_is_not_accused():
    verdicts = [run_case(case, Aligner(plain), CPU, "alignment") for case in CASES[::2]]
    assert [f"{v.case}: {v.status} {v.reason}" for v in verdicts if v.status != "passed"] == []
