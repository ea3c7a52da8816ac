"""The stand-ins for the native operators of vllm-xpu-kernels: they do what those do, and refuse or misread the same."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kernels.upstream import vllm_xpu_operators as ops


def remapped(ids, expert_map=None, local=3):
    """(copies, rows of each expert, places) of a row for each token: 1, 2, ..."""
    hidden = torch.arange(1.0, len(ids) + 1)[:, None].expand(-1, 8).bfloat16().contiguous()
    copies = torch.zeros(ids.numel(), hidden.shape[1], dtype=hidden.dtype)
    counts, places = torch.zeros(local, dtype=torch.int32), torch.zeros(ids.shape, dtype=torch.int32)
    total = local if expert_map is None else len(expert_map)
    ops.remap_hidden_states(hidden, None, copies, None, expert_map, counts, places, ids, total, local)
    return copies, counts, places


def test_remap_sorts_by_expert_and_leaves_the_rest_unwritten():
    copies, counts, places = remapped(torch.tensor([[2, 0], [0, -1]], dtype=torch.int32))
    assert counts.tolist() == [2, 0, 1]
    assert places.tolist() == [[2, 0], [1, -1]]
    assert copies[:3, 0].tolist() == [1, 2, 1] and copies[3].isnan().all()


def test_remap_reads_memory_not_views():
    wide = torch.tensor([[0, 1, 2], [2, 2, 2]], dtype=torch.int32)
    assert remapped(wide[:, :2])[2].tolist() == remapped(torch.tensor([[0, 1], [2, 2]], dtype=torch.int32))[2].tolist()
    assert remapped(torch.tensor([[2**32 + 1, 0]]))[1].tolist() == [1, 1, 0]  # ids of 64 bits are cut to 32


@pytest.mark.parametrize(
    ("ids", "expert_map", "error", "told"),
    [
        ([[0, 1, 2]], None, RuntimeError, "Unsupported TopK value"),
        ([[3, 0]], None, IndexError, "expert 3 of 3"),
        ([[-1, 0]], [0, 1, 2, -1], IndexError, r"expert_map\[-1\] of 4"),
    ],
)
def test_remap_refuses_and_reads_outside(ids, expert_map, error, told):
    expert_map = expert_map and torch.tensor(expert_map, dtype=torch.int32)
    with pytest.raises(error, match=told):
        remapped(torch.tensor(ids, dtype=torch.int32), expert_map)


def gemm(a, b, scale=None, bias=None, rows=None, d=None):
    n, k = (b.shape[2], b.shape[1]) if b.dtype != torch.int8 else (b.shape[1], 2 * b.shape[2])
    d = torch.zeros(len(a), n, dtype=a.dtype) if d is None else d
    rows = torch.tensor([len(a)] if rows is None else rows, dtype=torch.int32)
    return ops.cutlass_grouped_gemm_interface(a, None, b, scale, bias, d, rows, n, k, len(b))


def test_gemm_products_bias_and_unwritten_rows():
    a, b, bias = torch.ones(3, 8).bfloat16(), torch.ones(2, 8, 16).bfloat16(), torch.full((2, 16), 0.5).bfloat16()
    b[1] *= 2
    d = gemm(a, b, bias=bias, rows=[1, 1])
    assert d[0].tolist() == [8.5] * 16 and d[1].tolist() == [16.5] * 16 and d[2].isnan().all()


def test_gemm_scales():
    a, codes = torch.ones(1, 128).half(), torch.ones(1, 128, 128).to(torch.float8_e4m3fn)
    assert gemm(a, codes, torch.tensor([0.5]))[0, 0] == 64
    one_third = torch.full((1, 1, 1), 1 / 3)
    assert gemm(a, codes, one_third)[0, 0] == (128 * torch.tensor(1 / 3).half().float()).half()
    with pytest.raises(RuntimeError, match="must have scales"):
        gemm(a, codes)
    with pytest.raises(RuntimeError, match="must not have scales"):
        gemm(a, codes.half(), torch.tensor([0.5]))


def test_gemm_silently_has_no_kernel_for_float32():
    assert gemm(torch.ones(1, 8), torch.ones(1, 8, 8)).isnan().all()


def test_gemm_writes_the_dtype_of_its_input_into_any_output():
    d = gemm(torch.ones(2, 8).bfloat16(), torch.ones(1, 8, 8).bfloat16(), d=torch.zeros(2, 8))
    assert d.view(torch.bfloat16)[0].tolist() == [8] * 16 and d[1].isnan().all()


def test_gather_adds_in_float32_and_leaves_out_what_has_no_row():
    rows = torch.tensor([[1.0], [2.0**-9], [torch.nan]]).expand(-1, 8).bfloat16().contiguous()
    out = torch.full((2, 8), torch.nan).bfloat16()
    weights = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    ops.moe_gather(out, rows, weights, torch.tensor([[0, 1], [-1, -1]], dtype=torch.int32), 2)
    assert out[0, 0] == torch.tensor(1 + 2.0**-9).bfloat16() and not out[1].any()


def test_activations_round_where_the_operators_do():
    library = redirected()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(4, 8).bfloat16()
    library.silu_and_mul(out, x)
    assert torch.equal(out, torch.nn.functional.silu(x[:, :8].float()).bfloat16() * x[:, 8:])
    library.swigluoai_and_mul(out, x * 9)
    gate, up = (x * 9)[:, ::2].float().clamp(max=7), (x * 9)[:, 1::2].float().clamp(-7, 7)
    assert torch.equal(out, (gate * torch.sigmoid(1.702 * gate) * (up + 1)).bfloat16())
    library.relu2_no_mul(out, torch.full((4, 8), torch.nan).bfloat16())
    assert not out.any()  # NaN is lost, as in the operator


def redirected():
    """torch.ops._C, as a redirected module finds it."""
    module = ModuleType("somebody's")
    ops.redirect(module)
    return module.torch.ops._C


def test_the_real_names_stay_free():
    redirected()
    assert not hasattr(torch.ops._xpu_C, "cutlass_grouped_gemm_interface")
    assert not hasattr(torch.ops._moe_C, "remap_hidden_states")
