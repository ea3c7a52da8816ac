"""The cached instance that a serving engine keeps per layer, and how it stays right when the weights change.

Engines cut host overhead by building the kernel's arguments once and calling `apply` from then on (vLLM's XpuFusedMoe).
The instance then outlives the weights that it was built for: they are reloaded, swapped, offloaded, resized. Three
rules make that safe here:

1.  The instance keeps no tensor and nothing derived from one. It builds the checks and the arguments that follow from
    the configuration. Each call reads the weights from the layer, so it sees writes in place (`copy_`, `.data.copy_`,
    under inference mode, at an unchanged address), and replaced weights are freed at once.
2.  Every call compares the layer's tensors and configuration with those the arguments were built for (object, address,
    shape, stride, dtype, device) and builds again if one differs.
3.  Every call works on a snapshot: aliases that keep the old storage alive until the kernel is launched, even if the
    layer's attributes or their `.data` are rebound meanwhile. See `swap` for writers in other threads.

Cost, measured on a shared EPYC core without the launch (tests/kernels/test_cached.py prints it): the check and the
snapshot take 6 us a call for bf16 (2 tensors) and 12 us for fp8 with biases and expert_map (7 tensors); with the checks
of the call's own arguments 16 and 20 us.
A captured graph replays without this check: capture it again after a swap.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kernels.checks import require_device, require_dtype, require_one_of, require_shape
from kernels.layer import ALPHA, DTYPES, FP8, Fp8Scheme, effective_limit, make_layer, require_out, require_tokens

TENSORS = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias", "expert_map")
CONFIGURATION = (
    "dtype", "hidden_size", "intermediate_size", "num_experts", "top_k", "activation", "limit", "bias",
    "router_weight_on_input", "layout",
)  # fmt: skip


@dataclass(frozen=True)
class _Built:
    """Launch arguments without tensors, and the marks of the layer that they were built for."""

    configuration: tuple
    marks: tuple
    arguments: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    top_k: int
    weight_on_input: bool


class CachedFusedMoE:
    """A fused MoE layer with the interface of XpuFusedMoe: construct it once, then call `apply(output, ...)`.

    layer: an object with `problem` and the tensors of TENSORS (None where absent); it is kept, its tensors are not.
    Layouts "kn" (w13 [E, K, 2I], w2 [E, I, K]) and "nk"; bf16, fp16, fp32 weights or fp8 ones with scales. Always
    W8A16: activations are never quantized, whatever problem.quant.activation says; a13_scale and a2_scale are not read.
    launch: the function that computes; kernels.triton.fused_moe.fused_moe is the default, and has its signature.
    `builds` counts how often arguments were built.
    """

    def __init__(self, layer: Any, launch: Callable[..., Any] | None = None) -> None:
        self.layer = layer
        self.builds = 0
        self._launch = launch
        self._built: _Built | None = None
        self._lock = threading.RLock()

    def apply(self, output: Tensor, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        """Write the layer's result for hidden_states [T, K] io into output [T, K] io.

        topk_weights [T, k] float32 and topk_ids [T, k] int32 or int64 hold the router's choice of global experts.
        TypeError or ValueError, before output is written, if the layer's tensors do not fit its problem, or the
        arguments do not fit the layer.
        """
        built, tensors = self.current()
        _check_call(built, output, hidden_states, topk_weights, topk_ids)
        if len(hidden_states) == 0:
            return
        w13, w2, w13_scale, w2_scale, w13_bias, w2_bias, expert_map = tensors
        assert self._launch is not None
        self._launch(
            hidden_states, w13, w2, topk_weights, topk_ids, w13_scale=w13_scale, w2_scale=w2_scale, w13_bias=w13_bias,
            w2_bias=w2_bias, expert_map=expert_map, out=output, **built.arguments,
        )  # fmt: skip

    @contextmanager
    def swap(self) -> Iterator[None]:
        """`with instance.swap(): layer.w13 = ...; layer.w2 = ...`: other threads' calls see all of it or nothing.

        Without it a call notices only a layer that changes while the call reads it. A half-finished write by another
        thread cannot be detected, so writers in other threads must use it. The writer orders writes in place into
        tensors that a running kernel reads, as on any device stream.
        """
        with self._lock:
            yield

    def current(self) -> tuple[_Built, list[Tensor | None]]:
        """The built arguments, valid for the snapshot that comes with them: one alias per name of TENSORS."""
        # One lock for reading, checking and building: however many threads race the first call, one builds and the
        # others find it built.
        with self._lock:
            problem, held, snapshot = _read(self.layer)
            configuration, built = _configuration(problem), self._built
            if built is None or built.configuration != configuration or not _same(built.marks, held, snapshot):
                built = self._built = self._build(problem, configuration, held, snapshot)
            return built, snapshot

    def _build(self, problem: Any, configuration: tuple, held: list, snapshot: list) -> _Built:
        tensors = dict(zip(TENSORS, snapshot))
        fp8 = None if problem.quant is None else Fp8Scheme(problem.quant.weight)
        limit = effective_limit(problem.activation, problem.limit)
        arguments = dict(
            activation=problem.activation, limit=limit, alpha=ALPHA, fp8=fp8, a13_scale=None, a2_scale=None,
            num_experts=problem.num_experts, apply_router_weight_on_input=problem.router_weight_on_input,
            layout=problem.layout,
        )  # fmt: skip
        _check_layer(problem, tensors, arguments)
        if self._launch is None:
            from kernels.triton.fused_moe import fused_moe

            self._launch = fused_moe
        marks = tuple(None if h is None else (weakref.ref(h), *_mark(s)) for h, s in zip(held, snapshot))
        self.builds += 1
        return _Built(
            configuration, marks, arguments, tensors["w13"].device, DTYPES[problem.dtype], problem.hidden_size,
            problem.top_k, problem.router_weight_on_input,
        )  # fmt: skip


def _read(layer: Any) -> tuple[Any, list, list]:
    """(problem, tensors, aliases of them). Reads again if the layer changed during the read."""
    while True:
        problem = layer.problem
        held = [getattr(layer, name) for name in TENSORS]
        # detach: an alias with its own pointer to the storage. Rebinding `.data` of the original leaves it alone.
        snapshot: list[Any] = [None if t is None else t.detach() for t in held]
        if layer.problem is problem and all(
            getattr(layer, name) is t and (t is None or t.data_ptr() == s.data_ptr())
            for name, t, s in zip(TENSORS, held, snapshot)
        ):
            return problem, held, snapshot


def _configuration(problem: Any) -> tuple:
    # By value: a problem may be replaced by an equal one, or changed in place.
    quant = problem.quant
    scheme = None if quant is None else (quant.weight_format, quant.weight)
    return (scheme, problem.ep is None, *[getattr(problem, name) for name in CONFIGURATION])


def _mark(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _same(marks: tuple, held: list, snapshot: list) -> bool:
    for mark, original, alias in zip(marks, held, snapshot):
        if mark is None or original is None:
            if mark is not original:
                return False
        # The weak reference tells a new tensor from an old one that was freed and whose id and address it got.
        elif mark[0]() is not original or mark[1:] != _mark(alias):
            return False
    return True


def _check_layer(problem: Any, tensors: dict[str, Any], arguments: dict[str, Any]) -> None:
    """TypeError or ValueError, naming field, value and what is valid, unless the tensors are those of the problem and
    fit the launch's arguments."""
    require_one_of("problem.dtype", problem.dtype, tuple(DTYPES))
    stored = DTYPES[problem.dtype]
    if problem.quant is not None:
        require_one_of("problem.quant.weight_format", problem.quant.weight_format, tuple(FP8))
        stored = FP8[problem.quant.weight_format]
    for name in ("w13", "w2"):
        require_dtype(name, tensors[name], stored)
    for name in ("w13_bias", "w2_bias"):
        if (tensors[name] is not None) != bool(problem.bias):
            state = "missing" if tensors[name] is None else "given"
            raise ValueError(f"{name}: {state} with problem.bias={problem.bias}; valid: both biases or neither")
    # Stands for any batch: none is there yet.
    batch = tensors["w13"].new_empty(0, problem.hidden_size, dtype=DTYPES[problem.dtype])
    layer = make_layer(batch, **tensors, **arguments)
    if layer.w2.w.shape[2] != problem.intermediate_size:
        raise ValueError(
            f"w2: intermediate size {layer.w2.w.shape[2]}; valid: {problem.intermediate_size}, the problem's"
        )


def _check_call(built: _Built, output: Tensor, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
    require_tokens(hidden_states, topk_weights, topk_ids, built.weight_on_input, None)
    require_out("output", output, hidden_states)
    require_dtype("hidden_states", hidden_states, built.dtype)
    require_device("hidden_states", hidden_states, built.device)
    tokens, hidden = hidden_states.shape
    if hidden != built.hidden_size:
        raise ValueError(f"Hidden size mismatch: hidden_states {(tokens, hidden)}; valid: [T, {built.hidden_size}]")
    require_shape("topk_ids", topk_ids, (tokens, built.top_k), "[T, top_k]")


class TritonCachedMoE:
    """Backend "triton-cached": the Triton kernels behind a cached instance, with XpuFusedMoe's layout and W8A16."""

    name = "triton-cached"
    devices = {"cpu", "cuda", "xpu"}
    interpreted = True  # on the CPU only through Triton's interpreter
    promises = {"errors", "no_extra_tensor", "one_build", "no_wait", "graph"}
    xpu_contract = True  # what an XPU engine keeps: run, emulated, where there is no XPU

    def available(self) -> str | None:
        """None, or why it cannot be used here."""
        return None if find_spec("triton") else "the package triton is not installed"

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if problem.layout != "kn":
            return f"layout: {problem.layout}; the cached instance has kn ([E, K, 2I], [E, I, K]) only, as XpuFusedMoe"
        if problem.shared_experts:
            return "shared_experts: the instance has routed experts only, as XpuFusedMoe"
        return None

    def plans(self, problem: Any) -> list[dict]:
        """The plans of the uncached layer, W8A16."""
        from kernels.triton.backend import TritonMoE

        return [{**plan, "quantizes_activations": False} for plan in TritonMoE().plans(problem)]

    def expected_launches(self, problem: Any) -> tuple[set[str], set[str]]:
        """(required, forbidden) parts of kernel names: those of the uncached layer, and never a quantizer."""
        from kernels.triton.backend import TritonMoE

        required, forbidden = TritonMoE().expected_launches(problem)
        return required - {"quantize"}, forbidden | {"quantize"}

    def stages(self, call: Callable, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> dict:
        """One call with every value between its stages: see kernels.triton.stages."""
        from kernels.triton.stages import record

        return record(call, hidden_states, topk_weights, topk_ids)

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states, topk_weights, topk_ids, out=None) -> out, with the cached instance as `call.instance`."""
        instance = CachedFusedMoE(layer)

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            if out is None:
                out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
            instance.apply(out, hidden_states, topk_weights, topk_ids)
            return out

        call.instance = instance  # type: ignore[attr-defined]
        return call
