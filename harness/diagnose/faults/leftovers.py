"""Faults of a session: this call computed with something of an earlier call. Built from the calls, not in the bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.diagnose.faults.registry import Fault
from harness.inputs.draw import Inputs
from harness.oracle.stages import Answer, Oracle, on_cpu

Past = list[tuple[Inputs, Tensor]]  #: earlier calls and their outputs [T, K] float64, the last call last
MOST_CALLS = 3  #: calls of a case that are remembered

LAYER_TENSORS = tuple(f.name for f in fields(Layer) if f.name != "problem")
#: What may be left of a call, and the layer's tensors that it consists of; the smallest first.
LEFTOVERS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in LAYER_TENSORS},
    "the weights": ("w13", "w2"),
    "the scales": ("w13_scale", "w2_scale", "a13_scale", "a2_scale"),
    "the biases": ("w13_bias", "w2_bias"),
    "all the layer's tensors": LAYER_TENSORS,
    **{what: () for what in ("router weights", "ids", "hidden_states", "the output")},
}

_Answer = Callable[[Oracle], Answer | None]


def leftovers(past: Past) -> dict[str, Fault]:
    """The faults by id: what this call returns with something of an earlier call. The previous call comes first."""
    found = {}
    for calls_ago, (inputs, out) in enumerate(reversed(past), 1):
        for what, answer in _left_by(inputs, out):
            new = Fault(leftover_id(what, calls_ago), leftover_text(what, calls_ago), answer, calls_ago=calls_ago)
            found[new.id] = new
    return found


def leftover_id(what: str, calls_ago: int) -> str:
    """The id of one of LEFTOVERS, left by the previous call (1) or by an earlier one."""
    return f"leftover.{what.removeprefix('the ').replace(chr(39), '').replace(' ', '_')}.{calls_ago}"


def leftover_text(what: str, calls_ago: int) -> str:
    """The text of one of LEFTOVERS, left by the previous call (1) or by an earlier one."""
    return f"{what} of the previous call" if calls_ago == 1 else f"{what} of {calls_ago} calls ago"


def leftover_with_text(text: str) -> str | None:
    """The id of the leftover with this text, or None."""
    for calls_ago in range(1, MOST_CALLS + 1):
        for what in LEFTOVERS:
            if leftover_text(what, calls_ago) == text:
                return leftover_id(what, calls_ago)
    return None


def _left_by(past: Inputs, out: Tensor) -> Iterator[tuple[str, _Answer]]:
    old = on_cpu(past.layer)

    def tensors(names: tuple[str, ...]) -> _Answer:
        def function(o: Oracle) -> Answer | None:
            mine = {n: getattr(old, n) for n in names if getattr(old, n) is not None}
            fits = mine and all(_fits(getattr(o.layer, n), t) for n, t in mine.items())
            return o(layer=replace(o.layer, **mine)) if fits else None

        return function

    def argument(name: str, tensor: Tensor) -> _Answer:
        changed: dict[str, Any] = {name: tensor}
        return lambda o: o(**changed) if tensor.shape == getattr(o, name).shape else None

    def rows(o: Oracle) -> Answer | None:
        if out.shape[1] != o.x.shape[1]:
            return None
        kept = torch.full_like(o.x, float("nan"))
        kept[: len(out)] = out[: len(kept)]
        return o.resume(out=kept)

    for what, names in LEFTOVERS.items():
        if names:
            yield what, tensors(names)
    before = Oracle(past)
    yield "router weights", argument("weights", before.weights)
    yield "ids", argument("ids", before.ids)
    yield "hidden_states", argument("x", before.x)
    yield "the output", rows


def _fits(mine: Tensor | None, other: Tensor) -> bool:
    return mine is not None and mine.shape == other.shape and mine.dtype == other.dtype
