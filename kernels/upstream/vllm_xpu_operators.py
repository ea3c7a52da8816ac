"""Stand-ins for the native operators of vllm-xpu-kernels, for machines without an XPU: emulation, in plain torch.

The wheel's Python (XpuFusedMoe: what it captures, which sizes, dtypes and maps it hands over) then runs unchanged, on
CPU tensors. The operators follow their C++ (commit 4543b58), including what a device would do with arguments that
no code checks:

    memory    is read and written from the data pointer on: strides are ignored, and dtypes are reinterpreted
    unwritten is NaN: rows that no expert gets, a product in a dtype that the GEMM has no kernel for
    outside   reads beyond expert_map and ids beyond the experts raise IndexError; a device goes on with what lies there

They are operators of a namespace of their own. The real names are not taken: vLLM's CPU extension defines
`_C::silu_and_mul` too, which rounds otherwise, and a second definition ends the process. `redirect` lets the modules of
the wheel find them by their real names, and nobody else.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "moe_harness_xpu"
TOP_K = (1, 2, 4, 6, 7, 8, 10, 12, 16)  #: what the wheel's templates are instantiated for
MOST_EXPERTS = 1024  #: local ones, whose offsets one work group holds
BLOCK = 128
_GROUP_SIZES = (32, 64, 128, 256)
_HALVES = (torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_lock = threading.Lock()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _memory(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """The memory from the tensor's data pointer on, as a kernel sees it: dense, in the dtype that it believes in."""
    dtype = dtype or tensor.dtype
    storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    if start + math.prod(shape) * dtype.itemsize > storage.nbytes():
        raise IndexError(f"reads {list(shape)} {dtype} from a tensor {list(tensor.shape)} {tensor.dtype}: beyond it")
    stride = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(storage, start // dtype.itemsize, shape, stride)


def _local(topk_ids: Tensor, expert_map: Tensor | None, local_experts: int) -> Tensor:
    """The local expert of every id, or -1."""
    local = _memory(topk_ids, tuple(topk_ids.shape)).int().long()  # ids of 64 bits are cut to 32
    if expert_map is not None:
        outside = (local < 0) | (local >= len(expert_map))
        if outside.any():
            raise IndexError(f"reads expert_map[{int(local[outside][0])}] of {len(expert_map)} entries: outside it")
        local = _memory(expert_map, tuple(expert_map.shape))[local].long()
    wrong = (local != -1) & ((local < 0) | (local >= local_experts))
    if wrong.any():
        raise IndexError(f"counts a row for expert {int(local[wrong][0])} of {local_experts} local ones: outside")
    return local


def remap_hidden_states(
    hidden_states: Tensor, hidden_states_scales: Tensor | None, remapped_hidden_states: Tensor,
    remapped_hidden_states_scales: Tensor | None, expert_map: Tensor | None, rows_per_expert: Tensor,
    unpermuted_row_to_permuted_row: Tensor, topk_ids: Tensor, total_experts_num: int, local_experts_num: int,
) -> None:  # fmt: skip
    """Copies every row once for each of its local experts, sorted by expert; counts them; says where they went."""
    (tokens, hidden), top_k = hidden_states.shape, topk_ids.shape[1]
    _require(hidden_states.dtype == remapped_hidden_states.dtype, "hidden_states and its copy differ in dtype")
    _require(expert_map is None or expert_map.dtype == torch.int32, "expert_map must be int32")
    _require(rows_per_expert.dtype == torch.int32, "rows_per_expert must be int32")
    _require(topk_ids.dtype in (torch.int32, torch.int64), "topk_ids must be int64 or int32")
    _require(tuple(remapped_hidden_states.shape) == (tokens * top_k, hidden), "wrong shape of the remapped rows")
    _require(expert_map is None or len(expert_map) == total_experts_num, "expert_map must be [total_experts_num]")
    _require(len(rows_per_expert) == local_experts_num, "rows_per_expert must be [local_experts_num]")
    _require(len(topk_ids) == tokens, "topk_ids must be [num_rows, TopK]")
    _require(top_k in TOP_K, "Unsupported TopK value")
    _require(local_experts_num <= MOST_EXPERTS, "local_experts_num exceeds the maximum supported number")
    _require(hidden % (16 // hidden_states.element_size()) == 0, "hidden_size must be divisible by ElemsPerItem")
    local = _local(topk_ids, expert_map, local_experts_num).flatten()
    order = torch.argsort(local, stable=True)
    order = order[int((local == -1).sum()) :]
    places = torch.full_like(local, -1)
    places[order] = torch.arange(len(order), device=local.device)
    rows_per_expert += torch.bincount(local[order], minlength=local_experts_num).to(torch.int32)
    _memory(unpermuted_row_to_permuted_row, (tokens * top_k,)).copy_(places)
    for rows, copies in (
        (hidden_states, remapped_hidden_states), (hidden_states_scales, remapped_hidden_states_scales)
    ):  # fmt: skip
        if rows is not None and copies is not None:
            copies.fill_(torch.nan)
            copies[: len(order)] = _memory(rows, tuple(rows.shape))[order // top_k]


def init_expert_map(expert_map: Tensor, num_experts: int, ep_rank: int, ep_size: int) -> None:
    """Experts in contiguous runs, one for each rank."""
    _require(expert_map.dtype == torch.int32, "expert_map must be int32")
    mine = torch.arange(num_experts * ep_size, device=expert_map.device) - ep_rank * num_experts
    expert_map.copy_(torch.where((mine >= 0) & (mine < num_experts), mine, -1))


def _weights(ptr_B: Tensor, scales: Tensor | None, expert: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(W [K, N] as it enters the matrix unit, a factor for the accumulator)."""
    b = ptr_B[expert]
    if ptr_B.dtype == torch.int8:
        nibbles = torch.stack((b << 4, b), -1).flatten(-2) >> 4  # two's complement, the lower K in the lower bits
        assert scales is not None
        group = scales[expert].repeat_interleave(nibbles.shape[1] // scales.shape[2], 1)
        return (nibbles.float() * group.float()).to(dtype).float().T, 1.0
    if ptr_B.dtype not in _FP8:
        return b.float(), 1.0
    assert scales is not None
    if scales.ndim == 1:
        return b.float(), float(scales[expert])
    block = scales[expert].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    if dtype == torch.float16:  # there the scale itself is kept in half precision
        block = block.half().float()
    return (b.float() * block).to(dtype).float(), 1.0  # fp8 times scale is rounded to the activations' dtype


def _require_gemm(a: Tensor, b: Tensor, scales: Tensor | None, bias: Tensor | None, d: Tensor, n: int, k: int) -> bool:
    """The GEMM's own checks; whether it has a kernel for these dtypes: otherwise it returns without having run."""
    experts = b.shape[0]
    fp8, int4 = b.dtype in _FP8, b.dtype == torch.int8 and scales is not None
    _require(n % 8 == 0, "N must be divisible by 8")
    _require(a.ndim == 2 and b.ndim == 3 and d.ndim == 2, "A and D must be 2D, B 3D")
    _require(bias is None or bias.ndim == 2, "ptr_bias must be 2D [num_experts, N]")
    for name, tensor in (("ptr_A", a), ("ptr_B", b), ("ptr_D", d), ("ptr_bias", bias), ("ptr_scales", scales)):
        _require(tensor is None or tensor.is_contiguous(), f"{name} must be contiguous")
    b_k, b_n = (b.shape[2] * 2, b.shape[1]) if int4 else b.shape[1:]
    _require(len(a) == len(d), "ptr_A.size(0) must match ptr_D.size(0)")
    _require(a.shape[1] == b_k == k, "ptr_A.size(1) must match ptr_B.size(1)")
    _require(b_n == d.shape[1] == n, "ptr_B.size(2) must match ptr_D.size(1)")
    _require(bias is None or tuple(bias.shape) == (experts, n), "ptr_bias must be [num_experts, N]")
    if not (fp8 or int4):
        _require(scales is None, "w16a16 grouped gemm must not have scales")
        return a.dtype in _HALVES
    _require(scales is not None, "w8a16 grouped gemm must have scales")
    assert scales is not None
    _require(len(scales) == experts, "ptr_scales.size(0) must match num_experts")
    if int4:
        _require(scales.ndim == 3 and scales.shape[1] == n, "ptr_scales of int4 must be 3D [E, N, K/group]")
        _require(k // scales.shape[2] in _GROUP_SIZES, "group_size must be 32, 64, 128 or 256")
    elif scales.ndim == 3 and scales.dtype == torch.float32:
        _require(n % BLOCK == 0 and k % BLOCK == 0, "block-fp8 requires K and N divisible by 128")
        _require(tuple(scales.shape[1:]) == (k // BLOCK, n // BLOCK), "block-fp8 scales must be [E, K/128, N/128]")
        _require(a.dtype in _HALVES, "block-fp8 grouped gemm requires A in {fp16,bf16}")
    elif scales.ndim == 1:
        _require(scales.dtype == torch.float32, "ptr_scales must be float")
    else:
        raise NotImplementedError(f"scales {list(scales.shape)} {scales.dtype}: mxfp8 has no stand-in")
    return a.dtype in _HALVES


def cutlass_grouped_gemm_interface(
    ptr_A: Tensor, ptr_A_scale: Tensor | None, ptr_B: Tensor, ptr_B_scale: Tensor | None, ptr_bias: Tensor | None,
    ptr_D: Tensor, rows_per_expert: Tensor, N: int, K: int, num_experts: int,
) -> Tensor:  # fmt: skip
    """D = A @ B[expert] (+ bias), float32 accumulators; ptr_A_scale is not read."""
    _require(len(ptr_B) == num_experts, "ptr_B.size(0) must match num_experts")
    ptr_D.fill_(torch.nan)
    if not _require_gemm(ptr_A, ptr_B, ptr_B_scale, ptr_bias, ptr_D, N, K):
        return ptr_D
    d = _memory(ptr_D, (len(ptr_A), N), ptr_A.dtype)
    bias = None if ptr_bias is None else _memory(ptr_bias, (num_experts, N), ptr_A.dtype)
    start = 0
    for expert, rows in enumerate(rows_per_expert.tolist()):
        if rows:
            w, factor = _weights(ptr_B, ptr_B_scale, expert, ptr_A.dtype)
            product = (ptr_A[start : start + rows].float() @ w) * factor
            d[start : start + rows] = product if bias is None else product + bias[expert].float()
        start += rows
    return ptr_D


def moe_gather(
    output: Tensor, moe_output: Tensor, topk_weights: Tensor, unpermuted_row_to_permuted_row: Tensor, num_experts: int
) -> None:
    """output [T, K] = sum over k, in order and in float32, of weight * row; slots without a row are left out."""
    (tokens, top_k), hidden = topk_weights.shape, output.shape[1]
    _require(topk_weights.dtype == torch.float32, "topk_weights must be float32")
    _require(top_k in TOP_K, f"error: not support TOPK={top_k}")
    places = _memory(unpermuted_row_to_permuted_row, (tokens, top_k)).long()
    rows = _memory(moe_output, tuple(moe_output.shape), output.dtype)
    weights = _memory(topk_weights, (tokens, top_k))
    total = torch.zeros(tokens, hidden, device=output.device)
    for slot in range(top_k):
        there = (places[:, slot] != -1).nonzero()[:, 0]
        total[there] += rows[places[there, slot]].float() * weights[there, slot, None]
    _memory(output, (tokens, hidden)).copy_(total)


def _act_and_mul(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    def op(out: Tensor, input: Tensor) -> None:
        gate, up = input.chunk(2, -1)
        out.copy_(act(gate.float()).to(input.dtype) * up)  # act(gate) is rounded before it meets up

    return op


def _swigluoai_and_mul(out: Tensor, input: Tensor, alpha: float = 1.702, limit: float = 7.0) -> None:
    gate = input[..., ::2].float().clamp(max=limit)
    up = input[..., 1::2].float().clamp(-limit, limit)
    out.copy_((up + 1) * (gate * torch.sigmoid(gate * alpha)))


def _relu2_no_mul(out: Tensor, input: Tensor) -> None:
    x = input.float()
    out.copy_(torch.where(x > 0, x, 0.0).square())  # NaN is not above zero


#: Schemas as in the C++, whether they tell what is written or not.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "remap_hidden_states(Tensor hidden_states, Tensor? hidden_states_scales, Tensor remapped_hidden_states, "
    "Tensor? remapped_hidden_states_scales, Tensor? expert_map, Tensor rows_per_expert, "
    "Tensor unpermuted_row_to_permuted_row, Tensor topk_ids, int total_experts_num, int local_experts_num) -> ()":
        remap_hidden_states,
    "init_expert_map(Tensor expert_map, int num_experts, int ep_rank, int ep_size) -> ()": init_expert_map,
    "cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, "
    "Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, int N, int K, int num_experts) -> Tensor":
        cutlass_grouped_gemm_interface,
    "moe_gather(Tensor! output, Tensor moe_output, Tensor topk_weights, Tensor unpermuted_row_to_permuted_row, "
    "int num_experts) -> ()": moe_gather,
    "silu_and_mul(Tensor! result, Tensor input) -> ()": _act_and_mul(lambda x: x / (1 + torch.exp(-x))),
    "gelu_and_mul(Tensor! out, Tensor input) -> ()": _act_and_mul(torch.nn.functional.gelu),
    "gelu_tanh_and_mul(Tensor! out, Tensor input) -> ()":
        _act_and_mul(lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "swigluoai_and_mul(Tensor! out, Tensor input, float alpha=1.702, float limit=7.0) -> ()": _swigluoai_and_mul,
    "relu2_no_mul(Tensor! out, Tensor! input) -> ()": _relu2_no_mul,
    "is_xe2_arch(int device_index=-1) -> bool": lambda device_index=-1: True,
    "is_xe3_arch(int device_index=-1) -> bool": lambda device_index=-1: False,
}  # fmt: skip


@cache
def _library() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")  # unregistered with its last reference: cached
    for schema, function in _OPERATORS.items():
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU" if "Tensor" in schema else "CompositeExplicitAutograd")
    return library


class _Ops:
    """torch.ops, but for the three namespaces of the wheel."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops, NAMESPACE if name in ("_C", "_moe_C", "_xpu_C") else name)


class _Torch:
    """torch, but for its ops."""

    ops = _Ops()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def redirect(*modules: ModuleType) -> None:
    """Let these modules find the stand-ins, from now on, where they look for the operators of the wheel."""
    with _lock:
        _library()
        for module in modules:
            module.torch = _Torch()  # type: ignore[attr-defined]
