"""vLLM's Python for the adapters to it: imported without side effects, and a problem in vLLM's own words."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

from kernels.layer import DTYPES, FP8

MOE = "vllm.model_executor.layers.fused_moe"
_WEIGHT_KEYS = {"tensor": "kFp8StaticTensorSym", "channel": "kFp8StaticChannelSym", "block": "kFp8Static128BlockSym"}
_ACTIVATION_KEYS = {
    "tensor_static": "kFp8StaticTensorSym", "tensor": "kFp8DynamicTensorSym", "token": "kFp8DynamicTokenSym",
    "group": "kFp8Dynamic128Sym",
}  # fmt: skip
_lock = threading.RLock()


@contextmanager
def quietly() -> Iterator[None]:
    """Environment variables are afterwards what they were, and nothing is logged but, from then on, vLLM's errors."""
    before, disabled = dict(os.environ), logging.root.manager.disable
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@cache
def import_vllm() -> SimpleNamespace:
    """The modules that say what a layer is: config, kernel, keys, activations, platform. ImportError if that fails."""
    from kernels.upstream.transformers import import_transformers

    with _lock, quietly():
        import_transformers("utils.import_utils")  # vLLM imports it, and it must not take this project for a package
        return SimpleNamespace(
            config=importlib.import_module(f"{MOE}.config"),
            kernel=importlib.import_module(f"{MOE}.modular_kernel"),
            plain=importlib.import_module(f"{MOE}.oracle.unquantized"),
            fp8=importlib.import_module(f"{MOE}.oracle.fp8"),
            keys=importlib.import_module("vllm.model_executor.layers.quantization.utils.quant_utils"),
            activations=importlib.import_module(f"{MOE}.activation").MoEActivation,
            platforms=importlib.import_module("vllm.platforms"),
        )


def import_module(name: str) -> Any:
    """Another module of vLLM."""
    import_vllm()
    with _lock, quietly():
        return importlib.import_module(name)


def init_workspace(device: Any) -> None:
    """What vLLM's runners do before the first modular kernel is called."""
    workspace = import_module("vllm.v1.worker.workspace")
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(device)


def activation(problem: Any) -> Any:
    """The problem's MoEActivation."""
    return import_vllm().activations("relu2_no_mul" if problem.activation == "relu2" else problem.activation)


def quant_keys(problem: Any) -> tuple[Any, Any]:
    """(weight_key, activation_key): how vLLM names a scheme."""
    keys = import_vllm().keys
    if problem.quant is None:
        return None, None
    weight = replace(getattr(keys, _WEIGHT_KEYS[problem.quant.weight]), dtype=FP8[problem.quant.weight_format])
    given = problem.quant.activation
    return weight, given and getattr(keys, _ACTIVATION_KEYS[given])


def moe_config(problem: Any, device: str, around: AbstractContextManager | None = None) -> Any:
    """The problem's FusedMoEConfig; `around` is entered while it is made."""
    vllm = import_vllm()
    parallel = vllm.config.FusedMoEParallelConfig.make_no_parallel()
    if problem.ep is not None:
        parallel = replace(parallel, ep_size=problem.ep.size, ep_rank=problem.ep.rank, use_ep=True)
    with _lock, around or nullcontext():
        return vllm.config.FusedMoEConfig(
            num_experts=problem.num_experts, experts_per_token=problem.top_k, hidden_dim=problem.hidden_size,
            intermediate_size=problem.intermediate_size, num_local_experts=problem.local_experts,
            num_logical_experts=problem.num_experts, activation=activation(problem), device=device,
            routing_method=vllm.config.RoutingMethodType.Renormalize, moe_parallel_config=parallel,
            in_dtype=DTYPES[problem.dtype], has_bias=problem.bias, swiglu_limit=problem.limit,
        )  # fmt: skip


def declares(experts: type, problem: Any, device: str, around: AbstractContextManager | None = None) -> str | None:
    """None, or what is_supported_config, an experts class's own predicate, has against this problem."""
    standard = import_vllm().kernel.FusedMoEActivationFormat.Standard
    config = moe_config(problem, device, around)
    supported, reason = experts.is_supported_config(experts, config, *quant_keys(problem), standard)  # type: ignore
    return None if supported else f"{experts.__name__}: {reason}"


def modular_kernel(experts: type, backend: str, problem: Any, config: Any, layer: Any, scales: tuple) -> Any:
    """The FusedMoEKernel that vLLM makes once weights are loaded; `backend` is a name in the enums of its oracles."""
    vllm = import_vllm()
    if problem.quant is None:
        quant_config = vllm.config.biased_moe_quant_config(
            layer.w13_bias, layer.w2_bias, gemm1_clamp_limit=problem.limit
        )
        return vllm.plain.make_unquantized_moe_kernel(
            quant_config, config, getattr(vllm.plain.UnquantizedMoeBackend, backend), experts
        )
    chosen = getattr(vllm.fp8.Fp8MoeBackend, backend)
    quant_config = vllm.fp8.make_fp8_moe_quant_config(
        chosen, *scales, layer.a13_scale, layer.a2_scale, w1_bias=layer.w13_bias, w2_bias=layer.w2_bias,
        block_shape=[128, 128] if problem.quant.weight == "block" else None,
        per_act_token_quant=problem.quant.activation == "token", per_out_ch_quant=problem.quant.weight == "channel",
        swiglu_limit=problem.limit,
    )  # fmt: skip
    return vllm.fp8.make_fp8_moe_kernel(quant_config, config, experts, chosen)
