"""reference.quant against plain NumPy loops in float32 and ml_dtypes' fp8, ragged blocks included."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from reference.formats import FORMATS, decode, round_to, torch_dtype, ulp
from reference.quant import dequantize_weight, expand_scale, quantize_activation, quantize_weight
from reference.scheme import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES, activation_scheme, weight_scheme

PEERS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
#: Activations with a dynamic scale.
DYNAMIC = [name for name, granularity in ACTIVATION_GRANULARITIES.items() if not granularity.static]
SHAPES = [(2, 256, 128), (3, 200, 300), (1, 1, 129), (2, 130, 64), (1, 128, 1)]


def bf16_values(*shape, seed=0):
    """Random bf16 numbers, as weights and activations are, of very different sizes from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    size = torch.randint(-6, 7, (*shape[:-1], 1), generator=generator)
    return round_to(x * 2.0**size, "bf16")


def slices(granularity, n, k):
    """The pieces of an [n, k] matrix that share a scale: (index of the scale, rows, columns)."""
    if granularity == "tensor":
        yield (), slice(0, n), slice(0, k)
    elif granularity in ("channel", "token"):
        for i in range(n):
            yield (i,), slice(i, i + 1), slice(0, k)
    else:
        height = 128 if granularity == "block" else 1
        for i in range(0, n, height):
            for j in range(0, k, 128):
                yield (i // height, j // 128), slice(i, i + height), slice(j, j + 128)


@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PEERS)
def test_weights_against_numpy(name, shape, granularity):
    w = bf16_values(*shape)
    w[0, -1] = 0.0
    codes, scale = quantize_weight(w, weight_scheme(name, granularity))
    assert codes.shape == w.shape and codes.dtype == torch_dtype(name)
    assert scale.dtype == torch.float32 and tuple(scale.shape) == WEIGHT_GRANULARITIES[granularity].scale_shape(w.shape)
    dequantized = dequantize_weight(codes, scale, weight_scheme(name, granularity))
    largest = np.float32(FORMATS[name].max)
    for e in range(shape[0]):
        for index, rows, columns in slices(granularity, *shape[1:]):
            piece = w[e, rows, columns].numpy().astype(np.float32)
            expected = np.abs(piece).max() / largest
            if expected == 0:
                expected = np.float32(1)
            assert scale[(e, *index)].item() == expected
            values = (piece.astype(np.float64) / np.float64(expected)).clip(-largest, largest)
            rounded = round_to(torch.from_numpy(values), name)
            assert torch.equal(decode(codes[e, rows, columns]), rounded)
            assert torch.equal(dequantized[e, rows, columns], rounded * float(expected))
            # ml_dtypes rounds twice from float64 (through float32), so it may differ by one step on a near tie.
            theirs = torch.from_numpy(values.astype(PEERS[name]).astype(np.float64))
            assert ((theirs - rounded).abs() <= ulp(rounded, name)).all()


@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
def test_one_expert_dequantizes_as_in_the_whole(granularity):
    w = bf16_values(3, 200, 300)
    codes, scale = quantize_weight(w, weight_scheme("e4m3", granularity))
    whole = dequantize_weight(codes, scale, weight_scheme("e4m3", granularity))
    for e in range(3):
        assert torch.equal(dequantize_weight(codes[e], scale[e], weight_scheme("e4m3", granularity)), whole[e])


@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
def test_quantizing_again_changes_nothing(granularity):
    codes, scale = quantize_weight(bf16_values(2, 200, 300), weight_scheme("e4m3", granularity))
    w = dequantize_weight(codes, scale, weight_scheme("e4m3", granularity))
    # The largest code is +-448, unless scale was rounded, so the same scale comes out and the codes with it.
    codes2, scale2 = quantize_weight(w, weight_scheme("e4m3", granularity))
    assert torch.equal(scale, scale2) and torch.equal(codes.view(torch.uint8), codes2.view(torch.uint8))


def test_error_is_at_most_half_a_step():
    w = bf16_values(2, 200, 300)
    for granularity in WEIGHT_GRANULARITIES:
        codes, scale = quantize_weight(w, weight_scheme("e4m3", granularity))
        scale = expand_scale(scale.double(), WEIGHT_GRANULARITIES[granularity], w.shape)
        error = decode(codes) * scale - w
        # amax / scale may exceed 448 by a float32 rounding and is then cut off.
        half = ulp((w / scale).clamp(-448, 448), "e4m3") / 2 + 448 * 2.0**-24
        assert (error.abs() <= half * scale).all()


def test_zero_and_tiny_weights():
    w = torch.zeros(2, 128, 256, dtype=torch.float64)
    w[1] = 2.0**-149  # amax / 448 underflows float32
    for granularity in WEIGHT_GRANULARITIES:
        codes, scale = quantize_weight(w, weight_scheme("e4m3", granularity))
        assert (scale == 1).all() and (decode(codes) == 0).all()


@pytest.mark.parametrize("granularity", DYNAMIC)
@pytest.mark.parametrize("m, k", [(4, 256), (3, 300), (1, 1), (5, 127), (2, 129)])
def test_activations_against_numpy(m, k, granularity):
    x = bf16_values(m, k)
    x[-1] = 0.0
    codes, scale = quantize_activation(x, activation_scheme(granularity))
    unrounded, scale_u = quantize_activation(x, activation_scheme(granularity), rounded=False)
    assert codes.shape == scale.shape == x.shape and codes.dtype == scale.dtype == torch.float64
    assert torch.equal(scale, scale_u)
    for _, rows, columns in slices(granularity, m, k):
        piece = x[rows, columns].numpy().astype(np.float32)
        expected = float(np.maximum(np.abs(piece).max(), np.float32(1e-10)) / np.float32(448))
        assert (scale[rows, columns] == expected).all()
        ratio = (x[rows, columns] / expected).clamp(-448, 448)
        assert torch.equal(unrounded[rows, columns], ratio)
        assert torch.equal(codes[rows, columns], round_to(ratio, "e4m3"))


def test_zero_rows_have_the_floor_as_scale_and_no_nan():
    x = torch.zeros(2, 256, dtype=torch.float64)
    x[1] = 2.0**-40  # below the floor of 1e-10
    for granularity in DYNAMIC:
        codes, scale = quantize_activation(x, activation_scheme(granularity))
        assert (scale == float(np.float32(1e-10) / np.float32(448))).all()
        assert (codes[0] == 0).all()
    codes, scale = quantize_activation(x, activation_scheme("token"), amax_floor=448.0)
    assert (scale == 1).all() and (codes == 0).all()


def test_static_scale_saturates_also_without_rounding():
    x = torch.tensor([[1.0, 447.0, 448.0, 464.0, 1e6, math.inf, -math.inf, math.nan]], dtype=torch.float64)
    codes, scale = quantize_activation(x, activation_scheme("tensor"), static_scale=1.0)
    assert torch.equal(codes[0, :7], torch.tensor([1.0, 448, 448, 448, 448, 448, -448], dtype=torch.float64))
    assert torch.isnan(codes[0, 7]) and (scale == 1).all()
    codes, _ = quantize_activation(x, activation_scheme("tensor"), static_scale=torch.tensor(1.0), rounded=False)
    assert torch.equal(codes[0, :7], torch.tensor([1.0, 447, 448, 448, 448, 448, -448], dtype=torch.float64))
    _, scale = quantize_activation(x, activation_scheme("tensor"), static_scale=0.1)
    assert (scale == float(np.float32(0.1))).all()  # stored in float32


def test_nan_stays_where_it_is_and_does_not_reach_the_scale():
    x = bf16_values(3, 300)
    for granularity in DYNAMIC:
        with_nan = x.clone()
        position = (1, int((x[1].abs() < x[1].abs().max() / 2).nonzero()[0]))
        with_nan[position] = math.nan
        codes, scale = quantize_activation(with_nan, activation_scheme(granularity))
        expected_codes, expected_scale = quantize_activation(x, activation_scheme(granularity))
        assert torch.equal(scale, expected_scale)
        assert torch.isnan(codes).sum() == 1 and torch.isnan(codes[position])
        codes[position] = expected_codes[position]
        assert torch.equal(codes, expected_codes)


def test_infinity_makes_its_own_group_nan_and_no_other():
    x = bf16_values(2, 300)
    x[1, 200] = math.inf
    codes, scale = quantize_activation(x, activation_scheme("group"))
    value = codes * scale
    assert torch.isnan(value[1, 128:256]).all()
    assert torch.isfinite(value[0]).all() and torch.isfinite(value[1, :128]).all()


def test_no_rows():
    x = torch.zeros(0, 300, dtype=torch.float64)
    for granularity in DYNAMIC:
        codes, scale = quantize_activation(x, activation_scheme(granularity))
        assert codes.shape == scale.shape == (0, 300)


def test_expand_scale():
    scale = torch.arange(6.0).reshape(2, 3)
    full = expand_scale(scale, WEIGHT_GRANULARITIES["block"], (130, 260))
    assert full.shape == (130, 260)
    assert full[127, 127] == 0 and full[128, 127] == 3 and full[127, 128] == 1 and full[129, 259] == 5
    full = expand_scale(scale, ACTIVATION_GRANULARITIES["group"], (2, 260))
    assert full[1, 127] == 3 and full[1, 128] == 4 and full[0, 259] == 2


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_the_accelerator_agrees_with_the_cpu():
    device = torch.accelerator.current_accelerator()
    w = bf16_values(2, 200, 300)
    for granularity in WEIGHT_GRANULARITIES:
        codes, scale = quantize_weight(w.to(device), weight_scheme("e4m3", granularity))
        dequantized = dequantize_weight(codes, scale, weight_scheme("e4m3", granularity)).cpu()
        here = quantize_weight(w, weight_scheme("e4m3", granularity))
        assert torch.equal(dequantized, dequantize_weight(*here, weight_scheme("e4m3", granularity)))
    for granularity in DYNAMIC:
        for theirs, ours in zip(
            quantize_activation(w[0].to(device), activation_scheme(granularity)),
            quantize_activation(w[0], activation_scheme(granularity)),
        ):
            assert torch.equal(theirs.cpu(), ours)
    codes, _ = quantize_activation(w[0].to(device), activation_scheme("tensor"), static_scale=0.5)
    assert torch.equal(codes.cpu(), quantize_activation(w[0], activation_scheme("tensor"), static_scale=0.5)[0])


def test_errors_name_the_field_the_value_and_what_is_valid():
    w = torch.zeros(1, 128, 128, dtype=torch.float64)
    with pytest.raises(ValueError, match="granularity is 'token'; valid are tensor, channel, block"):
        quantize_weight(w, weight_scheme("e4m3", "token"))
    with pytest.raises(ValueError, match="format is 'bf16'; valid are e4m3, e5m2"):
        quantize_weight(w, weight_scheme("bf16", "tensor"))
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        quantize_weight(w + math.nan, weight_scheme("e4m3", "tensor"))
    with pytest.raises(ValueError, match=r"scale has shape \(1, 2\); .* needs \(1, 1, 1\)"):
        expand_scale(torch.ones(1, 2), WEIGHT_GRANULARITIES["block"], w.shape)
    with pytest.raises(ValueError, match="a static scale is one for all rows and columns"):
        quantize_activation(w[0], activation_scheme("token"), static_scale=1.0)
    for static_scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"static_scale is {static_scale}; valid is one positive"):
            quantize_activation(w[0], activation_scheme("tensor"), static_scale=static_scale)
