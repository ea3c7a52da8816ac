"""Scenarios of weights that change under a prepared layer: whatever changes, the next call must compute with it.

A backend that keeps something derived from the weights says so by `follows`, the set of changes that it notices without
a new prepare(): "in_place", "rebinding", "config". Left out, it follows everything.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from harness.backend import Layer, Unsupported
from harness.scenarios.registry import batch, kept_alive, require_promise, scenario, start
from harness.session.session import Session
from harness.trace.tracing import poison_


def _require_follows(s: Session, kind: str) -> None:
    if kind not in getattr(s.backend, "follows", {"in_place", "rebinding", "config"}):
        raise Unsupported(f"scenario: {s.backend.name} declares that it does not follow {kind} changes")


def _swap(name: str, kind: str) -> Callable:
    """A scenario that checks a call, changes the layer's tensors into another layer's, and checks again, twice."""

    def register(change: Callable[[Layer, Layer], None]) -> Callable:
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
    for name, tensor in layer.tensors().items():
        tensor.copy_(getattr(new, name))


@_swap("data_copy_", "in_place")
def data_copy_(layer: Layer, new: Layer) -> None:
    """A write that leaves no version behind."""
    for name, tensor in layer.tensors().items():
        tensor.data.copy_(getattr(new, name))


@_swap("inference_mode", "in_place")
def inference_mode(layer: Layer, new: Layer) -> None:
    with torch.inference_mode():
        copy_(layer, new)


@_swap("data", "rebinding")
def data(layer: Layer, new: Layer) -> None:
    """The same tensor object gets other memory."""
    for name, tensor in layer.tensors().items():
        old = tensor.data
        tensor.data = getattr(new, name).clone()
        poison_(old)  # whoever still reads there computes NaN


@_swap("parameter", "rebinding")
def parameter(layer: Layer, new: Layer) -> None:
    """What a reload does: a new Parameter takes the old one's place."""
    for name in layer.tensors():
        value = getattr(new, name).clone()
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))


@_swap("same_address", "rebinding")
def same_address(layer: Layer, new: Layer) -> None:
    """Freed and reallocated: a new tensor object with other values at the very address of the old one."""
    for name, tensor in layer.tensors().items():
        storage, shape, stride = tensor.untyped_storage(), tensor.shape, tensor.stride()
        fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, shape, stride)
        fresh.copy_(getattr(new, name))
        setattr(layer, name, fresh)


@_swap("offload", "rebinding")
def offload(layer: Layer, new: Layer) -> None:
    """CPU offload and restore: the values come back at another address, and the old memory is somebody else's."""
    for name, tensor in layer.tensors().items():
        away = getattr(new, name).cpu().clone()
        old = tensor.data
        tensor.data = torch.empty(0, dtype=tensor.dtype)
        poison_(old)
        tensor.data = away.to(old.device)


def _partial(s: Session, names: tuple[str, ...], nothing: str) -> None:
    """Only some of the layer's tensors are replaced by another layer's."""
    _require_follows(s, "in_place")
    inputs, call = start(s)
    layer, mine = inputs.backend_layer, [n for n in names if getattr(inputs.backend_layer, n) is not None]
    if not mine:
        raise Unsupported(f"scenario: {nothing}")
    s.check(call, inputs, "before the swap")
    other = s.draw(seed=s.case.seed + 1)
    for name in mine:
        getattr(layer, name).copy_(getattr(other.backend_layer, name))
    mixed = replace(inputs.layer, **{n: getattr(other.layer, n) for n in mine})
    s.check(call, replace(inputs, layer=mixed, variant="+".join(mine)), f"after a new {', '.join(mine)}")


@scenario("swap.scales")
def scales(s: Session) -> None:
    _partial(s, ("w13_scale", "w2_scale", "a13_scale", "a2_scale"), "the layer has no scales")


@scenario("swap.bias")
def bias(s: Session) -> None:
    _partial(s, ("w13_bias", "w2_bias"), "the layer has no bias")


@scenario("swap.w2")
def only_w2(s: Session) -> None:
    _partial(s, ("w2",), "")


@scenario("swap.expert_map")
def expert_map(s: Session) -> None:
    """The experts move to other places of this rank (and so does the map alone, rebound and in place)."""
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
        moved = replace(inputs.layer, expert_map=new)
        s.check(call, replace(inputs, layer=moved, variant=f"map{n}"), "after a new expert_map")


def _reconfigure(s: Session, **changes) -> None:
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
    _reconfigure(s, dtype="fp16" if s.case.problem.dtype == "bf16" else "bf16")


@scenario("swap.experts")
def experts(s: Session) -> None:
    _reconfigure(s, num_experts=2 * s.case.problem.num_experts)


@scenario("swap.top_k")
def top_k(s: Session) -> None:
    _reconfigure(s, top_k=s.case.problem.top_k + 1)


@scenario("swap.activation")
def activation(s: Session) -> None:
    """The activation alone: the weights stay, so that nothing else tells that the layer changed."""
    _require_follows(s, "config")
    inputs, call = start(s)
    s.check(call, inputs, "before")
    problem = replace(inputs.case.problem, activation="gelu" if inputs.case.problem.activation == "silu" else "silu")
    if reason := s.why_not(problem):
        raise Unsupported(reason)
    inputs.backend_layer.problem = problem
    case = replace(inputs.case, problem=problem)
    other = replace(inputs, case=case, layer=replace(inputs.layer, problem=problem), variant="activation")
    s.check(call, other, f"after {problem.activation}")


@scenario("swap.two_layers")
def two_layers(s: Session) -> None:
    """Two layers of one process, called in turn: neither may see the other's weights, scratch or instance."""
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
        except Exception as error:  # handed to the main thread below
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
    """After a swap nothing holds the old weights: they would fill the device."""
    _require_follows(s, "rebinding")
    inputs, call = start(s)
    layer = inputs.backend_layer
    s.check(call, inputs, "before")
    other = s.draw(seed=s.case.seed + 1)
    old = kept_alive(layer)
    parameter(layer, other.backend_layer)
    s.check(call, replace(other, backend_layer=layer), "after")
    del inputs
    gc.collect()
    alive = sum(ref() is not None for ref in old)
    s.require(alive == 0, f"{alive} of {len(old)} old tensors of the layer are still referenced after the swap")


@scenario("swap.dropped")
def dropped(s: Session) -> None:
    """A layer that nobody needs any more frees its memory with its call, and does not wait for the collector."""
    inputs, call = start(s)
    s.check(call, inputs, "before")
    old = kept_alive(inputs.backend_layer)
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
    """A steady layer is built once, whatever the batches; each swap builds once more."""
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
