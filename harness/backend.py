"""Backends: what a kernel author writes, where they are found, and what they may answer.

A backend is any object (or class without constructor arguments) with

    name        str
    devices     the devices it runs on, a set of "cpu", "cuda", "xpu"
    prepare(problem, layer)   returns call(hidden_states, topk_weights, topk_ids, out=None) -> Tensor [T, K]

and, if it wants,

    available()           None, or one line: why it cannot be used here (a package is missing)
    supports(problem)     None, or "<keyword>: reason" with a keyword of UNSUPPORTED
    declares(problem)     what the adapted package says of itself: None, or its reason (moe-harness capabilities)
    plans(problem)        its rounding plans, a list of dicts (reference/plan.py); undeclared: usual ones are tried
    interpreted           True for Triton kernels: on the CPU they need Triton's interpreter
    deterministic         False: repeated calls may differ in bits
    batch_invariant       True: a token's row has the same bits in every batch; "configured": under any one of its
                          configurations
    configurations(problem)      tile configurations, a dict from names to keyword options of prepare(): all are checked
    nan_safe              False: what nobody asks for is multiplied by zero, so that NaN there reaches the output;
                          never asked of it
    stages(call, hidden_states, topk_weights, topk_ids)   one call of what prepare() returned, as a dict of the values
                          between its stages (diagnose/localise.py): a failure then says which stage is wrong
    expected_launches(problem)   (required, forbidden): sets of substrings of kernel names, checked against the trace
    route(logits, top_k, method, **options)   the router: (topk_weights, topk_ids), asked by scenarios/router.py
    align(topk_ids, block_size, num_experts, **options)   pairs sorted by expert, asked by scenarios/alignment.py

No import from here is needed. prepare() gets the layer's tensors on the device (`Layer`): it may keep the layer, not
the tensors, because scenarios replace them between calls.
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
from harness.device import Device
from harness.problem.case import Problem

#: The only reasons for not running; every skip begins with one of these words.
UNSUPPORTED = (
    "dtype", "quant", "activation", "bias", "expert_map", "invalid_ids", "router_weight_on_input", "layout", "shape",
    "shared_experts", "scenario", "fill", "device", "package", "memory",
)  # fmt: skip

#: What a backend may promise besides the right output.
PROMISES = {
    "errors": "bad arguments raise an error that names them, and nothing is written",
    "no_extra_tensor": "router weight on input allocates nothing more than router weight on output",
    "steady_scratch": "with a scratch object, permuting allocates nothing",
    "best_first": "route() gives a token's experts best first, and of equal ones the smaller id",
    "small_sigmoids": "route() computes sigmoids to float32's relative precision, however small they are",
    "ascending": "align() keeps an expert's pairs in ascending order, and writes all of what it returns",
    "no_wait": "a steady call reads nothing back from the device, and never waits for it",
    "graph": "a call can be captured in a graph, and replayed after inputs and weights changed in place",
    "one_build": "however many threads race the first call, one instance is built (call.instance.builds == 1)",
}

BUILTIN = (
    "kernels.triton.backend:TritonMoE",
    "kernels.triton.backend:TritonAlignedMoE",
    "kernels.triton.backend:TritonChunkedMoE",
    "kernels.triton.backend:TritonPermuteMoE",
    "kernels.cached:TritonCachedMoE",
    "kernels.grouped:GroupedMM",
    "kernels.upstream.transformers:Eager",
    "kernels.upstream.transformers:BatchedMM",
    "kernels.upstream.transformers:GroupedMM",
    "kernels.upstream.vllm_cpu:FusedMoE",
    "kernels.upstream.vllm_cpu:FusedExpertsCpu",
    "kernels.upstream.ipex:FusedExperts",
    "kernels.upstream.ipex:GatedMLP",
    "kernels.upstream.vllm_xpu:VllmXpu",
    "kernels.upstream.vllm_xpu_experts:VllmXpuExperts",
    "kernels.upstream.vllm_triton:VllmTriton",
    "kernels.upstream.vllm_triton:VllmTritonModular",
    "kernels.upstream.vllm_interpreted:VllmTritonInterpreted",
    "kernels.upstream.vllm_permute:VllmPermute",
    "kernels.upstream.triton_kernels:TritonKernels",
    "kernels.upstream.triton_kernels:TritonKernelsSorted",
    "kernels.upstream.triton_kernels:TritonKernelsInvariant",
    "kernels.upstream.sglang_triton:SglangTriton",
    "kernels.upstream.sglang_xpu:SglangXpu",
)
ENTRY_POINTS = "moe_harness.backends"


class BackendError(Exception):
    """A backend that cannot be found, or breaks the protocol; the message says how to mend it."""


class Unsupported(Exception):
    """The case does not apply; the message is "<keyword>: reason" with a keyword of backend.UNSUPPORTED."""


@dataclass
class Layer:
    """What a serving engine's MoE module holds. Scenarios assign to its fields between calls.

    layout "nk": w13 [E, 2I, K] (gate rows, then up rows; interleaved for swigluoai; relu2: [E, I, K]), w2 [E, K, I];
    layout "kn": w13 [E, K, 2I] and w2 [E, I, K], with block scales transposed likewise. E counts local experts.
    Scales are float32: weights [E], [E, N] or [E, ceil(N/128), ceil(K/128)]; static activation scales [1].
    Biases [E, 2I] and [E, K] in the dtype of hidden_states. expert_map int32 [num_experts] -> local expert or -1.
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
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def load(spec: str) -> Any:
    """The backend that "package.module:object" names, or that is registered under a plain name."""
    if ":" not in spec:
        known = {b.name: b for b in installed()}
        if spec not in known:
            raise BackendError(
                f"--backend {spec}: no such backend; known: {', '.join(known)}, or package.module:object"
            )
        return known[spec]
    module, _, attribute = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise BackendError(f"--backend {spec}: module {module} has no {attribute!r}") from error
    except Exception as error:  # whatever somebody else's module raises: it is named, and is the cause
        hint = "; run from where it can be imported" if getattr(error, "name", "") == module else ""
        raise BackendError(
            f"--backend {spec}: cannot import {module}: {type(error).__name__}: {error}{hint}"
        ) from error
    backend: Any = found() if inspect.isclass(found) else found
    for name, kind in (("name", "a string"), ("devices", "a set of device names"), ("prepare", "a method")):
        if not hasattr(backend, name):
            raise BackendError(f"--backend {spec}: it has no attribute {name!r} ({kind}); see docs/your-kernel.md")
    strange = set(backend.devices) - set(devices.DEVICES)
    if strange:
        raise BackendError(f"--backend {spec}: devices={strange}; valid: {', '.join(devices.DEVICES)}")
    return backend


_installed: list[Any] = []


def installed() -> list[Any]:
    """The built-in backends and those that installed packages declare under the entry point group."""
    if not _installed:
        declared = [e.value for e in importlib.metadata.entry_points(group=ENTRY_POINTS)]
        _installed.extend(load(spec) for spec in (*BUILTIN, *declared))
    return list(_installed)


def unavailable(backend: Any, device: Device) -> str | None:
    """None, or the one reason why this backend cannot run on this device here: "<keyword>: text"."""
    if device.name not in backend.devices:
        return f"device: {backend.name} declares {', '.join(sorted(backend.devices))}"
    if getattr(backend, "interpreted", False):
        if device.interprets_triton and not devices.interpreting():
            return "device: Triton is compiled in this process; its interpreter needs one without a GPU (-m cpu)"
        if device.interprets_triton:
            from harness.trace import interpreter

            if reason := interpreter.usable():
                return f"package: {reason}"
    reason = backend.available() if hasattr(backend, "available") else None
    return f"package: {reason}" if reason else None


def unsupported(backend: Any, problem: Problem, device: Device) -> str | None:
    """None, or the backend's declared reason, checked to begin with a keyword of UNSUPPORTED."""
    if not hasattr(backend, "supports"):
        return None
    takes_device = "device" in inspect.signature(backend.supports).parameters
    reason = backend.supports(problem, device=device.name) if takes_device else backend.supports(problem)
    if reason is not None and reason.partition(":")[0] not in UNSUPPORTED:
        raise BackendError(
            f"{backend.name}.supports() answered {reason!r}; a reason begins with one of: {', '.join(UNSUPPORTED)}"
        )
    return reason


def select(specs: Iterable[str]) -> list[Any]:
    """The backends that --backend named, or all that are installed."""
    wanted = list(specs)
    return [load(spec) for spec in wanted] if wanted else installed()


def takes_out(call: Callable[..., Any]) -> bool:
    """Whether a prepared call can be given the memory for its output."""
    parameters = inspect.signature(call).parameters.values()
    return any(p.name == "out" or p.kind is p.VAR_KEYWORD for p in parameters)
