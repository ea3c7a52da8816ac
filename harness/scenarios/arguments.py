"""Scenarios of the same arguments in other memory: strided tensors, and an output that the backend allocates.

A serving engine passes slices of larger buffers: columns of a router's table, rows of padded weights, an output inside
a padded one. A backend either refuses such strides with an error that names them, or computes the same output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from harness.backend import Layer, Unsupported, takes_out
from harness.device import DeviceLost
from harness.inputs.draw import Inputs
from harness.scenarios.registry import batch, scenario, start
from harness.session.session import Session
from harness.trace.bits import same_bits
from harness.trace.fence import poison_

GAP = 16  #: elements between two rows: whole vectors of every dtype


@scenario("arguments.own_output")
def own_output(s: Session) -> None:
    """Without `out` a call allocates its output: neither the input's memory nor that of another call's output."""
    inputs, call = start(s)

    def without_out(*arguments: Tensor) -> Tensor:
        return call(*arguments)

    first = s.check(without_out, inputs, "no out")
    kept = first.clone()
    second = s.check(without_out, batch(s, inputs, tokens=inputs.case.problem.tokens + 1), "one token more")
    s.require(same_bits(first, kept), "the output of a call was overwritten by the next call")
    s.require(
        second.untyped_storage().data_ptr() != first.untyped_storage().data_ptr(), "two calls returned the same memory"
    )


@scenario("arguments.strided_out")
def strided_out(s: Session) -> None:
    """An output with a row stride larger than its row length: nothing is written into the gaps."""
    inputs, call = _with_out(s)
    gaps: list[Tensor] = []

    def into_padded(*arguments: Tensor, out: Tensor) -> Tensor:
        buffer = poison_(out.new_empty(len(out), out.shape[1] + GAP))
        result = call(*arguments, out=buffer[:, : out.shape[1]])
        gaps.append(buffer[:, out.shape[1] :])
        return out.copy_(result)

    _right_or_refused(s, into_padded, inputs, "padded rows of out")
    for gap in gaps:
        s.require(bool(gap.isnan().all()), "written between the rows of out")


@scenario("arguments.neighbours")
def neighbours(s: Session) -> None:
    """An output directly behind hidden_states in one buffer, and directly before it: they do not overlap."""
    inputs, call = _with_out(s)
    for places, what in (((0, 1), "right behind"), ((1, 0), "right before")):

        def side_by_side(*arguments: Tensor, out: Tensor, places: tuple[int, int] = places) -> Tensor:
            x, *routing = arguments
            buffer = poison_(x.new_empty(2, *x.shape))
            hidden_states, into = (buffer[place] for place in places)
            result = call(hidden_states.copy_(x), *routing, out=into)
            s.require(same_bits(hidden_states, x), "hidden_states was changed by the call")
            return out.copy_(result)

        _right_or_refused(s, side_by_side, inputs, f"out {what} hidden_states")


def _with_out(s: Session) -> tuple[Inputs, Callable[..., Any]]:
    inputs, call = start(s)
    if not takes_out(call):
        raise Unsupported(f"scenario: {s.backend.name} takes no out")
    return inputs, call


@scenario("arguments.strided_routing")
def strided_routing(s: Session) -> None:
    """Router weights and ids as columns of a wider table, and as a transposed table."""
    inputs, call = start(s)
    for names in (("topk_weights", "topk_ids"), ("topk_weights",), ("topk_ids",)):
        for how, change in (("columns of a wider table", _columns), ("a transposed table", _transposed)):
            changed: dict[str, Any] = {name: change(getattr(inputs, name)) for name in names}
            _right_or_refused(s, call, replace(inputs, **changed), f"{' and '.join(names)}: {how}")


@scenario("arguments.strided_layer")
def strided_layer(s: Session) -> None:
    """Weights, scales and biases with a row stride larger than their row length: one tensor at a time, then all."""
    inputs = s.draw()
    names = [n for n in ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias") if _wide(inputs.backend_layer, n)]
    for chosen in (*[(name,) for name in names], tuple(names)):
        changed: dict[str, Any] = {name: _columns(getattr(inputs.backend_layer, name)) for name in chosen}
        strided = replace(inputs, backend_layer=replace(inputs.backend_layer, **changed))
        _right_or_refused(s, s.prepare(s.case.problem, strided.backend_layer), strided, ", ".join(chosen))


def _wide(layer: Layer, name: str) -> bool:
    tensor = getattr(layer, name)
    return tensor is not None and tensor.dim() > 1


def _columns(t: Tensor) -> Tensor:
    """The same values in rows with poison between them."""
    buffer = poison_(t.new_empty(*t.shape[:-1], t.shape[-1] + GAP))
    buffer[..., : t.shape[-1]].copy_(t)
    return buffer[..., : t.shape[-1]]


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


def _right_or_refused(s: Session, call: Callable[..., Any], inputs: Inputs, what: str) -> None:
    """Check the call; Unsupported if it refuses the strides by name, Failed if it raises another error."""
    try:
        s.check(call, inputs, what)
    except DeviceLost:  # a RuntimeError too, but no refusal
        raise
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:  # torch's own checks raise the last two
        named = any(word in str(error) for word in ("stride", "contiguous"))
        if not named and isinstance(error, RuntimeError | AssertionError):
            raise  # a crash that has nothing to do with strides
        s.require(named, f"{what}: neither computed nor refused by its strides: {error}")
        raise Unsupported(f"scenario: {s.backend.name} refuses {what}: {str(error).splitlines()[0]}") from error
