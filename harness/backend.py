"""Backends: the layer that they get, the registry that finds them, and the checks of what they declare.

A backend is any object (or a class without constructor arguments) with attributes of `Backend` (harness/protocol.py);
three are required. Its author imports nothing from here. docs/your-kernel.md has the table of the attributes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from harness import device as devices
from harness.base.errors import UserError
from harness.base.trial import how_it_ends
from harness.device import Device
from harness.problem.case import Problem
from harness.protocol import FOLLOWS, PROMISES, UNSUPPORTED, Backend, protocol_table, rules

__all__ = [
    "BUILTIN", "ENTRY_POINTS", "FOLLOWS", "PROMISES", "UNSUPPORTED", "Backend", "BackendError", "Layer", "Unsupported",
    "as_backend", "forget", "installed", "load", "protocol_table", "select", "takes_out", "unavailable", "unsupported",
]  # fmt: skip

#: {name: where it is} of those of kernels/; no other backend may have one of these names.
BUILTIN = {
    "triton": "kernels.triton.backend:TritonMoE",
    "triton-aligned": "kernels.triton.backend:TritonAlignedMoE",
    "triton-chunked": "kernels.triton.backend:TritonChunkedMoE",
    "triton-permute": "kernels.triton.backend:TritonPermuteMoE",
    "triton-cached": "kernels.cached:TritonCachedMoE",
    "torch-grouped-mm": "kernels.grouped:GroupedMM",
    "transformers-eager": "kernels.upstream.transformers:Eager",
    "transformers-batched-mm": "kernels.upstream.transformers:BatchedMM",
    "transformers-grouped-mm": "kernels.upstream.transformers:GroupedMM",
    "vllm-cpu": "kernels.upstream.vllm_cpu:FusedMoE",
    "vllm-cpu-sgl": "kernels.upstream.vllm_cpu:FusedExpertsCpu",
    "ipex": "kernels.upstream.ipex:FusedExperts",
    "ipex-gated-mlp": "kernels.upstream.ipex:GatedMLP",
    "vllm-xpu": "kernels.upstream.vllm_xpu:VllmXpu",
    "vllm-xpu-experts": "kernels.upstream.vllm_xpu_experts:VllmXpuExperts",
    "vllm-triton": "kernels.upstream.vllm_triton:VllmTriton",
    "vllm-triton-modular": "kernels.upstream.vllm_triton:VllmTritonModular",
    "vllm-triton-interpreted": "kernels.upstream.vllm_interpreted:VllmTritonInterpreted",
    "vllm-permute": "kernels.upstream.vllm_permute:VllmPermute",
    "triton-kernels": "kernels.upstream.triton_kernels:TritonKernels",
    "triton-kernels-sorted": "kernels.upstream.triton_kernels:TritonKernelsSorted",
    "triton-kernels-invariant": "kernels.upstream.triton_kernels:TritonKernelsInvariant",
    "sglang-triton": "kernels.upstream.sglang_triton:SglangTriton",
    "sglang-xpu": "kernels.upstream.sglang_xpu:SglangXpu",
}
ENTRY_POINTS = "moe_harness.backends"


class BackendError(UserError):
    """A backend that cannot be found or breaks the protocol. The message says how to mend it."""


class Unsupported(Exception):
    """The case does not apply; the message is "<keyword>: reason" with a keyword of UNSUPPORTED."""


@dataclass
class Layer:
    """The tensors that a serving engine's MoE module holds. Scenarios assign to its fields between calls.

    layout "nk": w13 [E, 2I, K] (gate rows, then up rows; interleaved for swigluoai; relu2: [E, I, K]), w2 [E, K, I];
    layout "kn": w13 [E, K, 2I] and w2 [E, I, K], with block scales transposed likewise. E counts local experts.
    Scales are float32: weights [E], [E, N] or [E, ceil(N/128), ceil(K/128)]; static activation scales [1].
    Biases [E, 2I] and [E, K] have the dtype of hidden_states. expert_map int32 [num_experts] -> local expert or -1.
    """

    problem: Problem
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    a13_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that hold tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def as_backend(candidate: Any, source: str = "") -> Backend:
    """The candidate as a `Backend`; itself if it is one. BackendError, which begins with `source`, if it breaks the
    protocol."""
    if isinstance(candidate, Backend):
        return candidate
    source = source or f"backend {type(candidate).__name__}"
    values: dict[str, Any] = {}
    for name, rule in rules():
        value = getattr(candidate, name, None)
        if value is None and rule.required:
            raise BackendError(f"{source}: it has no attribute {name!r} ({rule.valid}); see docs/your-kernel.md")
        if value is None:
            continue
        if not rule.accepts(value):
            raise BackendError(f"{source}: {name}={value!r}; valid: {rule.valid}")
        values[name] = frozenset(value) if rule.is_set else value
    return Backend(candidate, **values)


# -- the registry -----------------------------------------------------------------------------------------------------
def load(spec: str) -> Backend:
    """The backend that "package.module:object" names, or that is registered under a plain name.

    BackendError if there is none, its module cannot be imported, or the object breaks the protocol.
    """
    if ":" not in spec:
        known = {b.name: b for b in installed()}
        if spec not in known:
            raise BackendError(
                f"--backend {spec}: no such backend; known: {', '.join(known)}, or package.module:object"
            )
        return known[spec]
    _try(spec)
    return _import(spec)


def _try(spec: str) -> None:
    """Load a backend in a copy of this process first. BackendError if that ends the copy, or never returns.

    Not where there is a GPU: its driver does not survive the fork, and a module may use it when it is imported.
    """
    if spec in _tried or devices.present() != ("cpu",):
        return

    def load_and_ask() -> None:
        backend = _import(spec)
        if backend.available:
            backend.available()

    if ending := how_it_ends(load_and_ask, LOADING):
        raise BackendError(f"--backend {spec}: loading it {ending}")
    _tried.add(spec)


def _import(spec: str) -> Backend:
    module, _, attribute = spec.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise BackendError(f"--backend {spec}: module {module} has no {attribute!r}") from error
    except Exception as error:  # another package's module may raise anything: the message names it
        hint = "; run from where it can be imported" if getattr(error, "name", "") == module else ""
        raise BackendError(
            f"--backend {spec}: cannot import {module}: {type(error).__name__}: {error}{hint}"
        ) from error
    return as_backend(loaded() if inspect.isclass(loaded) else loaded, f"--backend {spec}")


_installed: list[Backend] = []
_tried: set[str] = set()  #: specs whose backends a copy of this process has loaded
LOADING = 300.0  #: seconds for the import of a backend's module


def installed() -> list[Backend]:
    """The built-in backends and those that installed packages declare under the entry point group; loaded once."""
    if not _installed:
        declared = [e.value for e in importlib.metadata.entry_points(group=ENTRY_POINTS)]
        _installed.extend(_import(spec) for spec in (*BUILTIN.values(), *declared))
    return list(_installed)


def forget() -> None:
    """Load the installed backends again when they are next needed: their modules have changed."""
    _installed.clear()


def select(specs: Iterable[str]) -> list[Backend]:
    """The backends that --backend names, or all installed ones."""
    wanted = list(specs)
    return [load(spec) for spec in wanted] if wanted else installed()


# -- what a backend declares ------------------------------------------------------------------------------------------
def unavailable(backend: Any, device: Device) -> str | None:
    """None, or the one reason why this backend cannot run on this device here: "<keyword>: text"."""
    backend = as_backend(backend)
    if device.name not in backend.devices:
        return f"device: {backend.name} declares {', '.join(sorted(backend.devices))}"
    if backend.interpreted and device.interprets_triton:
        if not devices.interpreting():
            return "device: Triton is compiled in this process; its interpreter needs one without a GPU (-m cpu)"
        from harness.trace import interpreter  # only now: it imports ml_dtypes

        if reason := interpreter.usable():
            return f"package: {reason}"
    reason = backend.available() if backend.available else None
    return f"package: {reason}" if reason else None


def unsupported(backend: Any, problem: Problem, device: Device) -> str | None:
    """None, or the backend's declared reason. BackendError if that does not begin with a keyword of UNSUPPORTED."""
    backend = as_backend(backend)
    if backend.supports is None:
        return None
    takes_device = "device" in inspect.signature(backend.supports).parameters
    reason = backend.supports(problem, device=device.name) if takes_device else backend.supports(problem)
    if reason is not None and reason.partition(":")[0] not in UNSUPPORTED:
        raise BackendError(
            f"{backend.name}.supports() answered {reason!r}; a reason begins with one of: {', '.join(UNSUPPORTED)}"
        )
    return reason


def takes_out(call: Callable[..., Any]) -> bool:
    """Whether a prepared call takes `out`, the memory for its output."""
    parameters = inspect.signature(call).parameters.values()
    return any(p.name == "out" or p.kind is p.VAR_KEYWORD for p in parameters)
