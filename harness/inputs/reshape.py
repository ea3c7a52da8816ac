"""The same layer with other experts, other hidden and other intermediate columns: permuted, repeated, or filled up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.problem.case import Problem
from harness.trace.tracing import poison_
from reference.formats import decode, encode
from reference.quant import expand_scale
from reference.scheme import Scheme

PER_EXPERT = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")


def padded_rows(x: Tensor) -> Tensor:
    """[T, K] with rows further apart than they are long, and NaN between them: a slice of an engine's buffer."""
    buffer = x.new_full((len(x), x.shape[1] + 64), math.nan)
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


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
    scheme = problem.quant.weights if problem.quant else None
    rows = w13_rows(problem, made)
    w13, w13_scale = _matrix(layer.w13, layer.w13_scale, scheme, rows, hidden)
    w2, w2_scale = _matrix(layer.w2, layer.w2_scale, scheme, hidden, used)
    return replace(
        layer, w13=w13, w13_scale=w13_scale, w2=w2, w2_scale=w2_scale,
        w13_bias=None if layer.w13_bias is None else select(layer.w13_bias, rows, 1),
        w2_bias=None if layer.w2_bias is None else select(layer.w2_bias, hidden, 1),
    )  # fmt: skip


def _matrix(
    w: Tensor, scale: Tensor | None, scheme: Scheme | None, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor | None]:
    """w [E, N, K] with these rows and columns, and the scales that go with them."""
    codes = select(select(w, rows, 1), columns, 2)
    if scale is None or scheme is None:
        return codes, scale
    granularity = scheme.granularity
    new = scale
    for dim, index, block in ((1, rows, granularity.rows), (2, columns, granularity.columns)):
        if block == 1:
            new = select(new, index, dim, empty=1.0)
        elif block is not None:
            new = new.index_select(dim, index.clamp(min=0)[::block] // block)
    if granularity.columns is None:
        return codes, new
    # A new block gets the scale of the first value that came there; the others' codes are converted. On the exact fill
    # scales are powers of two and codes have few bits, so that no value changes.
    old = expand_scale(scale, granularity, w.shape)
    old = old.index_select(1, rows.clamp(min=0)).index_select(2, columns.clamp(min=0))
    ratio = decode(codes, scheme.codes).float() * (old / expand_scale(new, granularity, codes.shape))
    return encode(ratio.double(), scheme.codes), new
