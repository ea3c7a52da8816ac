"""The Triton kernels one by one, against plain loops in torch: on CPU tensors, interpreted."""

from tests.support.interpreted import E4M3, local_ids, poisoned, random_map, reference_activation  # isort: skip  # noqa: F401

import itertools
import math
import random

import pytest
import torch

from kernels.triton.activation import activate
from kernels.triton.align import moe_align_block_size
from kernels.triton.permute import MoEPermuteScratch, moe_permute, moe_unpermute
from kernels.triton.quant import AMAX_FLOOR, quantize_fp8

# --- alignment and permutation ---------------------------------------------------------------------------------------


def align_cases():
    rng = random.Random(0)
    for experts, tokens in itertools.product((1, 3, 8, 60, 200), (0, 1, 7, 90)):
        yield experts, tokens, rng.randint(1, 4), rng.choice((1, 16, 64)), rng.choice((torch.int32, torch.int64))


@pytest.mark.parametrize("ignore", (True, False))
@pytest.mark.parametrize("mapped", (False, True))
def test_align(mapped, ignore):
    generator = torch.Generator().manual_seed(0)
    for experts, tokens, top_k, block_size, dtype in align_cases():
        ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator).to(dtype)
        table = random_map(experts, generator) if mapped else None
        before = ids.clone()
        sorted_ids, expert_ids, used = moe_align_block_size(ids, block_size, experts, table, ignore)
        local = local_ids(ids, experts, table)
        places, blocks = [], []
        for e in [*range(experts)] + ([] if ignore else [-1]):
            mine = [pair for pair, expert in enumerate(local) if expert == e]
            size = -(-len(mine) // block_size)
            places += mine + [ids.numel()] * (size * block_size - len(mine))
            blocks += [e] * size
        assert used.tolist() == [len(places)]
        assert sorted_ids.tolist() == places + [ids.numel()] * (len(sorted_ids) - len(places))
        assert expert_ids.tolist() == blocks + [-1] * (len(expert_ids) - len(blocks))
        assert torch.equal(ids, before)


def test_align_worst_case_and_many_chunks():
    ids = torch.arange(32).view(16, 2)  # every pair opens a block of its own
    sorted_ids, expert_ids, used = moe_align_block_size(ids, 16, 32)
    assert used.item() == len(sorted_ids) == 32 * 16 and expert_ids.tolist() == list(range(32))
    ids = torch.randint(0, 5, (3000, 1), generator=torch.Generator().manual_seed(0))
    sorted_ids, _, used = moe_align_block_size(ids, 1, 5)
    assert torch.equal(sorted_ids.long(), torch.sort(ids.flatten(), stable=True).indices) and used.item() == 3000


def test_align_thousand_experts():
    ids = torch.tensor([[1023, 0], [1023, 511]])
    sorted_ids, expert_ids, used = moe_align_block_size(ids, 16, 1024)
    assert used.item() == 48 and expert_ids.tolist()[:3] == [0, 511, 1023] and sorted_ids[32:34].tolist() == [0, 2]


@pytest.mark.parametrize("with_scratch", (False, True))
@pytest.mark.parametrize("mapped", (False, True))
def test_permute_round_trip(mapped, with_scratch):
    generator = torch.Generator().manual_seed(1)
    scratch = None
    experts, top_k, size = 6, 3, 70
    table = torch.tensor([-1, 0, -1, 1, 2, -1], dtype=torch.int32) if mapped else None
    locals_ = 3 if mapped else experts
    if with_scratch:
        scratch = MoEPermuteScratch(
            40, top_k, experts, locals_, device="cpu", hidden_size=size, hidden_dtype=torch.bfloat16
        )
    for tokens in (40, 1, 17, 0):
        x = torch.randn(tokens, size, generator=generator).bfloat16()
        ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
        result = moe_permute(x, ids, experts, expert_map=table, scratch=scratch)
        local = local_ids(ids, experts, table)
        order = sorted((p for p, e in enumerate(local) if e >= 0), key=lambda p: local[p])
        rest = tokens * top_k - len(order)
        assert result.permuted_idx.tolist() == order + [-1] * rest
        assert result.expert_ids.tolist() == [local[p] for p in order] + [-1] * rest
        offsets = [sum(0 <= e < n for e in local) for n in range(locals_ + 1)]
        assert result.expert_first_token_offset.tolist() == offsets
        inverse = {p: r for r, p in enumerate(order)}
        assert result.inv_permuted_idx.flatten().tolist() == [inverse.get(p, -1) for p in range(tokens * top_k)]
        assert torch.equal(result.hidden_states[: len(order)], x[torch.tensor(order, dtype=torch.long) // top_k])
        assert (result.hidden_states[len(order) :] == 0).all()
        weights = torch.rand(tokens, top_k, generator=generator)
        back = moe_unpermute(result.hidden_states, weights, result.inv_permuted_idx)
        total = (weights * (torch.tensor(local).view(tokens, top_k) >= 0)).sum(1, keepdim=True)
        torch.testing.assert_close(back.float(), x.float() * total, rtol=1e-2, atol=1e-5)


def test_scratch_is_reused_without_allocation(monkeypatch):
    scratch = MoEPermuteScratch(8, 2, 4, device="cpu", hidden_size=32, hidden_dtype=torch.float32)
    x, ids = torch.ones(8, 32), torch.randint(0, 4, (8, 2))
    strided = ids.int().T.contiguous().T

    def addresses(ids=ids):
        return [t.data_ptr() for t in vars(moe_permute(x, ids, 4, scratch=scratch)).values()]

    first = addresses()
    order = scratch.permuted_idx.tolist()
    for name in ("empty", "empty_like", "zeros", "full", "ones"):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("allocated"))
    assert addresses() == first
    assert addresses(strided) == first and scratch.permuted_idx.tolist() == order


def test_scratch_refuses_what_does_not_fit():
    def make():
        return MoEPermuteScratch(8, 2, 4, device="cpu", hidden_size=32, hidden_dtype=torch.float32)

    x, ids = torch.ones(8, 32), torch.zeros(8, 2, dtype=torch.int32)
    make().validate(x, ids)
    bad = {
        "num_tokens=9": (torch.ones(9, 32), torch.zeros(9, 2, dtype=torch.int32)),
        "top_k=3": (x, torch.zeros(8, 3, dtype=torch.int32)),
        "hidden_size=31": (torch.ones(8, 31), ids),
        "dtype torch.float16": (x.half(), ids),
        "dtype torch.int16": (x, ids.short()),
    }
    for message, (rows, table) in bad.items():
        with pytest.raises(ValueError, match=message):
            make().validate(rows, table)
    scratch = make()
    scratch.hidden_states = torch.ones(32, 16).T
    with pytest.raises(ValueError, match="scratch.hidden_states: stride"):
        moe_permute(x, ids, 4, scratch=scratch)
    with pytest.raises(ValueError, match="num_experts=5"):
        moe_permute(x, ids, 5, scratch=make())


# --- activation and quantization --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"), [*itertools.product(("silu", "gelu", "gelu_tanh", "swigluoai"), (None, 1.5)), ("relu2", None)]
)
def test_activation(name, limit):
    h = torch.randn(21, 600, generator=torch.Generator().manual_seed(0)) * 4
    h[2, 5] = h[3, 405] = math.nan
    ids = torch.arange(21, dtype=torch.int64) % 5 - 1
    invalid = ids < 0
    h[invalid] = math.nan
    out = torch.empty(21, 600 if name == "relu2" else 300)
    activate(h, out, name, limit, 1.702, ids, num_experts=4, num_local_experts=4)
    expected = reference_activation(h.double(), name, limit)
    expected[invalid] = 0
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", ("silu", "gelu", "gelu_tanh", "swigluoai"))
def test_gates_at_extremes(name):
    g = torch.tensor([32.0, 33.5, 1e4, 3e38, -104.0, -110.0, -1e4, -3e38, 0.0, -0.0])
    h = torch.stack([g, torch.zeros_like(g)], 1) if name == "swigluoai" else torch.stack([g, torch.ones_like(g)], 1)
    out = torch.empty(len(g), 1)
    ids = torch.zeros(len(g), dtype=torch.int32)
    activate(h, out, name, float("inf"), 1.702, ids, num_experts=1, num_local_experts=1)
    assert torch.equal(out.flatten()[:4], g[:4])
    assert (out.flatten()[4:] == 0).all()


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("granularity", ("tensor", "token", "group"))
def test_quantize(granularity, weighted):
    x = torch.randn(19, 300, generator=torch.Generator().manual_seed(0)).bfloat16() * 30
    x[3] = 0
    x[4, 7] = math.nan
    weight = torch.rand(19, generator=torch.Generator().manual_seed(1)) if weighted else None
    codes, scale = quantize_fp8(x, granularity, router_weight=weight)
    v = x.float() * weight[:, None] if weighted else x.float()
    magnitude = v.nan_to_num(0.0).abs()
    if granularity == "group":
        padded = torch.nn.functional.pad(magnitude, (0, 84)).view(19, 3, 128)
        amax = padded.amax(-1)
    else:
        amax = magnitude.amax(1) if granularity == "token" else magnitude.amax().view(1)
    expected_scale = amax.clamp(min=AMAX_FLOOR) / 448.0
    assert torch.equal(scale, expected_scale)
    per_element = scale.repeat_interleave(128, 1)[:, :300] if granularity == "group" else scale.view(-1, 1)
    expected = (v / per_element).clamp(-448, 448).to(E4M3)
    assert torch.equal(codes.float().nan_to_num(999.0), expected.float().nan_to_num(999.0))
    assert codes[4, 7].float().isnan() and codes.float().isnan().sum() == 1


def test_quantize_static_saturates():
    x = torch.tensor([[1.0, -1000.0, math.inf, math.nan]])
    codes, scale = quantize_fp8(x, "tensor", torch.tensor([0.5]))
    assert codes.float()[0, :3].tolist() == [2.0, -448.0, 448.0] and codes.float()[0, 3].isnan()
    assert scale.tolist() == [0.5]
    with pytest.raises(ValueError, match="top_k=2"):
        quantize_fp8(x, "token", router_weight=torch.ones(1), top_k=2)
