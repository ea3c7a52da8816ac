"""The state of a sequence (steps.py): the prepared layers of one process, and a model of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.inputs.draw import Inputs
from harness.problem.case import Problem
from harness.session.session import Session

SAME_SHAPES = ("silu", "gelu", "gelu_tanh")  #: activations that take weights of the same shapes


@dataclass
class PreparedLayer:
    """A layer that the backend has prepared, and the model of it: how it was drawn and what changed since."""

    config: dict[str, Any]  #: changes of the case: its own seed, layout, dtype, ...
    base: Layer  #: the layer as drawn, in layout "nk"
    backend_layer: Layer  #: the tensors that the backend has
    problem: Problem
    call: Callable[..., Tensor]
    capacity: int | None = None  #: the most tokens that its scratch object takes
    changed: frozenset[str] = frozenset()  #: the tensors that are not as drawn (PARTS)

    @property
    def current(self) -> Layer:
        """The layer as it must be now, in layout "nk", for the oracle."""
        parts = {name: PARTS[name](getattr(self.base, name), self.problem) for name in self.changed}
        return replace(self.base, problem=self.problem, **parts)


def _times(factor: float) -> Callable[[Tensor, Problem], Tensor]:
    return lambda tensor, problem: (tensor.float() * factor).to(tensor.dtype)


def _moved(expert_map: Tensor, problem: Problem) -> Tensor:
    """The experts of this rank change places."""
    return torch.where(expert_map >= 0, (expert_map + 1) % problem.local_experts, -1).to(expert_map.dtype)


#: Changes of one tensor alone, by signs, zeros and powers of two, which keep an exact fill exact.
PARTS: dict[str, Callable[[Tensor, Problem], Tensor]] = {
    "w2": _times(-1), "w2_bias": _times(-1), "w13_bias": _times(0), "w13_scale": _times(2), "w2_scale": _times(2),
    "a13_scale": _times(2), "a2_scale": _times(2), "expert_map": _moved,
}  # fmt: skip


def stays_exact(part: str, problem: Problem) -> bool:
    """Whether an exact fill is still exact when this tensor changes: a scale multiplies the gates, which must stay
    saturated and unclamped, and all addends of a sum but the bias."""
    if part == "w13_scale":
        static = problem.quant is not None and problem.quant.activation == "tensor_static"
        alone = problem.limit is None and problem.activation != "swigluoai" and not problem.router_weight_on_input
        return alone and not problem.bias and not static
    return part != "w2_scale" or not problem.bias


@dataclass
class State:
    """The prepared layers of one process while a sequence runs."""

    s: Session
    layers: dict[int, PreparedLayer] = field(default_factory=dict)
    scratches: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    allowed: dict[Problem, bool] = field(default_factory=dict)

    def layer(self, number: int) -> PreparedLayer:
        """The layer of this number, prepared when a step first uses it."""
        if number not in self.layers:
            config: dict[str, Any] = {"seed": self.s.case.seed + 10 * number}
            if self.allows(replace(self.s.case.problem, routing="invalid")):
                config["routing"] = "invalid"  # a backend may read in the prepared problem which ids to expect
            drawn = self.s.draw(**config)
            problem = drawn.case.problem
            call = self.s.prepare(problem, drawn.backend_layer)
            self.layers[number] = PreparedLayer(config, drawn.layer, drawn.backend_layer, problem, call)
        return self.layers[number]

    def allows(self, problem: Problem) -> bool:
        """Whether the backend runs this problem."""
        if problem not in self.allowed:
            self.allowed[problem] = self.s.why_not(problem) is None
        return self.allowed[problem]

    def batch(self, layer: PreparedLayer, **changes: Any) -> Inputs | None:
        """Draw a batch for a layer as it is now; None if the backend does not run it. changes: of Problem."""
        if layer.capacity is not None:
            changes["tokens"] = min(changes.get("tokens", self.s.case.problem.tokens), layer.capacity)
        drawn = self.s.draw(**{**layer.config, **changes})
        problem = drawn.case.problem
        if not self.allows(problem):
            return None
        return replace(drawn, layer=replace(layer.current, problem=problem), backend_layer=layer.backend_layer)

    def scratch(self, problem: Problem, capacity: int) -> Any:
        """The scratch object for this capacity: one for all layers of the same sizes, as an engine keeps it."""
        sizes = (problem.top_k, problem.num_experts, problem.local_experts, problem.hidden_size, problem.dtype)
        key = (capacity, *sizes)
        assert self.s.backend.make_scratch is not None  # or no step would have a capacity
        if key not in self.scratches:
            self.scratches[key] = self.s.backend.make_scratch(replace(problem, tokens=capacity), self.s.device.torch)
        return self.scratches[key]

    def prepare(self, layer: PreparedLayer) -> None:
        """Prepare the layer again, with a scratch object if it has a capacity."""
        options = {} if layer.capacity is None else {"scratch": self.scratch(layer.problem, layer.capacity)}
        layer.call = self.s.prepare(layer.problem, layer.backend_layer, **options)
