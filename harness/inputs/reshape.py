"""The same layer with other experts, other hidden and other intermediate columns: permuted, repeated, or filled up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.problem.case import BLOCK, Problem
from harness.trace.tracing import poison_

PER_EXPERT = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")
LARGEST = 448.0  #: no code of a drawn layer is larger, in either fp8 format


def padded_rows(x: Tensor) -> Tensor:
    """[T, K] with rows further apart than they are long, and NaN between them."""
    room = x.new_full((len(x), x.shape[1] + 64), math.nan)
    room[:, : x.shape[1]] = x
    return room[:, : x.shape[1]]


def select(t: Tensor, index: Tensor, dim: int, empty: float = 0.0) -> Tensor:
    """t with these places along `dim`, `empty` for an index of -1. Any dtype; fp8 only with empty=0."""
    bits = t.view(torch.uint8) if t.element_size() == 1 else t  # few operators know fp8
    shape = [-1 if d == dim else 1 for d in range(t.dim())]
    found = bits.index_select(dim, index.clamp(min=0))
    return torch.where((index < 0).view(shape), torch.full_like(found, empty), found).view(t.dtype)


def with_experts(layer: Layer, index: Tensor) -> Layer:
    """The layer with these of its local experts in this order, -1 for one that is all NaN; expert_map stays as it is.

    Shared experts stay behind them.
    """
    routed = layer.problem.local_experts
    shared = torch.arange(routed, routed + layer.problem.shared_experts, device=index.device)
    index = torch.cat([index, shared])
    changed: dict[str, Any] = {}
    for name in PER_EXPERT:
        if (old := getattr(layer, name)) is not None:
            changed[name] = select(old, index, 0)
            for e in torch.nonzero(index < 0).flatten().tolist():
                poison_(changed[name][e])
    return replace(layer, **changed)


def w13_rows(problem: Problem, inter: Tensor) -> Tensor:
    """The rows of w13 that make these intermediate columns: gate and up, packed as the activation wants them."""
    if not problem.gated:
        return inter
    if problem.activation == "swigluoai":
        return torch.stack([2 * inter, 2 * inter + 1], 1).flatten()
    return torch.cat([inter, inter + problem.intermediate_size])


def reshaped(layer: Layer, hidden: Tensor, made: Tensor, used: Tensor) -> Layer:
    """The layer (layout "nk") with these hidden columns, -1 for one that is zero throughout; w13 makes the intermediate
    columns `made`, w2 uses `used`, -1 for one that weighs nothing. Every other value keeps its value."""
    problem = layer.problem
    granularity = problem.quant.weight if problem.quant else "tensor"
    rows = w13_rows(problem, made)
    w13, w13_scale = _matrix(layer.w13, layer.w13_scale, granularity, rows, hidden)
    w2, w2_scale = _matrix(layer.w2, layer.w2_scale, granularity, hidden, used)
    return replace(
        layer, w13=w13, w13_scale=w13_scale, w2=w2, w2_scale=w2_scale,
        w13_bias=None if layer.w13_bias is None else select(layer.w13_bias, rows, 1),
        w2_bias=None if layer.w2_bias is None else select(layer.w2_bias, hidden, 1),
    )  # fmt: skip


def _matrix(
    w: Tensor, scale: Tensor | None, granularity: str, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor | None]:
    """w [E, N, K] with these rows and columns, and the scales that go with them."""
    codes = select(select(w, rows, 1), columns, 2)
    if scale is None or granularity == "tensor":
        return codes, scale
    if granularity == "channel":
        return codes, select(scale, rows, 1, empty=1.0)
    # A new block gets the scale of the first value that came there; the others' codes are converted. On the exact fill
    # scales are powers of two and codes have few bits, so that no value changes.
    of_row, of_column = rows.clamp(min=0) // BLOCK, columns.clamp(min=0) // BLOCK
    old = scale.index_select(1, of_row).index_select(2, of_column)
    new = scale.index_select(1, of_row[::BLOCK]).index_select(2, of_column[::BLOCK])
    spread = new.repeat_interleave(BLOCK, 1)[:, : len(rows)].repeat_interleave(BLOCK, 2)[:, :, : len(columns)]
    return (codes.float() * (old / spread)).clamp(-LARGEST, LARGEST).to(w.dtype), new
