"""Mistakes about what the layer computes with: weights, activation and biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.diagnose.faults.registry import TILES, fault
from harness.oracle.stages import Answer, Oracle
from reference.activation import SWIGLUOAI_LIMIT, is_gated, split_gate_up
from reference.moe import activated_gate, up_factor

#: One kernel often serves both GEMMs, and makes its mistake in both: that is said first where nothing tells them apart.
GEMMS = {"both GEMMs": ("w13", "w2"), "GEMM 1": ("w13",), "GEMM 2": ("w2",)}
BIASES = {"both biases": ("w13_bias", "w2_bias"), "w13_bias": ("w13_bias",), "w2_bias": ("w2_bias",)}
INF = float("inf")
PACKED = ("silu", "gelu", "gelu_tanh")


# -- weights ----------------------------------------------------------------------------------------------------------
@fault("gate and up swapped")
def _(o):
    return _rows(o, _pairs(o).flip(1))


@fault("gate and up interleaved taken for packed, or packed for interleaved")
def _(o):
    return _rows(o, _pairs(o, other=True))


@fault("{name} read as if transposed", name=("w13", "w2"))
def _(o, name):
    w = getattr(o.experts, name)
    return o(**{name: w.reshape(len(w), w.shape[2], w.shape[1]).transpose(1, 2)})


@fault("{name} of expert 0 for every expert", name=("w13", "w2"))
def _(o, name):
    w = getattr(o.experts, name)
    return o(**{name: w[:1].expand_as(w)})


@fault("{name} of the next expert", name=("w13", "w2"), step=(-1,))
@fault("{name} of the expert before", name=("w13", "w2"), step=(1,))
def _(o, name, step):
    return o(**{name: getattr(o.experts, name).roll(step, 0)})


@fault("the last {n} of K dropped in {gemm}", n=(1, *TILES), gemm=GEMMS)
def _(o, n, gemm):
    return _columns(o, gemm, lambda size: slice(-n, None) if n < size else None)


@fault("the first {n} of K dropped in {gemm}", n=(1, *TILES), gemm=GEMMS)
def _(o, n, gemm):
    return _columns(o, gemm, lambda size: slice(n) if n < size else None)


@fault("K behind the last full tile of {tile} dropped in {gemm}", tile=TILES, gemm=GEMMS)
def _(o, tile, gemm):
    return _columns(o, gemm, lambda size: slice(size // tile * tile, None) if size > tile and size % tile else None)


@fault("only the first {tile} of K added up in {gemm}", tile=TILES, gemm=GEMMS)
def _(o, tile, gemm):
    return _columns(o, gemm, lambda size: slice(tile, None) if size > tile else None)


@fault("only the last {tile} of K added up in {gemm}", tile=TILES, gemm=GEMMS)
def _(o, tile, gemm):
    return _columns(o, gemm, lambda size: slice((size - 1) // tile * tile) if size > tile else None)


@fault("neighbouring terms of K swapped in the weights of {gemm}", gemm=GEMMS)
def _(o, gemm):
    stacks = {name: getattr(o.experts, name) for name in GEMMS[gemm]}
    if any(w.shape[2] % 2 for w in stacks.values()):
        return None
    return o(**{name: w.unflatten(2, (-1, 2)).flip(3).flatten(2) for name, w in stacks.items()})


@fault("output columns behind the last full tile of {tile} zero in {gemm}", tile=TILES, gemm=GEMMS)
def _(o, tile, gemm):
    changed = {}
    for name in GEMMS[gemm]:
        w, bias = getattr(o.experts, name), getattr(o.experts, f"{name}_bias")
        if w.shape[1] < tile or w.shape[1] % tile == 0:
            return None
        kept = (torch.arange(w.shape[1]) < w.shape[1] // tile * tile).double()
        changed |= {name: w * kept[:, None], f"{name}_bias": None if bias is None else bias * kept}
    return o(**changed)


def _columns(o: Oracle, gemm: str, which: Callable[[int], slice | None]) -> Answer | None:
    """The GEMM without these of the columns that it sums over."""
    changed = {}
    for name in GEMMS[gemm]:
        w = getattr(o.experts, name)
        columns = which(w.shape[2])
        if columns is None:
            return None
        changed[name] = w.clone()
        changed[name][:, :, columns] = 0
    return o(**changed)


def _pairs(o: Oracle, other: bool = False) -> Tensor:
    """[I, 2] the rows of w13 that are gate and up of one another, or would be in the other arrangement."""
    rows = torch.arange(o.experts.w13.shape[1])
    interleaved = (o.experts.activation == "swigluoai") != other
    rows = rows[: len(rows) // 2 * 2]
    return rows.reshape(-1, 2) if interleaved else rows.reshape(2, -1).T


def _rows(o: Oracle, pairs: Tensor) -> Answer | None:
    """w13 and its bias with these rows [I, 2] for gate and up."""
    if not is_gated(o.experts.activation):
        return None
    order = (pairs if o.experts.activation == "swigluoai" else pairs.T).reshape(-1)
    bias = o.experts.w13_bias
    return o(w13=o.experts.w13[:, order], w13_bias=None if bias is None else bias[:, order])


# -- activation -------------------------------------------------------------------------------------------------------
@fault("activation {other}", other=PACKED)
def _(o, other):
    return o(activation=other) if o.experts.activation in PACKED else None


@fault("activation quick-gelu: gate * sigmoid(1.702 gate) * up")
def _(o):
    return _gated(o, lambda g, u: g * torch.sigmoid(1.702 * g) * u)


@fault("activation relu: relu(gate) * up")
def _(o):
    return _gated(o, lambda g, u: g.relu() * u)


@fault("activation missing: gate * up")
def _(o):
    return _gated(o, lambda g, u: g * u)


@fault("sigmoid(gate) * up")
def _(o):
    return _gated(o, lambda g, u: torch.sigmoid(g) * u)


@fault("up left out of the activation")
def _(o):
    return _gated(o, lambda g, u: _act(o, g))


@fault("up + 1 missing")
def _(o):
    return _gated(o, lambda g, u: _act(o, g) * (u - 1)) if o.experts.activation == "swigluoai" else None


@fault("up + 1 for up")
def _(o):
    return _gated(o, lambda g, u: _act(o, g) * (u + 1)) if o.experts.activation != "swigluoai" else None


@fault("the gate's factor {alpha} for 1.702", alpha=(1, 1.7))
def _(o, alpha):
    return o(alpha=float(alpha)) if o.experts.activation == "swigluoai" else None


@fault("relu not squared")
def _(o):
    return o.resume(a=o.s.h.relu()) if o.experts.activation == "relu2" else None


@fault("squared without relu")
def _(o):
    return o.resume(a=o.s.h**2) if o.experts.activation == "relu2" else None


@fault("clamp missing")
def _(o):
    return o(limit=INF) if _limit(o) < INF else None


@fault("clamp on the gate only")
def _(o):
    return _clamped(o, lambda g, u, c: (g.clamp(max=c), u))


@fault("clamp on up only")
def _(o):
    return _clamped(o, lambda g, u, c: (g, u.clamp(-c, c)))


@fault("gate clamped from below as well")
def _(o):
    return _clamped(o, lambda g, u, c: (g.clamp(-c, c), u.clamp(-c, c)))


@fault("up not clamped from below")
def _(o):
    return _clamped(o, lambda g, u, c: (g.clamp(max=c), u.clamp(max=c)))


@fault("a clamp at 7 whatever the layer says")
def _(o):
    return o(limit=SWIGLUOAI_LIMIT) if is_gated(o.experts.activation) else None


def _limit(o: Oracle) -> float:
    own = o.experts.limit
    return own if own is not None else SWIGLUOAI_LIMIT if o.experts.activation == "swigluoai" else INF


def _act(o: Oracle, gate: Tensor) -> Tensor:
    return activated_gate(gate, replace(o.experts, limit=INF))


def _gated(o: Oracle, a: Callable[[Tensor, Tensor], Tensor]) -> Answer | None:
    """a [P, I] of the clamped gate and of what it is to be multiplied by (for swigluoai up + 1)."""
    if not is_gated(o.experts.activation):
        return None
    gate, up = split_gate_up(o.s.h, o.experts.activation)
    return o.resume(a=a(gate.clamp(max=_limit(o)), up_factor(up, o.experts)))


def _clamped(o: Oracle, clamp: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Answer | None:
    """The activation of gate and up that were clamped otherwise."""
    if not is_gated(o.experts.activation) or _limit(o) == INF:
        return None
    free = replace(o.experts, limit=INF)
    gate, up = split_gate_up(o.s.h, o.experts.activation)
    gate, up = clamp(gate, up, _limit(o))
    # Where nothing is cut off, an error of h passes on: the right clamp would predict none.
    return replace(o.resume(a=_act(o, gate) * up_factor(up, free)), experts=free)


# -- biases -----------------------------------------------------------------------------------------------------------
@fault("{which} missing", which=BIASES)
def _(o, which):
    return _biased(o, which, torch.zeros_like)


@fault("{which} added twice", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: 2 * b)


@fault("{which} of expert 0 for every expert", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: b[:1].expand_as(b))


@fault("{which} of the next expert", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: b.roll(-1, 0))


@fault("{which} of the expert before", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: b.roll(1, 0))


@fault("{which} subtracted", which=BIASES)
def _(o, which):
    return _biased(o, which, torch.neg)


@fault("one element of {which} for all columns", which=("w13_bias", "w2_bias"))
def _(o, which):
    return _biased(o, which, lambda b: b[:, :1].expand_as(b))


@fault("w13_bias of gate and up swapped")
def _(o):
    return _gate_up_bias(o, lambda gate, up: (up, gate))


@fault("w13_bias of the gate for up as well")
def _(o):
    return _gate_up_bias(o, lambda gate, up: (gate, gate))


@fault("w13_bias for the gate only")
def _(o):
    return _gate_up_bias(o, lambda gate, up: (gate, torch.zeros_like(up)))


@fault("w13_bias interleaved taken for packed, or packed for interleaved")
def _(o):
    b = o.experts.w13_bias
    if b is None or not is_gated(o.experts.activation):
        return None
    shape = (-1, 2) if o.experts.activation != "swigluoai" else (2, -1)
    return o(w13_bias=b.unflatten(1, shape).transpose(1, 2).flatten(1))


@fault("w2_bias not weighted by the router")
def _(o):
    return _w2_bias_times(o, 1 / o.s.weight)


@fault("w2_bias weighted by the router, though the input was")
def _(o):
    return _w2_bias_times(o, o.weights[o.s.token, 0]) if o.problem.router_weight_on_input else None


@fault("w2_bias once a token instead of once a slot")
def _(o):
    first = torch.cat([o.s.token.new_ones(1), o.s.token.diff()]) > 0
    return _w2_bias_times(o, first[: len(o.s.token)].double())


@fault("w13_bias weighted by the router, as the input is")
def _(o):
    b = o.experts.w13_bias
    if b is None or not o.problem.router_weight_on_input or o.experts.shared:
        return None
    return o.resume(h=o.s.h + b[o.s.expert] * (o.weights[o.s.token, 0] - 1)[:, None])


def _biased(o: Oracle, which: str, change: Callable[[Tensor], Tensor]) -> Answer | None:
    if o.experts.w13_bias is None:
        return None
    changed: dict[str, Any] = {name: change(getattr(o.experts, name)) for name in BIASES[which]}
    return o(**changed)


def _gate_up_bias(o: Oracle, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Answer | None:
    b = o.experts.w13_bias
    if b is None or not is_gated(o.experts.activation):
        return None
    gate, up = change(*split_gate_up(b, o.experts.activation))
    dim = 2 if o.experts.activation == "swigluoai" else 1
    return o(w13_bias=torch.stack([gate, up], dim).flatten(1))


def _w2_bias_times(o: Oracle, factor: Tensor) -> Answer | None:
    """w2_bias times a factor [P] of its own."""
    b = o.experts.w2_bias
    return None if b is None else o.resume(y=o.s.y + b[o.s.expert] * (factor - 1)[:, None])
