"""The prepared layers of one process while a sequence goes on, and what is known of each (steps.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.inputs.draw import Inputs
from harness.problem.case import Case, Problem
from harness.session.session import Session

SAME_SHAPES = ("silu", "gelu", "gelu_tanh")  #: activations for which one layer's weights will do


@dataclass
class PreparedLayer:
    """A prepared layer, and what is known of it."""

    config: dict[str, Any]  #: changes of the case: its own seed, layout, dtype, ...
    base: Layer  #: the layer as drawn, in layout "nk"
    backend_layer: Layer  #: what the backend has
    problem: Problem
    call: Callable[..., Tensor]
    room: int | None = None  #: the most tokens that its scratch object takes
    changed: frozenset[str] = frozenset()  #: the tensors that are not as drawn (PARTS)

    @property
    def truth(self) -> Layer:
        """The layer as it is now, in layout "nk"."""
        parts = {name: PARTS[name](getattr(self.base, name), self.problem) for name in self.changed}
        return replace(self.base, problem=self.problem, **parts)

    @property
    def variant(self) -> str:
        """What tells the layer from one that is drawn for the case of a call: it was drawn for another, and changed."""
        drawn_for = Case(self.base.problem.weights_key(), seed=self.config["seed"])
        return "+".join((str(drawn_for), *sorted(self.changed)))


def _times(factor: float) -> Callable[[Tensor, Problem], Tensor]:
    return lambda tensor, problem: (tensor.float() * factor).to(tensor.dtype)


def _moved(expert_map: Tensor, problem: Problem) -> Tensor:
    """The experts of this rank change places."""
    return torch.where(expert_map >= 0, (expert_map + 1) % problem.local_experts, -1).to(expert_map.dtype)


#: What becomes of one tensor alone. Signs, zeros and powers of two: what was exact stays so.
PARTS: dict[str, Callable[[Tensor, Problem], Tensor]] = {
    "w2": _times(-1), "w2_bias": _times(-1), "w13_bias": _times(0), "w13_scale": _times(2), "w2_scale": _times(2),
    "a13_scale": _times(2), "a2_scale": _times(2), "expert_map": _moved,
}  # fmt: skip


def stays_exact(part: str, problem: Problem) -> bool:
    """Whether an exact fill is still exact when this part changes: a scale multiplies gates, which must stay saturated
    and unclamped, and sums, whose other addends it does not multiply."""
    if part == "w13_scale":
        static = problem.quant is not None and problem.quant.activation == "tensor_static"
        alone = problem.limit is None and problem.activation != "swigluoai" and not problem.router_weight_on_input
        return alone and not problem.bias and not static
    return part != "w2_scale" or not problem.bias


@dataclass
class State:
    """The layers of one process while a sequence goes on. The second one is prepared where a step first asks for it."""

    s: Session
    layers: dict[int, PreparedLayer] = field(default_factory=dict)
    scratches: dict[tuple, Any] = field(default_factory=dict)
    allowed: dict[Problem, bool] = field(default_factory=dict)

    def held(self, layer: int) -> PreparedLayer:
        if layer not in self.layers:
            config: dict[str, Any] = {"seed": self.s.case.seed + 10 * layer}
            if self.allows(replace(self.s.case.problem, routing="invalid")):
                config["routing"] = "invalid"  # a backend may look at the prepared problem for what it is to expect
            drawn = self.s.draw(**config)
            problem = drawn.case.problem
            call = self.s.prepare(problem, drawn.backend_layer)
            self.layers[layer] = PreparedLayer(config, drawn.layer, drawn.backend_layer, problem, call)
        return self.layers[layer]

    def allows(self, problem: Problem) -> bool:
        if problem not in self.allowed:
            self.allowed[problem] = self.s.why_not(problem) is None
        return self.allowed[problem]

    def batch(self, held: PreparedLayer, **changes: Any) -> Inputs | None:
        """A batch for a layer as it is now; None if the backend excludes it."""
        if held.room is not None:
            changes["tokens"] = min(changes.get("tokens", self.s.case.problem.tokens), held.room)
        drawn = self.s.draw(**{**held.config, **changes})
        if not self.allows(drawn.case.problem):
            return None
        truth = replace(held.truth, problem=drawn.case.problem)
        return replace(drawn, layer=truth, backend_layer=held.backend_layer, variant=held.variant)

    def scratch(self, problem: Problem, room: int) -> Any:
        """One for all layers whom it fits, as an engine keeps it."""
        fits = (room, problem.top_k, problem.num_experts, problem.local_experts, problem.hidden_size, problem.dtype)
        if fits not in self.scratches:
            self.scratches[fits] = self.s.backend.make_scratch(replace(problem, tokens=room), self.s.device.torch)
        return self.scratches[fits]

    def prepare(self, held: PreparedLayer) -> None:
        options = {} if held.room is None else {"scratch": self.scratch(held.problem, held.room)}
        held.call = self.s.prepare(held.problem, held.backend_layer, **options)
