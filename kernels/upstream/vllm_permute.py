"""Backend "vllm-permute": vLLM's moe_permute and moe_unpermute, with its MoEPermuteScratch, around torch's products.

It tests the permutation, its reuse of buffers, and the sum on the way back; torch.matmul multiplies each expert's rows.
As in vLLM's CUTLASS experts, rows that no local expert serves are never written between the two.

The scratch holds tables only, and grows: its user keeps the permuted rows. make_scratch() adds a buffer for those, and
permute() translates vLLM's tables for the harness: -1 where there is no row, the expert of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels.grouped import activate
from kernels.layer import DTYPES
from kernels.upstream import vllm_python
from kernels.upstream.expert_ids import BEYOND
from kernels.upstream.package import missing
from kernels.upstream.vllm_python import MOE

OLDEST = (0, 33)  # moe_permute takes a scratch
ALIGNMENT = 16  #: bytes: rows are copied in pieces of this size


class Scratch:
    """`tables`, vLLM's scratch for `rows` pairs, and the buffers that its user keeps beside it.

    Its tensors are attributes, except the one that is written when it grows and only read from then on.
    """

    def __init__(self, tables: Any, rows: int, hidden_size: int | None, dtype: torch.dtype | None) -> None:
        tables.reserve(rows)
        self.tables = tables
        vars(self).update(
            {n: t for n, t in vars(tables).items() if isinstance(t, Tensor) and n != "token_expert_indices"}
        )
        self.hidden_states = None
        if hidden_size is not None:
            self.hidden_states = torch.empty(rows, hidden_size, dtype=dtype, device=tables.device)
        self.expert_ids = torch.empty(rows, dtype=torch.int64, device=tables.device)
        self.absent = torch.empty(rows, dtype=torch.bool, device=tables.device)


class VllmPermute:
    """Unquantized layers of layout "nk", expert parallelism, every activation."""

    name = "vllm-permute"
    devices = {"cuda"}
    promises = {"steady_scratch"}

    def available(self) -> str | None:
        """None, or why it cannot be used here. Imports nothing."""
        return missing("vllm", since=OLDEST)

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if problem.quant is not None:
            return "quant: the products between the two permutations are torch's"
        if problem.layout != "nk" or problem.shared_experts:
            return "layout: w13 [E, 2I, K] and w2 [E, K, I], routed experts only"
        if problem.hidden_size * DTYPES[problem.dtype].itemsize % ALIGNMENT:
            return f"shape: moe_permute asserts rows of whole {ALIGNMENT} bytes"
        if problem.routing == "beyond":
            return BEYOND
        return None

    def plans(self, problem: Any) -> list[dict]:
        """Products and activation are stored in io, slots are weighted after that and summed in float32. A router
        weight on the input is applied as vLLM's prepare step does: in io."""
        weighted = "io" if problem.router_weight_on_input else "fp32"
        return [
            {
                "gate_up": "io", "act": "io", "slot": "io", "weight": "after_store", "router_weight": weighted,
                "weighted_input": "io",
            }
        ]  # fmt: skip

    def make_scratch(self, problem: Any, device: torch.device, **sizes: Any) -> Scratch:
        """A scratch for the problem's pairs; no permuted rows where hidden_size and hidden_dtype are None."""
        sizes = {"hidden_size": problem.hidden_size, "hidden_dtype": DTYPES[problem.dtype], **sizes}
        tables = _module().MoEPermuteScratch(problem.num_experts, problem.local_experts, torch.device(device))
        return Scratch(tables, max(1, problem.tokens) * problem.top_k, sizes["hidden_size"], sizes["hidden_dtype"])

    def permute(
        self, hidden_states: Tensor, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> SimpleNamespace:  # fmt: skip
        """hidden_states [P, K] by expert, zeros behind the last row; expert_first_token_offset int64 [E + 1];
        permuted_idx int32 [P], inv_permuted_idx int32 [T, k] and expert_ids int64 [P], -1 where there is none."""
        assert scratch is not None
        rows, offsets, inverse, pairs = _permute(hidden_states, topk_ids, num_experts, expert_map, scratch)
        size = len(pairs)
        absent, experts = scratch.absent[:size], scratch.expert_ids[:size]
        numbers = scratch.tables.token_expert_indices[:size]
        torch.ge(inverse, offsets[-1:], out=absent)
        inverse.masked_fill_(absent, -1)
        torch.searchsorted(offsets, numbers, right=True, out=experts)
        torch.ge(numbers, offsets[-1:], out=absent)
        experts.sub_(1).masked_fill_(absent, -1)
        pairs.masked_fill_(absent, -1)
        rows.masked_fill_(absent.unsqueeze(1), 0)
        return SimpleNamespace(
            hidden_states=rows, expert_first_token_offset=offsets, permuted_idx=pairs,
            inv_permuted_idx=inverse.view(topk_ids.shape), expert_ids=experts,
        )  # fmt: skip

    def prepare(self, problem: Any, layer: Any, scratch: Scratch | None = None) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io."""

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            problem, x, weights = layer.problem, hidden_states, topk_weights
            out = torch.empty_like(x) if out is None else out
            if not len(x):  # vLLM's modular kernel returns early
                return out
            if problem.router_weight_on_input:
                x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
            rows, offsets, inverse, _ = _permute(
                x, topk_ids, problem.num_experts, layer.expert_map, scratch, problem.local_experts
            )
            slots = torch.empty_like(rows)
            ends = offsets.tolist()
            for e, (start, stop) in enumerate(zip(ends, ends[1:])):
                slots[start:stop] = _expert(rows[start:stop], layer, e)
            _module().moe_unpermute(out, slots, weights, inverse, offsets)
            return out

        return call


def _module() -> Any:
    return vllm_python.import_module(f"{MOE}.moe_permute_unpermute")


def _permute(
    x: Tensor, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None, scratch: Scratch | None,
    num_local_experts: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(permuted rows, expert_first_token_offset, inv_permuted_idx, permuted_idx) as moe_permute returns them."""
    tables, rows = None, None
    if scratch is not None:
        tables, num_local_experts = scratch.tables, scratch.tables.num_local_experts
        rows = None if scratch.hidden_states is None else scratch.hidden_states[: topk_ids.numel()]
    permuted = _module().moe_permute(x, None, topk_ids, num_experts, num_local_experts, expert_map, rows, tables)
    return permuted[0], *permuted[2:]


def _expert(rows: Tensor, layer: Any, e: int) -> Tensor:
    """The output of the layer's local expert e for rows [n, K]."""
    h = _linear(rows, layer.w13[e], layer.w13_bias, e).float()
    a = activate(h, layer.problem.activation, layer.problem.limit).to(rows.dtype)
    return _linear(a, layer.w2[e], layer.w2_bias, e)


def _linear(rows: Tensor, w: Tensor, bias: Tensor | None, e: int) -> Tensor:
    return rows @ w.T if bias is None else torch.addmm(bias[e], rows, w.T)
