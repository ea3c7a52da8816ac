"""kernels/layout.py: conversions are exact, happen once, and refuse what the layout tag does not explain."""

from dataclasses import replace

import pytest
import torch

from kernels.layout import ExpertWeights, to_kn, to_nk


def weights(experts=2, hidden=256, inner=384, dtype=torch.bfloat16, granularity=None, gated=True, **changes):
    outer = inner * (2 if gated else 1)
    made = {"w13": codes((experts, outer, hidden), dtype), "w2": codes((experts, hidden, inner), dtype)}
    scales = {
        None: {},
        "tensor": {"w13_scale": torch.rand(experts), "w2_scale": torch.rand(experts)},
        "channel": {"w13_scale": torch.rand(experts, outer), "w2_scale": torch.rand(experts, hidden)},
        "block": {
            "w13_scale": torch.rand(experts, -(-outer // 128), -(-hidden // 128)),
            "w2_scale": torch.rand(experts, -(-hidden // 128), -(-inner // 128)),
        },
    }.get(granularity, {})
    sizes = dict(hidden_size=hidden, intermediate_size=inner, gated=gated)
    return ExpertWeights(**{**made, **scales, **sizes, "layout": "nk", "granularity": granularity, **changes})


def codes(shape, dtype):
    """Every byte pattern, NaN included, where elements are bytes."""
    count = torch.Size(shape).numel()
    if dtype.itemsize == 1:
        return (torch.arange(count) % 251 + torch.arange(count) // 251).to(torch.uint8).view(dtype).reshape(shape)
    return torch.randn(shape).to(dtype)


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("granularity", [None, "tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_round_trip_is_exact_and_transposes_every_element(dtype, granularity):
    before = weights(dtype=dtype, granularity=granularity, hidden=200)
    there = to_kn(before)
    assert there.layout == "kn" and there.w13.shape == (2, 200, 768) and there.w2.shape == (2, 384, 200)
    assert there.w13.is_contiguous() and there.w2.is_contiguous() and there.w13.dtype == dtype
    for name in ("w13", "w2"):
        assert torch.equal(bits(getattr(there, name)), bits(getattr(before, name)).transpose(1, 2))
    back = to_nk(there)
    for name in ("w13", "w2", "w13_scale", "w2_scale"):
        old, new = getattr(before, name), getattr(back, name)
        assert (old is None and new is None) or torch.equal(bits(old), bits(new)), name
    assert back.layout == "nk"


def test_block_scales_move_with_their_weights_and_others_stay():
    block = weights(granularity="block")
    moved = to_kn(block)
    assert moved.w13_scale.shape == (2, 2, 6) and moved.w13_scale.is_contiguous()
    assert torch.equal(moved.w13_scale, block.w13_scale.transpose(1, 2))
    assert torch.equal(moved.w2_scale, block.w2_scale.transpose(1, 2))
    for granularity in ("tensor", "channel"):
        kept = weights(granularity=granularity)
        assert to_kn(kept).w13_scale is kept.w13_scale and to_kn(kept).w2_scale is kept.w2_scale


def test_a_second_conversion_is_refused():
    once = to_kn(weights())
    with pytest.raises(ValueError, match="in layout 'kn' already.*transpose them back"):
        to_kn(once)
    with pytest.raises(ValueError, match="in layout 'nk' already"):
        to_nk(weights())


@pytest.mark.parametrize("hidden, inner", [(256, 128), (128, 128), (128, 64)], ids=["K=2I", "K=I", "K=2I small"])
def test_the_tag_decides_where_shapes_cannot(hidden, inner):
    square = weights(hidden=hidden, inner=inner, gated=hidden != inner)
    there = to_kn(square)
    assert there.layout == "kn" and torch.equal(there.w13, square.w13.transpose(1, 2))
    with pytest.raises(ValueError, match="already"):
        to_kn(there)


def test_the_mismatch_of_pull_request_40109():
    """Weights converted once, tagged as if they were not: vLLM's assertion was 'Hidden size mismatch 2048 != 384'."""
    moved = to_kn(weights(hidden=2048, inner=192))
    mistaken = ExpertWeights(moved.w13, moved.w2, "nk", hidden_size=2048, intermediate_size=192)
    message = r"Hidden size mismatch 2048 != 384: w13 is \[2, 2048, 384\].*shapes of layout 'kn'"
    with pytest.raises(ValueError, match=message):
        to_kn(mistaken)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layout": "kk"}, "layout='kk'; valid: 'nk', 'kn'"),
        ({"granularity": "row"}, "granularity='row'; valid:"),
        ({"w2": torch.zeros(2, 256, 385)}, r"w2 is \[2, 256, 385\].*wants \[2, 256, 384\]"),
        ({"w2": torch.zeros(3, 256, 384)}, r"w2 is \[3, 256, 384\].*wants \[2, 256, 384\]"),
        ({"w2": torch.zeros(2, 255, 384)}, "Hidden size mismatch 256 != 255: w2"),
        ({"w13": torch.zeros(2, 384, 256)}, r"w13 is \[2, 384, 256\].*gated=True wants \[2, 768, 256\]"),
        ({"w13": torch.zeros(768, 256)}, r"w13 is \[768, 256\]"),
        ({"w13_scale": torch.ones(2)}, "w13_scale: given with scale granularity None"),
        ({"granularity": "tensor", "w13_scale": None}, "w13_scale: missing with scale granularity 'tensor'"),
    ],
)
def test_a_misfit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        to_kn(weights(**changes))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_scales_of_the_wrong_shape_are_named(granularity):
    with pytest.raises(ValueError, match=f"w2_scale: shape .*granularity '{granularity}' in layout 'nk'"):
        to_kn(weights(granularity=granularity, w2_scale=torch.ones(2, 7)))


def test_block_scales_left_behind_are_noticed():
    """Weights transposed, their block scales not: the other half of the mistake."""
    moved = to_kn(weights(granularity="block"))
    with pytest.raises(ValueError, match=r"w13_scale: shape \(2, 6, 2\); valid: \(2, 2, 6\) = .*layout 'kn'"):
        to_nk(replace(moved, w13_scale=weights(granularity="block").w13_scale))


def test_converted_weights_never_share_memory_with_the_original():
    thin = weights(experts=1, hidden=1, inner=1, gated=False)
    moved = to_kn(thin)
    thin.w13.fill_(7)
    assert moved.w13.item() != 7
