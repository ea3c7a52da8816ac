"""Faults of rows and numbers: hidden_states, the output, and undeclared roundings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.diagnose.faults.registry import TILES, fault
from harness.diagnose.faults.routing import keep
from harness.oracle.stages import Answer, Oracle
from reference.formats import FORMATS, decode, round_to, ulp
from reference.moe import Rounding

NAN = float("nan")


# -- hidden_states and out --------------------------------------------------------------------------------------------
@fault("gemm_2.skipped", "GEMM 2 skipped: its bias alone is returned")
def _(o):
    return o(w2=torch.zeros_like(o.experts.w2)) if o.experts.w2_bias is not None else None


@fault("output.hidden_states", "hidden_states returned")
def _(o):
    return o.resume(out=o.x)


@fault("output.added_to_hidden_states", "output added to hidden_states")
def _(o):
    return o.resume(out=o.s.out + o.x)


@fault("output.doubled", "output doubled", effect="doubled")
def _(o):
    return o.resume(out=2 * o.s.out)


@fault("hidden_states.next_token", "hidden_states of the next token", step=(-1,))
@fault("hidden_states.previous_token", "hidden_states of the previous token", step=(1,))
def _(o, step):
    return o(x=o.x.roll(step, 0))


@fault("hidden_states.first_token", "hidden_states of the first token for every token")
def _(o):
    return o(x=o.x[:1].expand_as(o.x))


@fault("hidden_states.pair_index_is_row", "hidden_states of row p for pair p: the index is not divided by top_k")
def _(o):
    pair = o.s.token * o.ids.shape[1] + o.s.slot
    return o.resume(x=o.s.x, row=pair % len(o.x)) if not o.experts.shared else None


@fault("hidden_states.stride_ignored", "row stride of hidden_states ignored", flag="padded", effect="ignored")
def _(o):
    x = o.inputs.hidden_states.cpu()
    return o(x=decode(x.as_strided(x.shape, (x.shape[1], 1)))) if o.problem.padded and len(x) else None


@fault("output.next_token", "output rows of the next token", step=(-1,))
@fault("output.previous_token", "output rows of the previous token", step=(1,))
def _(o, step):
    return o.resume(out=o.s.out.roll(step, 0))


@fault("tokens.tail_not_written.{tile}", "tokens after the last full tile of {tile} never written", tile=(4, 8, *TILES))
def _(o, tile):
    return _written(o, torch.arange(len(o.x))[:, None], tile)


@fault(
    "columns.tail_not_written.{tile}", "columns after the last full tile of {tile} never written", tile=(*TILES, 256)
)
def _(o, tile):
    return _written(o, torch.arange(o.x.shape[1]), tile)


@fault("shared_experts.missing", "shared experts missing", flag="shared_experts", effect="ignored")
def _(o):
    return keep(o, o.s.slot < o.ids.shape[1]) if o.experts.shared else None


@fault("shared_experts.twice", "shared experts counted twice", flag="shared_experts", effect="doubled")
def _(o):
    times = torch.where(o.s.slot < o.ids.shape[1], 1, 2)
    return o.resume(weight=times * o.s.weight, y=o.s.y) if o.experts.shared else None


@fault("shared_experts.weighted", "shared experts weighted by the first slot's router weight")
def _(o):
    if not o.experts.shared:
        return None
    return o.resume(weight=torch.where(o.s.slot < o.ids.shape[1], o.s.weight, o.weights[o.s.token, 0]), y=o.s.y)


# -- rounding ---------------------------------------------------------------------------------------------------------
@fault("output.rounded_toward_zero", "output rounded toward zero")
def _(o):
    step = ulp(o.s.out, o.problem.dtype)
    return o.resume(out=torch.where(torch.isfinite(o.s.out), torch.trunc(o.s.out / step) * step, o.s.out))


@fault("gemm_1.rounded.{form}", "GEMM 1's output rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    return o.resume(h=round_to(o.s.h, form)) if _coarser(o, form) else None


@fault("activation.rounded.{form}", "the activation rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    return o.resume(a=round_to(o.s.a, form)) if _coarser(o, form) else None


@fault("slots.rounded.{form}", "slots rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    return o.resume(slots=round_to(o.s.slots, form)) if _coarser(o, form) else None


@fault("slots.sum_rounded.{form}", "the sum over the slots rounded to {form} after each slot", form=("bf16", "fp16"))
def _(o, form):
    slots, total = o.s.slots, torch.zeros_like(o.x)
    for j in range(int(o.s.slot.max()) + 1 if len(o.s.slot) else 0):
        mine = o.s.slot == j
        total = round_to(total.index_add(0, o.s.token[mine], slots[mine]), form)
    return o.resume(out=total)


@fault("both_gemms.rounded.{form}", "the outputs of both GEMMs rounded to {form}", form=("bf16", "fp16"))
def _(o, form):
    if not _coarser(o, form):
        return None
    s = o.resume(h=round_to(o.s.h, form)).stages
    return o.resume(h=s.h, a=s.a, operand=s.operand, y=s.y, slots=round_to(s.slots, form))


@dataclass(frozen=True)
class _Narrow(Rounding):
    """Rounds the operands of the products to another format."""

    form: str = "tf32"

    def operand(self, value: Tensor) -> Tensor:
        return round_to(value, self.form)


@fault("products.bf16", "float32 products in bf16", form=("bf16",))
@fault("products.tf32_or_fp16", "float32 products in tf32 or fp16", form=("tf32",))
def _(o, form):
    if o.problem.dtype != "fp32":
        return None
    return o(rounding=_Narrow(o.rounding.plan, o.rounding.io, o.rounding.repeat, form))


def _written(o: Oracle, places: Tensor, tile: int) -> Answer | None:
    """Only the rows or columns `places` within full tiles are written; None if fewer than two are left out."""
    count = places.numel()
    if count <= tile or count % tile < 2:
        return None
    return o.resume(out=torch.where(places < count // tile * tile, o.s.out, NAN))


def _coarser(o: Oracle, form: str) -> bool:
    return FORMATS[form].precision < FORMATS[o.problem.dtype].precision or form != o.problem.dtype
