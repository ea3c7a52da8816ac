"""Scenarios of weights that change under a prepared layer: the next call must compute with the new ones.

A backend that keeps something derived from the weights declares `follows`, the set of changes that it notices without
a new prepare(): "in_place", "rebinding", "config". By default a backend follows all of them.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from harness.backend import Layer, Unsupported
from harness.scenarios.registry import batch, require_promise, scenario, start, weak_references
from harness.session.session import Session
from harness.trace.tracing import poison_

Change = Callable[[Layer, Layer], None]  #: change(layer, new): the first gets the tensors' values of the second


def _require_follows(s: Session, kind: str) -> None:
    """Unsupported unless the backend notices changes of this kind."""
    if kind not in s.backend.follows:
        raise Unsupported(f"scenario: {s.backend.name} declares that it does not follow {kind} changes")


def _swap(name: str, kind: str) -> Callable[[Change], Change]:
    """Register scenario swap.<name>: check a call, change the layer's tensors into another layer's, and check again;
    twice."""

    def register(change: Change) -> Change:
        @scenario(f"swap.{name}")
        def swapped(s: Session) -> None:
            _require_follows(s, kind)
            inputs, call = start(s)
            layer = inputs.backend_layer
            s.check(call, inputs, "before the swap")
            for n in (1, 2):
                other = s.draw(seed=s.case.seed + n)
                change(layer, other.backend_layer)
                s.check(call, replace(other, backend_layer=layer), f"after swap {n}")

        return change

    return register


@_swap("copy_", "in_place")
def copy_(layer: Layer, new: Layer) -> None:
    """Write new values in place."""
    for name, tensor in layer.tensors().items():
        tensor.copy_(getattr(new, name))


@_swap("data_copy_", "in_place")
def data_copy_(layer: Layer, new: Layer) -> None:
    """A write that does not count in the tensor's version."""
    for name, tensor in layer.tensors().items():
        tensor.data.copy_(getattr(new, name))


@_swap("inference_mode", "in_place")
def inference_mode(layer: Layer, new: Layer) -> None:
    """Write new values in place under torch.inference_mode()."""
    with torch.inference_mode():
        copy_(layer, new)


@_swap("data", "rebinding")
def data(layer: Layer, new: Layer) -> None:
    """The same tensor object gets other memory."""
    for name, tensor in layer.tensors().items():
        old = tensor.data
        tensor.data = getattr(new, name).clone()
        poison_(old)  # a kernel that still reads there computes NaN


@_swap("parameter", "rebinding")
def parameter(layer: Layer, new: Layer) -> None:
    """A new Parameter replaces the old one, as in a reload."""
    for name in layer.tensors():
        value = getattr(new, name).clone()
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))


@_swap("same_address", "rebinding")
def same_address(layer: Layer, new: Layer) -> None:
    """Freed and reallocated: a new tensor object with other values at the address of the old one."""
    for name, tensor in layer.tensors().items():
        storage, shape, stride = tensor.untyped_storage(), tensor.shape, tensor.stride()
        fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, shape, stride)
        fresh.copy_(getattr(new, name))
        setattr(layer, name, fresh)


@_swap("offload", "rebinding")
def offload(layer: Layer, new: Layer) -> None:
    """CPU offload and restore: the values come back at another address, and the old memory is reused."""
    for name, tensor in layer.tensors().items():
        away = getattr(new, name).cpu().clone()
        old = tensor.data
        tensor.data = torch.empty(0, dtype=tensor.dtype)
        poison_(old)
        tensor.data = away.to(old.device)


def _partial(s: Session, names: tuple[str, ...], missing: str) -> None:
    """Only these tensors of the layer become another layer's; Unsupported, because of `missing`, if it has none."""
    _require_follows(s, "in_place")
    inputs, call = start(s)
    layer, present = inputs.backend_layer, [n for n in names if getattr(inputs.backend_layer, n) is not None]
    if not present:
        raise Unsupported(f"scenario: {missing}")
    s.check(call, inputs, "before the swap")
    other = s.draw(seed=s.case.seed + 1)
    for name in present:
        getattr(layer, name).copy_(getattr(other.backend_layer, name))
    mixed = replace(inputs.layer, **{n: getattr(other.layer, n) for n in present})
    s.check(call, replace(inputs, layer=mixed), f"after a new {', '.join(present)}")


@scenario("swap.scales")
def scales(s: Session) -> None:
    """The scales alone change."""
    _partial(s, ("w13_scale", "w2_scale", "a13_scale", "a2_scale"), "the layer has no scales")


@scenario("swap.bias")
def bias(s: Session) -> None:
    """The biases alone change."""
    _partial(s, ("w13_bias", "w2_bias"), "the layer has no bias")


@scenario("swap.w2")
def only_w2(s: Session) -> None:
    """w2 alone changes."""
    _partial(s, ("w2",), "")


@scenario("swap.expert_map")
def expert_map(s: Session) -> None:
    """The expert_map alone changes, by rebinding and then in place: the experts of this rank change places."""
    _require_follows(s, "rebinding")
    inputs, call = start(s)
    layer = inputs.backend_layer
    if layer.expert_map is None:
        raise Unsupported("scenario: the layer has no expert_map")
    s.check(call, inputs, "before")
    for n, rebind in enumerate((True, False)):
        old = inputs.layer.expert_map
        assert old is not None
        count = inputs.case.problem.local_experts
        new = torch.where(old >= 0, (old + 1 + n) % count, -1).to(old.dtype)
        if rebind:
            layer.expert_map = new.clone()
        else:
            layer.expert_map.copy_(new)
        s.check(call, replace(inputs, layer=replace(inputs.layer, expert_map=new)), "after a new expert_map")


def _reconfigure(s: Session, **changes: Any) -> None:
    """The layer object gets another Problem, with these changes, and tensors for it."""
    _require_follows(s, "config")
    inputs, call = start(s)
    layer = inputs.backend_layer
    s.check(call, inputs, "before")
    other = s.draw(**changes)
    layer.problem = other.backend_layer.problem
    for name in vars(layer):
        if name != "problem":
            setattr(layer, name, getattr(other.backend_layer, name))
    s.check(call, replace(other, backend_layer=layer), f"after {changes}")


@scenario("swap.dtype")
def dtype(s: Session) -> None:
    """Another dtype, and weights of it."""
    _reconfigure(s, dtype="fp16" if s.case.problem.dtype == "bf16" else "bf16")


@scenario("swap.experts")
def experts(s: Session) -> None:
    """Twice as many experts."""
    _reconfigure(s, num_experts=2 * s.case.problem.num_experts)


@scenario("swap.top_k")
def top_k(s: Session) -> None:
    """One more expert a token."""
    _reconfigure(s, top_k=s.case.problem.top_k + 1)


@scenario("swap.activation")
def activation(s: Session) -> None:
    """The activation alone changes: no tensor shows that the layer is another one."""
    _require_follows(s, "config")
    inputs, call = start(s)
    s.check(call, inputs, "before")
    problem = replace(inputs.case.problem, activation="gelu" if inputs.case.problem.activation == "silu" else "silu")
    if reason := s.why_not(problem):
        raise Unsupported(reason)
    inputs.backend_layer.problem = problem
    case = replace(inputs.case, problem=problem)
    other = replace(inputs, case=case, layer=replace(inputs.layer, problem=problem))
    s.check(call, other, f"after {problem.activation}")


@scenario("swap.two_layers")
def two_layers(s: Session) -> None:
    """Two layers of one process, called in turn: neither computes with the other's weights, scratch or instance."""
    first, call_first = start(s)
    second, call_second = start(s, seed=s.case.seed + 1)
    for n in (1, 2):
        s.check(call_first, first, f"first layer, round {n}")
        s.check(call_second, second, f"second layer, round {n}")


@scenario("swap.threads")
def threads(s: Session) -> None:
    """16 threads race the first call."""
    inputs, call = start(s)
    ready, outputs, errors = threading.Barrier(16), [], []

    def race() -> None:
        ready.wait()
        try:
            outputs.append(call(inputs.hidden_states, inputs.topk_weights, inputs.topk_ids))
        except BaseException as error:  # also SystemExit, which would end the thread without a word
            errors.append(error)

    racers = [threading.Thread(target=race) for _ in range(16)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    s.device.synchronize()
    if errors:
        raise errors[0]
    for out in outputs:
        s.accept(out, inputs, "one of 16 threads")
    if instance := getattr(call, "instance", None):
        s.require(instance.builds == 1, f"16 threads built {instance.builds} instances")
    s.check(call, inputs, "after the race")


@scenario("swap.released")
def released(s: Session) -> None:
    """After a swap no reference to the old weights remains: they would fill the device."""
    _require_follows(s, "rebinding")
    inputs, call = start(s)
    layer = inputs.backend_layer
    s.check(call, inputs, "before")
    other = s.draw(seed=s.case.seed + 1)
    old = weak_references(layer)
    parameter(layer, other.backend_layer)
    s.check(call, replace(other, backend_layer=layer), "after")
    del inputs
    gc.collect()
    alive = sum(ref() is not None for ref in old)
    s.require(alive == 0, f"{alive} of {len(old)} old tensors of the layer are still referenced after the swap")


@scenario("swap.dropped")
def dropped(s: Session) -> None:
    """A layer's memory is free once the layer and its call are dropped, without the garbage collector."""
    inputs, call = start(s)
    s.check(call, inputs, "before")
    old = weak_references(inputs.backend_layer)
    collecting = gc.isenabled()
    gc.disable()
    try:
        del inputs, call
        alive = sum(ref() is not None for ref in old)
    finally:
        if collecting:
            gc.enable()
    s.require(alive == 0, f"{alive} of {len(old)} tensors of the layer outlive it and its call: a cycle, or a cache")


@scenario("swap.one_build")
def one_build(s: Session) -> None:
    """An unchanged layer is built once for all batches; each swap builds once more."""
    require_promise(s, "one_build")
    inputs, call = start(s)
    instance: Any = getattr(call, "instance", None)
    s.require(instance is not None, "promises one_build, but what prepare() returned has no attribute instance")
    for tokens in (s.case.problem.tokens, 3, 1):
        s.check(call, batch(s, inputs, tokens=tokens), f"{tokens} tokens")
    s.require(instance.builds == 1, f"three batches of one layer built {instance.builds} instances")
    other = s.draw(seed=s.case.seed + 1)
    parameter(inputs.backend_layer, other.backend_layer)
    for _ in range(2):
        s.check(call, replace(other, backend_layer=inputs.backend_layer), "after the swap")
    s.require(instance.builds == 2, f"one swap led to {instance.builds - 1} new builds")
