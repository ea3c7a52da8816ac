"""Deliberately broken backends: a correct backend with a fault that real kernels have had. All families must notice.

A fault changes the layer, the arguments or the output of each call of the wrapped backend; scratch objects, promises
and paths stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch

from harness.backend import Layer
from harness.problem import families

FAULTS: dict[str, Callable[..., Any]] = {}


def fault(function: Callable[..., Any]) -> Callable[..., Any]:
    FAULTS[function.__name__] = function
    return function


def layer_families() -> list[ModuleType]:
    """The families that judge the layer's output: all but the timed one and those of a single stage."""
    return [module for module in families.untimed() if not hasattr(module, "STAGE")]


class Broken:
    """`inner` with the fault of that name. Every attribute but prepare() is the inner backend's."""

    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner, self.fault = f"{inner.name}-{name}", inner, FAULTS[name]

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.inner, attribute)

    def prepare(self, problem: Any, layer: Layer, **options: Any) -> Callable[..., torch.Tensor]:
        def call(hidden_states, topk_weights, topk_ids, out=None):
            spoiled = replace(layer)

            def run(x=hidden_states, weights=topk_weights, ids=topk_ids, into=out):
                return self.inner.prepare(spoiled.problem, spoiled, **options)(x, weights, ids, out=into)

            return self.fault(run, spoiled, hidden_states, topk_weights, topk_ids)

        return call


def _rows(layer: Layer, tensor: torch.Tensor) -> int:
    """The dimension of w13 (or its bias) that counts the 2I rows."""
    return 1 if tensor.dim() == 2 or layer.problem.layout == "nk" else 2


@fault
def zeros(run, layer, x, weights, ids):
    """The kernel computes nothing: an all-zeros output passes many tests in the field."""
    return run().zero_()


@fault
def gate_up_swapped(run, layer, x, weights, ids):
    """Gate and up change places."""
    if layer.problem.activation == "relu2":
        return run().neg_()  # there is no up: any other structural fault will do
    packed = layer.problem.activation != "swigluoai"

    def swap(t):
        if t is None or t.dim() < 2:
            return t
        dim = _rows(layer, t)
        if packed:
            return torch.cat(list(t.chunk(2, dim))[::-1], dim) if t.shape[dim] % 2 == 0 else t
        return t.unflatten(dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1)

    layer.w13, layer.w13_bias = swap(layer.w13), swap(layer.w13_bias)
    return run()


@fault
def wrong_expert(run, layer, x, weights, ids):
    """Every token goes to its neighbour's expert."""
    for field in fields(Layer):
        t = getattr(layer, field.name)
        if isinstance(t, torch.Tensor) and field.name.startswith(("w13", "w2")):
            setattr(layer, field.name, t.roll(1, 0))
    return run()


@fault
def slot_dropped(run, layer, x, weights, ids):
    """The last slot of every token is left out."""
    return run(ids=torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], -1)], 1))


@fault
def weight_twice(run, layer, x, weights, ids):
    """The router weight is applied on input and again on output: its square."""
    return run(weights=weights * weights)


@fault
def bias_missing(run, layer, x, weights, ids):
    """The biases are forgotten."""
    layer.w13_bias = layer.w2_bias = None
    layer.problem = replace(layer.problem, bias=False)
    return run()


@fault
def gemm2_skipped(run, layer, x, weights, ids):
    """The second GEMM is skipped: its bias alone comes out."""
    layer.w2 = torch.zeros_like(layer.w2)
    return run()


@fault
def last_row_unwritten(run, layer, x, weights, ids):
    """The last token's row keeps what was in memory."""
    out = run()
    out[-1:] = float("nan")
    return out


@fault
def one_percent(run, layer, x, weights, ids):
    """Everything is one percent too large: a wrong scale."""
    return run().mul_(1.01)


@fault
def stale_rows(run, layer, x, weights, ids):
    """Each row of hidden_states is taken from the token before."""
    return run(x=x.roll(1, 0))


def judge_family(name: str, inner: Any, device: Any, every: int = 1) -> dict[str, tuple[int, int]]:
    """Per fault: (rows of the family that noticed it, rows asked), over every n-th row that `inner` can run at all."""
    from harness.problem.families import families, rows
    from harness.run.case import run_case
    from harness.session.applies import why_not

    module = next(m for m in families() if m.FAMILY == name)
    able = [r.case for r in rows(module, device.on_cpu) if why_not(r.case, inner, device) is None]
    found = {}
    for fault_name in FAULTS:
        # A missing bias can only be noticed where there is one.
        asked = [c for c in able if c.problem.bias][:8] if fault_name == "bias_missing" else able[::every]
        verdicts = [run_case(case, Broken(fault_name, inner), device, name) for case in asked]
        ran = [v for v in verdicts if v.status != "unsupported"]
        found[fault_name] = (sum(not v.green for v in ran), len(ran))
    return found


def main() -> None:
    """python3 -m tests.support.broken: the table of faults against families."""
    from harness.device import Device, start

    start({"cpu"})
    from kernels.triton.backend import TritonPermuteMoE
    from tests.support.emulated import Emulated

    names = [m.FAMILY for m in layer_families()]
    table = {}
    for name in names:
        # Scratch objects and refusals need a backend that has them; for the rest plain torch does, and is faster.
        real = name in ("scratch", "errors")
        inner = TritonPermuteMoE() if real else Emulated("emulated")
        table[name] = judge_family(name, inner, Device("cpu"), every=6 if real else 10)
    print(f"{'rows that noticed / rows asked':<20} " + " ".join(f"{n[:13]:>13}" for n in names))
    for fault_name in FAULTS:
        cells = [f"{a}/{b}" for a, b in (table[n][fault_name] for n in names)]
        print(f"{fault_name:<30} " + " ".join(f"{c:>13}" for c in cells))


if __name__ == "__main__":
    main()
