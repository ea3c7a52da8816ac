"""What the backends of a process share: drawn inputs and the answers of the oracle for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from harness.backend import Layer
from harness.device import Device
from harness.inputs.draw import Inputs, draw
from harness.inputs.sizes import weight_bytes
from harness.oracle.deviation import expect
from harness.problem.case import Case, Problem
from harness.trace import fence
from reference.plan import RoundingPlan

WHOLE = 256 * 2**20  #: bytes of weights from which a layer is drawn, and the oracle computed, on the GPU


_EXPECTED: dict[tuple, Any] = {}


def _remembered(key: tuple[Inputs, Any, torch.device], compute: Callable[[], Any]) -> Any:
    """The oracle's answer for these inputs: every backend of the process is asked the same."""
    inputs, how, place = key
    known = (inputs.case, inputs.variant, how, str(place))
    if known not in _EXPECTED:
        while len(_EXPECTED) >= 12:
            _EXPECTED.pop(next(iter(_EXPECTED)))
        _EXPECTED[known] = compute()
    return _EXPECTED[known]


def _place(problem: Problem, device: Device) -> torch.device:
    """Where the inputs are drawn and the oracle computes: the CPU, but for layers too large for it."""
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
            apart = float((a - b).abs().max() / a.abs().max())
            if apart > 1e-9:
                raise RuntimeError(
                    f"the float64 oracle on {device} differs from the CPU's by {apart:.1e} in {name}: {text}"
                )


@lru_cache(maxsize=2)
def _drawn(case: Case, place: torch.device, device: torch.device) -> Inputs:
    drawn = draw(case, place)
    return drawn if place == device else _moved(drawn, device)


def _moved(drawn: Inputs, device: torch.device) -> Inputs:
    """The same inputs on another device. Strides are kept: padding between rows is part of the question."""
    arguments = {name: fence.keep(t, device) for name, t in drawn.arguments().items()}
    return drawn.with_arguments(
        arguments, layer=_kept(drawn.layer, device), backend_layer=_kept(drawn.backend_layer, device)
    )


def _with_own_layer(drawn: Inputs) -> Inputs:
    return replace(drawn, backend_layer=_kept(drawn.backend_layer))


def _kept(layer: Layer, device: torch.device | None = None) -> Layer:
    """A fenced copy of a layer, on its device or another."""
    return Layer(layer.problem, **{name: fence.keep(t, device) for name, t in layer.tensors().items()})
