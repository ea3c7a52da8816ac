"""The steps of a sequence: dataclasses whose every field is picked from a list. Each changes the prepared layers of a
`World` and what is known of them, or calls one and judges the answer. A step that means nothing where it stands does
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.inputs.draw import Inputs, in_layout
from harness.problem.case import Problem
from harness.scenarios import weight_swap
from harness.scenarios.registry import SCENARIOS
from harness.scenarios.scratch import buffers
from harness.scenarios.stateful.state import SAME_SHAPES, State, stays_exact
from harness.session.session import Session
from harness.trace import fence
from harness.trace.bits import raw
from harness.trace.tracing import poison_


@dataclass(frozen=True)
class Call:
    layer: int
    tokens: int
    routing: str
    ids: int
    padded: bool
    out: bool
    twice: bool

    def __str__(self) -> str:
        more = [", padded rows" if self.padded else "", "" if self.out else ", without out"]
        told = f"layer {self.layer}: call with {self.tokens} tokens, {self.routing} routing, int{self.ids} ids"
        return f"{told}{''.join(more)}{', twice' if self.twice else ''}"

    def take(self, world: State) -> None:
        held, s = world.held(self.layer), world.s
        inputs = world.batch(held, tokens=self.tokens, routing=self.routing, ids=self.ids, padded=self.padded)
        if inputs is None:
            return
        call = held.call if self.out else lambda *arguments: held.call(*arguments)
        first = s.check(call, inputs).clone()
        if self.twice:
            again = s.check(call, inputs, "again")
            same = torch.equal(raw(first), raw(again)) or getattr(s.backend, "deterministic", True) is not True
            s.require(same, "the same call again gave other bits")


@dataclass(frozen=True)
class Swap:
    layer: int
    swap: str
    seed: int

    def __str__(self) -> str:
        return f"layer {self.layer}: all weights become those of seed {self.seed}, by {self.swap}"

    def take(self, world: State) -> None:
        held = world.held(self.layer)
        held.config["seed"] = self.seed
        other = world.s.draw(**held.config)
        getattr(weight_swap, self.swap)(held.backend_layer, other.backend_layer)
        held.base, held.changed = other.layer, frozenset()


@dataclass(frozen=True)
class Part:
    layer: int
    part: str
    by: str

    def __str__(self) -> str:
        return f"layer {self.layer}: {self.part} alone changes, or back, by {self.by}"

    def take(self, world: State) -> None:
        held = world.held(self.layer)
        if world.s.case.fill == "exact" and not stays_exact(self.part, held.problem):
            return
        held.changed ^= {self.part}
        new = getattr(in_layout(held.truth, held.problem.layout), self.part)
        if self.by == "copy_":
            getattr(held.backend_layer, self.part).copy_(new)
        else:
            setattr(held.backend_layer, self.part, fence.keep(new))


@dataclass(frozen=True)
class Configure:
    """The layer gets another configuration, and weights for it, under the same prepared call."""

    layer: int
    setting: tuple[str, Any]

    def __str__(self) -> str:
        return f"layer {self.layer}: reconfigured, {self.setting[0]}={self.setting[1]}, or back"

    def take(self, world: State) -> None:
        held, (name, value) = world.held(self.layer), self.setting
        asked = {**held.config, name: value}
        if held.config.get(name) == value:
            del asked[name]
        if not world.allows(world.s.case.change(**asked).problem):
            return
        other = world.s.draw(**asked)
        for each in fields(Layer):
            setattr(held.backend_layer, each.name, getattr(other.backend_layer, each.name))
        held.config, held.base, held.problem, held.changed = asked, other.layer, other.case.problem, frozenset()
        if held.room is not None:
            world.prepare(held)  # a scratch object is for one configuration


@dataclass(frozen=True)
class Activate:
    """The activation alone changes: the weights stay, and nothing else tells."""

    layer: int
    activation: str

    def __str__(self) -> str:
        return f"layer {self.layer}: the activation becomes {self.activation}, the weights stay"

    def take(self, world: State) -> None:
        held = world.held(self.layer)
        problem = replace(held.problem, activation=self.activation)
        if held.problem.activation in SAME_SHAPES and world.allows(problem):
            held.config["activation"] = self.activation
            held.problem = held.backend_layer.problem = problem


@dataclass(frozen=True)
class Prepare:
    layer: int
    layout: str
    room: int | None

    def __str__(self) -> str:
        layout = "" if self.layout == "same" else ", converted to the other layout"
        scratch = "" if self.room is None else f", with the scratch object for {self.room} tokens"
        return f"layer {self.layer}: prepared again{layout}{scratch}"

    def take(self, world: State) -> None:
        held = world.held(self.layer)
        if self.layout == "other":
            layout = "kn" if held.problem.layout == "nk" else "nk"
            problem = replace(held.problem, layout=layout)
            if not world.allows(problem):
                return
            held.config["layout"], held.problem = layout, problem
            converted = in_layout(held.truth, layout)
            held.backend_layer = Layer(problem, **{name: fence.keep(t) for name, t in converted.tensors().items()})
        held.room = self.room
        world.prepare(held)


@dataclass(frozen=True)
class NaN:
    layer: int

    def __str__(self) -> str:
        return f"layer {self.layer}: call with hidden_states full of NaN"

    def take(self, world: State) -> None:
        held = world.held(self.layer)
        if (inputs := world.batch(held)) is not None:
            world.s.call(held.call, replace(inputs, hidden_states=torch.full_like(inputs.hidden_states, float("nan"))))


@dataclass(frozen=True)
class Fault:
    layer: int
    fault: str

    def __str__(self) -> str:
        return f"layer {self.layer}: a call that must be refused, {self.fault}, and a good one"

    def take(self, world: State) -> None:
        held = world.held(self.layer)
        if (inputs := world.batch(held)) is not None:
            SCENARIOS[f"error.{self.fault}"](_Midway(world.s, inputs, held.call))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Poison:
    scratch: int

    def __str__(self) -> str:
        return f"the scratch objects for {self.scratch} tokens are overwritten with NaN"

    def take(self, world: State) -> None:
        for (room, *_), scratch in world.scratches.items():
            for tensor in buffers(scratch).values() if room == self.scratch else ():
                poison_(tensor)


class _Midway:
    """The session of a scenario that is played in the middle of a sequence: it draws and prepares what is there."""

    def __init__(self, s: Session, inputs: Inputs, call: Callable[..., Tensor]) -> None:
        self._s, self._given, self._call = s, inputs, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._s, name)

    def draw(self) -> Inputs:
        return self._given

    def prepare(self, problem: Problem, layer: Layer) -> Callable[..., Tensor]:
        return self._call
