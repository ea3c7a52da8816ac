"""What the cases of a process share: drawn layers, drawn inputs, and the oracle's results for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.device import Device
from harness.inputs.draw import Inputs, draw, draw_layer
from harness.inputs.sizes import weight_bytes
from harness.oracle.deviation import Expected, expect
from harness.oracle.experts import exact_output
from harness.problem.case import Case, Problem
from harness.trace import fence
from harness.trace.bits import digest
from reference.plan import RoundingPlan

WHOLE = 256 * 2**20  #: bytes of weights from which a layer is drawn, and the oracle computed, on the GPU
LAYERS, INPUTS, RESULTS = 2, 2, 12  #: how many of each are kept: the last ones


class OracleCache:
    """Drawn layers, drawn inputs and results of the oracle, computed once for all backends that a process tests."""

    def __init__(self) -> None:
        self._layers = lru_cache(maxsize=LAYERS)(draw_layer)
        self._inputs = lru_cache(maxsize=INPUTS)(self._draw)
        self._results: dict[Hashable, Any] = {}
        self._whole_layer: Problem | None = None

    def inputs(self, case: Case, device: Device) -> Inputs:
        """The case's inputs on the device. Two calls may return the same tensors: a caller that writes to the layer
        needs `with_own_layer`."""
        return self._inputs(case, oracle_device(case.problem, device), device.torch)

    def exact_output(self, inputs: Inputs, place: torch.device) -> Tensor:
        """The output [T, K] that every correct kernel returns for an exact fill, float64, computed on `place`."""
        return self._result((fingerprint(inputs), "exact", place), partial(exact_output, inputs, place))

    def expected(self, inputs: Inputs, plans: Iterable[RoundingPlan], place: torch.device) -> Iterator[Expected]:
        """The expected output under each plan in turn, computed on `place` when the iterator reaches it."""
        question = fingerprint(inputs)
        for plan in plans:
            yield self._result((question, plan, place), partial(expect, inputs, plan, place))

    def forget(self) -> None:
        """Drop every tensor and every result."""
        self._layers.cache_clear()
        self._inputs.cache_clear()
        self._results.clear()
        self._whole_layer = None

    def make_room(self, problem: Problem) -> None:
        """Drop everything unless the last call was for the same layer: two whole-size layers do not fit a device."""
        layer = problem.weights_key()
        if layer != self._whole_layer:
            self.forget()
            self._whole_layer = layer

    def _draw(self, case: Case, place: torch.device, device: torch.device) -> Inputs:
        drawn = draw(case, place, self._layers)
        return drawn if place == device else _on_device(drawn, device)

    def _result(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        if key not in self._results:
            while len(self._results) >= RESULTS:
                self._results.pop(next(iter(self._results)))
            self._results[key] = compute()
        return self._results[key]


ORACLE_CACHE = OracleCache()  #: of this process


def fingerprint(inputs: Inputs) -> Hashable:
    """All that the oracle's results depend on: two inputs with one fingerprint have the same results.

    The problem without the fields that only say how tensors are drawn or stored, and a digest of every tensor of the
    call and of the layer. No label takes part, so that a scenario may change any tensor.
    """
    problems = (replace(p.weights_key(), layout="nk") for p in (inputs.case.problem, inputs.layer.problem))
    tensors = {**inputs.arguments(), **inputs.layer.tensors()}
    return *problems, *((name, str(t.dtype), tuple(t.shape), digest(t)) for name, t in tensors.items())


def oracle_device(problem: Problem, device: Device) -> torch.device:
    """Where inputs are drawn and the oracle computes: the CPU, except for layers too large for it.

    RuntimeError if the oracle on the device does not agree with the oracle on the CPU.
    """
    if device.on_cpu or weight_bytes(problem) < WHOLE:
        return torch.device("cpu")
    require_agreement(device.torch)
    return device.torch


@lru_cache
def require_agreement(device: torch.device) -> None:
    """The oracle on this device must agree with the oracle on the CPU before it may judge anything there."""
    for text in ("t32-h512-i256-e8-k2-bf16-bias-random", "t32-h512-i384-e8-k4-bf16-e4m3.block.group-random"):
        inputs = draw(Case.parse(text))
        here, there = (expect(inputs, RoundingPlan(gate_up="io", act="io"), d) for d in (torch.device("cpu"), device))
        for name in ("out", "variance"):
            a, b = getattr(here, name), getattr(there, name).cpu()
            difference = float((a - b).abs().max() / a.abs().max())
            if difference > 1e-9:
                raise RuntimeError(
                    f"the float64 oracle on {device} differs from the CPU's by {difference:.1e} in {name}: {text}"
                )


def with_own_layer(drawn: Inputs) -> Inputs:
    """The same inputs with a copy of the backend's layer, which a scenario may write to."""
    return replace(drawn, backend_layer=_copied(drawn.backend_layer))


def _on_device(drawn: Inputs, device: torch.device) -> Inputs:
    """The same inputs on another device. Strides are kept: padding between rows is part of the question."""
    arguments = {name: fence.keep(t, device) for name, t in drawn.arguments().items()}
    return drawn.with_arguments(
        arguments, layer=_copied(drawn.layer, device), backend_layer=_copied(drawn.backend_layer, device)
    )


def _copied(layer: Layer, device: torch.device | None = None) -> Layer:
    """A fenced copy of a layer, on its device or another."""
    return Layer(layer.problem, **{name: fence.keep(t, device) for name, t in layer.tensors().items()})
