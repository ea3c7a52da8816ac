"""The steps of a sequence: dataclasses, each field of which is picked from a list.

`apply` changes a prepared layer of a `State` together with the model of it, or calls a layer and judges the output. A
step that does not apply to the state does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from harness.backend import Layer
from harness.inputs.draw import in_layout
from harness.scenarios import bad_input, weight_swap
from harness.scenarios.scratch import buffers
from harness.scenarios.stateful.state import SAME_SHAPES, State, stays_exact
from harness.trace import fence
from harness.trace.bits import same_bits
from harness.trace.tracing import poison_


@dataclass(frozen=True)
class Call:
    """One batch through a prepared layer, judged; twice: called again, for the same bits."""

    layer: int
    tokens: int
    routing: str
    ids: int
    padded: bool
    out: bool
    twice: bool

    def __str__(self) -> str:
        more = [", padded rows" if self.padded else "", "" if self.out else ", without out"]
        text = f"layer {self.layer}: call with {self.tokens} tokens, {self.routing} routing, int{self.ids} ids"
        return f"{text}{''.join(more)}{', twice' if self.twice else ''}"

    def apply(self, state: State) -> None:
        layer, s = state.layer(self.layer), state.s
        inputs = state.batch(layer, tokens=self.tokens, routing=self.routing, ids=self.ids, padded=self.padded)
        if inputs is None:
            return
        call = layer.call if self.out else lambda *arguments: layer.call(*arguments)
        first = s.check(call, inputs).clone()
        if self.twice:
            again = s.check(call, inputs, "again")
            same = same_bits(first, again) or not s.backend.deterministic
            s.require(same, "the same call again gave other bits")


@dataclass(frozen=True)
class Swap:
    """All weights become those of another seed."""

    layer: int
    swap: str
    seed: int

    def __str__(self) -> str:
        return f"layer {self.layer}: all weights become those of seed {self.seed}, by {self.swap}"

    def apply(self, state: State) -> None:
        layer = state.layer(self.layer)
        layer.config["seed"] = self.seed
        other = state.s.draw(**layer.config)
        getattr(weight_swap, self.swap)(layer.backend_layer, other.backend_layer)
        layer.base, layer.changed = other.layer, frozenset()


@dataclass(frozen=True)
class Part:
    """One tensor alone changes."""

    layer: int
    part: str
    by: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.part} alone changes, or back, by {self.by}"

    def apply(self, state: State) -> None:
        layer = state.layer(self.layer)
        if state.s.case.fill == "exact" and not stays_exact(self.part, layer.problem):
            return
        layer.changed ^= {self.part}
        new = getattr(in_layout(layer.current, layer.problem.layout), self.part)
        if self.by == "copy_":
            getattr(layer.backend_layer, self.part).copy_(new)
        else:
            setattr(layer.backend_layer, self.part, fence.keep(new))


@dataclass(frozen=True)
class Configure:
    """The layer object gets another configuration, and weights for it, under the same prepared call."""

    layer: int
    setting: tuple[str, Any]

    def __str__(self) -> str:
        return f"layer {self.layer}: reconfigured, {self.setting[0]}={self.setting[1]}, or back"

    def apply(self, state: State) -> None:
        layer, (name, value) = state.layer(self.layer), self.setting
        config = {**layer.config, name: value}
        if layer.config.get(name) == value:
            del config[name]
        if not state.allows(state.s.case.change(**config).problem):
            return
        other = state.s.draw(**config)
        for each in fields(Layer):
            setattr(layer.backend_layer, each.name, getattr(other.backend_layer, each.name))
        layer.config, layer.base, layer.problem, layer.changed = config, other.layer, other.case.problem, frozenset()
        if layer.capacity is not None:
            state.prepare(layer)  # a scratch object serves one configuration


@dataclass(frozen=True)
class Activate:
    """The activation alone changes: no tensor shows it."""

    layer: int
    activation: str

    def __str__(self) -> str:
        return f"layer {self.layer}: the activation becomes {self.activation}, the weights stay"

    def apply(self, state: State) -> None:
        layer = state.layer(self.layer)
        problem = replace(layer.problem, activation=self.activation)
        if layer.problem.activation in SAME_SHAPES and state.allows(problem):
            layer.config["activation"] = self.activation
            layer.problem = layer.backend_layer.problem = problem


@dataclass(frozen=True)
class Prepare:
    """The layer is prepared again, perhaps in the other layout or with a scratch object."""

    layer: int
    layout: str
    capacity: int | None

    def __str__(self) -> str:
        layout = "" if self.layout == "same" else ", converted to the other layout"
        scratch = "" if self.capacity is None else f", with the scratch object for {self.capacity} tokens"
        return f"layer {self.layer}: prepared again{layout}{scratch}"

    def apply(self, state: State) -> None:
        layer = state.layer(self.layer)
        if self.layout == "other":
            layout = "kn" if layer.problem.layout == "nk" else "nk"
            problem = replace(layer.problem, layout=layout)
            if not state.allows(problem):
                return
            layer.config["layout"], layer.problem = layout, problem
            converted = in_layout(layer.current, layout)
            layer.backend_layer = Layer(problem, **{name: fence.keep(t) for name, t in converted.tensors().items()})
        layer.capacity = self.capacity
        state.prepare(layer)


@dataclass(frozen=True)
class NaN:
    """A call with hidden_states full of NaN, not judged: the next ones are."""

    layer: int

    def __str__(self) -> str:
        return f"layer {self.layer}: call with hidden_states full of NaN"

    def apply(self, state: State) -> None:
        layer = state.layer(self.layer)
        if (inputs := state.batch(layer)) is not None:
            state.s.call(layer.call, replace(inputs, hidden_states=torch.full_like(inputs.hidden_states, float("nan"))))


@dataclass(frozen=True)
class BadArgument:
    """A call with a bad argument, and a good one."""

    layer: int
    fault: str

    def __str__(self) -> str:
        return f"layer {self.layer}: a call that must be refused, {self.fault}, and a good one"

    def apply(self, state: State) -> None:
        layer = state.layer(self.layer)
        if (inputs := state.batch(layer)) is not None:
            bad_input.FAULTS[self.fault].check(state.s, inputs, layer.call)


@dataclass(frozen=True)
class Poison:
    """Scratch objects are overwritten between calls."""

    scratch: int

    def __str__(self) -> str:
        return f"the scratch objects for {self.scratch} tokens are overwritten with NaN"

    def apply(self, state: State) -> None:
        for (capacity, *_), scratch in state.scratches.items():
            for tensor in buffers(scratch).values() if capacity == self.scratch else ():
                poison_(tensor)
