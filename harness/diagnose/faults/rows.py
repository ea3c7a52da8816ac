"""Mistakes about rows and numbers: hidden_states, the output, and roundings that nobody declared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.diagnose.faults.registry import TILES, fault
from harness.diagnose.faults.routing import keep
from harness.oracle.stages import Answer, Oracle, weighted
from reference.formats import FORMATS, decode, round_to, ulp
from reference.moe import Rounding

NAN = float("nan")


# -- hidden_states and out --------------------------------------------------------------------------------------------
@fault("GEMM 2 skipped: only its bias comes out")
def _(o):
    return o(w2=torch.zeros_like(o.experts.w2)) if o.experts.w2_bias is not None else None


@fault("hidden_states returned")
def _(o):
    return o.resume(out=o.x)


@fault("added to hidden_states")
def _(o):
    return o.resume(out=o.s.out + o.x)


@fault("counted twice: the output doubled")
def _(o):
    return o.resume(out=2 * o.s.out)


@fault("hidden_states of the next token", step=(-1,))
@fault("hidden_states of the token before", step=(1,))
def _(o, step):
    return o(x=o.x.roll(step, 0))


@fault("hidden_states of the first token for every token")
def _(o):
    return o(x=o.x[:1].expand_as(o.x))


@fault("hidden_states of row p for pair p: the slots not counted")
def _(o):
    pair = o.s.token * o.ids.shape[1] + o.s.slot
    return o.resume(x=o.s.x, row=pair % len(o.x)) if not o.experts.shared else None


@fault("row stride of hidden_states ignored")
def _(o):
    x = o.inputs.hidden_states.cpu()
    return o(x=decode(x.as_strided(x.shape, (x.shape[1], 1)))) if o.problem.padded and len(x) else None


@fault("output rows of the next token", step=(-1,))
@fault("output rows of the token before", step=(1,))
def _(o, step):
    return o.resume(out=o.s.out.roll(step, 0))


@fault("tokens behind the last full tile of {tile} never written", tile=(4, 8, *TILES))
def _(o, tile):
    return _written(o, torch.arange(len(o.x))[:, None], tile)


@fault("columns behind the last full tile of {tile} never written", tile=(*TILES, 256))
def _(o, tile):
    return _written(o, torch.arange(o.x.shape[1]), tile)


@fault("shared experts missing")
def _(o):
    return keep(o, o.s.slot < o.ids.shape[1]) if o.experts.shared else None


@fault("shared experts counted twice")
def _(o):
    times = torch.where(o.s.slot < o.ids.shape[1], 1, 2)
    return o.resume(weight=times * o.s.weight, y=o.s.y) if o.experts.shared else None


@fault("shared experts weighted by the first slot's router weight")
def _(o):
    if not o.experts.shared:
        return None
    return o.resume(weight=torch.where(o.s.slot < o.ids.shape[1], o.s.weight, o.weights[o.s.token, 0]), y=o.s.y)


# -- rounding ---------------------------------------------------------------------------------------------------------
@fault("output rounded toward zero")
def _(o):
    step = ulp(o.s.out, o.problem.dtype)
    return o.resume(out=torch.where(torch.isfinite(o.s.out), torch.trunc(o.s.out / step) * step, o.s.out))


@fault("GEMM 1's output rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    return o.resume(h=round_to(o.s.h, form)) if _coarser(o, form) else None


@fault("the activation rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    return o.resume(a=round_to(o.s.a, form)) if _coarser(o, form) else None


@fault("slots rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    return o.resume(slots=round_to(weighted(o.s, o.rounding), form)) if _coarser(o, form) else None


@fault("the sum over the slots rounded to {form} after each", form=("bf16", "fp16"))
def _(o, form):
    slots, total = weighted(o.s, o.rounding), torch.zeros_like(o.x)
    for j in range(int(o.s.slot.max()) + 1 if len(o.s.slot) else 0):
        mine = o.s.slot == j
        total = round_to(total.index_add(0, o.s.token[mine], slots[mine]), form)
    return o.resume(out=total)


@fault("the outputs of both GEMMs rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    if not _coarser(o, form):
        return None
    s = o.resume(h=round_to(o.s.h, form)).stages
    return o.resume(h=s.h, a=s.a, operand=s.operand, y=s.y, slots=round_to(weighted(s, o.rounding), form))


@dataclass(frozen=True)
class _Narrow(Rounding):
    """Operands of the products in another format."""

    form: str = "tf32"

    def operand(self, value: Tensor) -> Tensor:
        return round_to(value, self.form)


@fault("float32 products in bf16", form=("bf16",))
@fault("float32 products in tf32 or fp16", form=("tf32",))
def _(o, form):
    if o.problem.dtype != "fp32":
        return None
    return o(rounding=_Narrow(o.rounding.plan, o.rounding.io, o.rounding.repeat, form))


def _written(o: Oracle, places: Tensor, tile: int) -> Answer | None:
    """Only the rows or columns at these places that fill a tile. One alone that is missing says too little."""
    count = places.numel()
    if count <= tile or count % tile < 2:
        return None
    return o.resume(out=torch.where(places < count // tile * tile, o.s.out, NAN))


def _coarser(o: Oracle, form: str) -> bool:
    return FORMATS[form].precision < FORMATS[o.problem.dtype].precision or form != o.problem.dtype
