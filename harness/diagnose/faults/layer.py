"""Faults of the layer: weights, activation and biases."""

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

#: One kernel often serves both GEMMs: a fault in both comes first where the output cannot tell which GEMM is wrong.
GEMMS = {"both GEMMs": ("w13", "w2"), "GEMM 1": ("w13",), "GEMM 2": ("w2",)}
BIASES = {"both biases": ("w13_bias", "w2_bias"), "w13_bias": ("w13_bias",), "w2_bias": ("w2_bias",)}
INF = float("inf")
PACKED = ("silu", "gelu", "gelu_tanh")


# -- weights ----------------------------------------------------------------------------------------------------------
@fault("gate_up.swapped", "gate and up swapped")
def _(o):
    return _rows(o, _pairs(o).flip(1))


@fault("gate_up.interleaving", "interleaved gate and up read as packed, or packed as interleaved")
def _(o):
    return _rows(o, _pairs(o, other=True))


@fault("{name}.transposed", "{name} read as if transposed", flag="layout", effect="ignored", name=("w13", "w2"))
def _(o, name):
    w = getattr(o.experts, name)
    return o(**{name: w.reshape(len(w), w.shape[2], w.shape[1]).transpose(1, 2)})


@fault("{name}.first_expert", "{name} of expert 0 for every expert", name=("w13", "w2"))
def _(o, name):
    w = getattr(o.experts, name)
    return o(**{name: w[:1].expand_as(w)})


@fault("{name}.next_expert", "{name} of the next expert", name=("w13", "w2"), step=(-1,))
@fault("{name}.previous_expert", "{name} of the previous expert", name=("w13", "w2"), step=(1,))
def _(o, name, step):
    return o(**{name: getattr(o.experts, name).roll(step, 0)})


@fault("k.last_dropped.{gemm}.{n}", "the last {n} of K dropped in {gemm}", n=(1, *TILES), gemm=GEMMS)
def _(o, n, gemm):
    return _columns(o, gemm, lambda size: slice(-n, None) if n < size else None)


@fault("k.first_dropped.{gemm}.{n}", "the first {n} of K dropped in {gemm}", n=(1, *TILES), gemm=GEMMS)
def _(o, n, gemm):
    return _columns(o, gemm, lambda size: slice(n) if n < size else None)


@fault("k.tail_dropped.{gemm}.{tile}", "K after the last full tile of {tile} dropped in {gemm}", tile=TILES, gemm=GEMMS)
def _(o, tile, gemm):
    return _columns(o, gemm, lambda size: slice(size // tile * tile, None) if size > tile and size % tile else None)


@fault("k.first_only.{gemm}.{tile}", "only the first {tile} of K summed in {gemm}", tile=TILES, gemm=GEMMS)
def _(o, tile, gemm):
    return _columns(o, gemm, lambda size: slice(tile, None) if size > tile else None)


@fault("k.last_only.{gemm}.{tile}", "only the last tile of {tile} of K summed in {gemm}", tile=TILES, gemm=GEMMS)
def _(o, tile, gemm):
    return _columns(o, gemm, lambda size: slice((size - 1) // tile * tile) if size > tile else None)


@fault("k.neighbours_swapped.{gemm}", "neighbouring terms of K swapped in the weights of {gemm}", gemm=GEMMS)
def _(o, gemm):
    stacks = {name: getattr(o.experts, name) for name in GEMMS[gemm]}
    if any(w.shape[2] % 2 for w in stacks.values()):
        return None
    return o(**{name: w.unflatten(2, (-1, 2)).flip(3).flatten(2) for name, w in stacks.items()})


@fault(
    "n.tail_zero.{gemm}.{tile}",
    "output columns after the last full tile of {tile} zero in {gemm}",
    tile=TILES,
    gemm=GEMMS,
)
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
    """The GEMM with the columns which(K) of its weights zero; None where which(K) is None."""
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
    """[I, 2] the rows of w13 that hold gate and up of one element; `other`: in the other arrangement."""
    rows = torch.arange(o.experts.w13.shape[1])
    interleaved = (o.experts.activation == "swigluoai") != other
    rows = rows[: len(rows) // 2 * 2]
    return rows.reshape(-1, 2) if interleaved else rows.reshape(2, -1).T


def _rows(o: Oracle, pairs: Tensor) -> Answer | None:
    """w13 and its bias with the rows `pairs` [I, 2] as gate and up."""
    if not is_gated(o.experts.activation):
        return None
    order = (pairs if o.experts.activation == "swigluoai" else pairs.T).reshape(-1)
    bias = o.experts.w13_bias
    return o(w13=o.experts.w13[:, order], w13_bias=None if bias is None else bias[:, order])


# -- activation -------------------------------------------------------------------------------------------------------
@fault("activation.{other}", "activation {other}", flag="activation", effect="ignored", other=PACKED)
def _(o, other):
    return o(activation=other) if o.experts.activation in PACKED else None


@fault("activation.quick_gelu", "activation quick-gelu: gate * sigmoid(1.702 gate) * up")
def _(o):
    return _gated(o, lambda g, u: g * torch.sigmoid(1.702 * g) * u)


@fault("activation.relu", "activation relu: relu(gate) * up")
def _(o):
    return _gated(o, lambda g, u: g.relu() * u)


@fault("activation.missing", "activation missing: gate * up")
def _(o):
    return _gated(o, lambda g, u: g * u)


@fault("activation.sigmoid", "activation sigmoid: sigmoid(gate) * up")
def _(o):
    return _gated(o, lambda g, u: torch.sigmoid(g) * u)


@fault("activation.without_up", "up left out of the activation")
def _(o):
    return _gated(o, lambda g, u: _act(o, g))


@fault("activation.up_plus_one_missing", "up instead of up + 1", flag="activation", effect="ignored")
def _(o):
    return _gated(o, lambda g, u: _act(o, g) * (u - 1)) if o.experts.activation == "swigluoai" else None


@fault("activation.up_plus_one", "up + 1 instead of up")
def _(o):
    return _gated(o, lambda g, u: _act(o, g) * (u + 1)) if o.experts.activation != "swigluoai" else None


@fault("activation.alpha.{alpha}", "alpha {alpha} instead of 1.702", alpha=(1, 1.7))
def _(o, alpha):
    return o(alpha=float(alpha)) if o.experts.activation == "swigluoai" else None


@fault("activation.relu_not_squared", "relu not squared", flag="activation", effect="ignored")
def _(o):
    return o.resume(a=o.s.h.relu()) if o.experts.activation == "relu2" else None


@fault("activation.square_without_relu", "squared without relu")
def _(o):
    return o.resume(a=o.s.h**2) if o.experts.activation == "relu2" else None


@fault("clamp.missing", "clamp missing", flag="limit", effect="ignored")
def _(o):
    return o(limit=INF) if _limit(o) < INF else None


@fault("clamp.gate_only", "clamp on the gate only")
def _(o):
    return _clamped(o, lambda g, u, c: (g.clamp(max=c), u))


@fault("clamp.up_only", "clamp on up only")
def _(o):
    return _clamped(o, lambda g, u, c: (g, u.clamp(-c, c)))


@fault("clamp.gate_from_below", "gate clamped from below as well")
def _(o):
    return _clamped(o, lambda g, u, c: (g.clamp(-c, c), u.clamp(-c, c)))


@fault("clamp.up_not_from_below", "up not clamped from below")
def _(o):
    return _clamped(o, lambda g, u, c: (g.clamp(max=c), u.clamp(max=c)))


@fault("clamp.always_7", "a clamp at 7 whatever the layer's limit", flag="limit", effect="ignored")
def _(o):
    return o(limit=SWIGLUOAI_LIMIT) if is_gated(o.experts.activation) else None


def _limit(o: Oracle) -> float:
    own = o.experts.limit
    return own if own is not None else SWIGLUOAI_LIMIT if o.experts.activation == "swigluoai" else INF


def _act(o: Oracle, gate: Tensor) -> Tensor:
    return activated_gate(gate, replace(o.experts, limit=INF))


def _halves(o: Oracle, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up [..., I] of rows [..., 2I], for a gated activation."""
    gate, up = split_gate_up(rows, o.experts.activation)
    assert up is not None
    return gate, up


def _gated(o: Oracle, a: Callable[[Tensor, Tensor], Tensor]) -> Answer | None:
    """The activation a(clamped gate, factor), all [P, I]; the factor is up, for swigluoai up + 1."""
    if not is_gated(o.experts.activation):
        return None
    gate, up = _halves(o, o.s.h)
    return o.resume(a=a(gate.clamp(max=_limit(o)), up_factor(up, o.experts)))


def _clamped(o: Oracle, clamp: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> Answer | None:
    """The activation with gate and up clamped by clamp(gate, up, limit)."""
    if not is_gated(o.experts.activation) or _limit(o) == INF:
        return None
    free = replace(o.experts, limit=INF)
    gate, up = _halves(o, o.s.h)
    gate, up = clamp(gate, up, _limit(o))
    # An error of h passes where nothing is clamped: the right clamp would predict no error there.
    return replace(o.resume(a=_act(o, gate) * up_factor(up, free)), experts=free)


# -- biases -----------------------------------------------------------------------------------------------------------
@fault("{which}.missing", "{which} missing", flag="bias", effect="ignored", which=BIASES)
def _(o, which):
    return _biased(o, which, torch.zeros_like)


@fault("{which}.twice", "{which} added twice", flag="bias", effect="doubled", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: 2 * b)


@fault("{which}.first_expert", "{which} of expert 0 for every expert", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: b[:1].expand_as(b))


@fault("{which}.next_expert", "{which} of the next expert", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: b.roll(-1, 0))


@fault("{which}.previous_expert", "{which} of the previous expert", which=BIASES)
def _(o, which):
    return _biased(o, which, lambda b: b.roll(1, 0))


@fault("{which}.subtracted", "{which} subtracted", which=BIASES)
def _(o, which):
    return _biased(o, which, torch.neg)


@fault("{which}.first_element", "the first element of {which} for all columns", which=("w13_bias", "w2_bias"))
def _(o, which):
    return _biased(o, which, lambda b: b[:, :1].expand_as(b))


@fault("w13_bias.gate_up_swapped", "w13_bias of gate and up swapped")
def _(o):
    return _gate_up_bias(o, lambda gate, up: (up, gate))


@fault("w13_bias.of_gate_for_up", "w13_bias of the gate for up as well")
def _(o):
    return _gate_up_bias(o, lambda gate, up: (gate, gate))


@fault("w13_bias.gate_only", "w13_bias for the gate only")
def _(o):
    return _gate_up_bias(o, lambda gate, up: (gate, torch.zeros_like(up)))


@fault("w13_bias.interleaving", "interleaved w13_bias read as packed, or packed as interleaved")
def _(o):
    b = o.experts.w13_bias
    if b is None or not is_gated(o.experts.activation):
        return None
    shape = (-1, 2) if o.experts.activation != "swigluoai" else (2, -1)
    return o(w13_bias=b.unflatten(1, shape).transpose(1, 2).flatten(1))


@fault("w2_bias.unweighted", "w2_bias not weighted by the router")
def _(o):
    return _w2_bias_times(o, 1 / o.s.weight)


@fault("w2_bias.weighted", "w2_bias weighted by the router, although the input was")
def _(o):
    return _w2_bias_times(o, o.weights[o.s.token, 0]) if o.problem.router_weight_on_input else None


@fault("w2_bias.once_a_token", "w2_bias once a token instead of once a slot")
def _(o):
    first = torch.cat([o.s.token.new_ones(1), o.s.token.diff()]) > 0
    return _w2_bias_times(o, first[: len(o.s.token)].double())


@fault("w13_bias.weighted", "w13_bias weighted by the router, as the input is")
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
    gate, up = change(*_halves(o, b))
    dim = 2 if o.experts.activation == "swigluoai" else 1
    return o(w13_bias=torch.stack([gate, up], dim).flatten(1))


def _w2_bias_times(o: Oracle, factor: Tensor) -> Answer | None:
    """w2_bias multiplied by a factor [P]."""
    b = o.experts.w2_bias
    return None if b is None else o.resume(y=o.s.y + b[o.s.expert] * (factor - 1)[:, None])
