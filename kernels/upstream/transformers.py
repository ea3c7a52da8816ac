"""Backends "transformers-eager", "transformers-batched-mm", "transformers-grouped-mm": transformers 5's own experts.

transformers keeps stacked expert weights in one module per model family and computes them by one of several
interchangeable functions, chosen by `config._experts_implementation`. Here those modules run with the layer's tensors:

    silu, gelu, gelu_tanh            MixtralExperts           swigluoai      GptOssExperts (biases or zeros)
    the same with a clamp (limit)    DeepseekV4Experts        relu2          NemotronHExperts (ungated)

Layout: each module has one of its own and gets transposed views, not copies, where the layer has the other.
Invalid ids and experts of other ranks: the adapter maps ids to local experts and those that have none to the sentinel
`num_experts` with weight 0, which is what transformers' expert-parallel dispatch hands to the very same modules.
Nothing is kept between calls but the empty module: every call hangs the layer's current tensors into a copy of it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Callable

import torch
from torch import Tensor

from kernels.grouped import DTYPES, grouped_mm_refusal, row_stride_refusal

OLDEST = 5  # the first major version with stacked experts and interchangeable implementations
_import_lock = threading.Lock()


@dataclass(frozen=True)
class _Family:
    """A model family's experts module: where it is, its configuration, its parameters and their layout."""

    model: str
    experts: str
    configuration: str
    w13: str
    layout: str
    bias: bool = False


_MIXTRAL = _Family("mixtral", "MixtralExperts", "MixtralConfig", "gate_up_proj", "nk")
_CLAMPED = _Family("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config", "gate_up_proj", "nk")
_GPT_OSS = _Family("gpt_oss", "GptOssExperts", "GptOssConfig", "gate_up_proj", "kn", bias=True)
_UNGATED = _Family("nemotron_h", "NemotronHExperts", "NemotronHConfig", "up_proj", "nk")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "swigluoai": "silu", "relu2": "relu2"}


def _family(problem: Any) -> _Family:
    if problem.activation == "swigluoai":
        return _GPT_OSS
    if problem.activation == "relu2":
        return _UNGATED
    return _MIXTRAL if problem.limit is None else _CLAMPED


def import_transformers(module: str) -> Any:
    """`transformers.<module>`, imported with the hub-kernels integration off.

    The PyPI package `kernels` has the name of this project's folder. transformers looks for it by name, takes its
    version from the installed metadata, and then imports from `kernels`: it would find this folder and fail to import
    at all, USE_HUB_KERNELS=0 or not. "No hub kernels in this process" is the truth, so that is what its (cached) probe
    is made to find; nothing of transformers is replaced, and no hub kernel can replace what is to be tested.
    """
    with _import_lock:
        probe = importlib.import_module("transformers.utils.import_utils").is_kernels_available
        mine = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]  # the import system's own sign for "not importable"
        try:
            probe.cache_clear()  # somebody may have asked before
            probe()
        finally:
            if mine is None:
                del sys.modules["kernels"]
            else:
                sys.modules["kernels"] = mine
        return importlib.import_module(f"transformers.{module}")


class _Transformers:
    name: str
    implementation: str
    devices = {"cpu", "cuda", "xpu"}

    def available(self) -> str | None:
        """None, or why it cannot be used here: transformers is missing, or older than 5. Imports nothing."""
        try:
            version = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            return "the package transformers is not installed"
        if int(version.split(".")[0]) < OLDEST:
            return f"transformers {version}; experts with interchangeable implementations came with {OLDEST}.0"
        return None

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason"."""
        family = _family(problem)
        if problem.quant is not None:
            return "quant: these modules hold their weights in the dtype of hidden_states"
        if problem.dtype not in DTYPES:
            return f"dtype: {problem.dtype}; valid: {', '.join(DTYPES)}"
        if problem.activation not in _ACTIVATIONS:
            return f"activation: {problem.activation}; valid: {', '.join(_ACTIVATIONS)}"
        if family is _GPT_OSS and problem.dtype != "fp32":
            return f"activation: GptOssExperts rounds alpha*gate, its sigmoid, up+1 to {problem.dtype}; no plan says so"
        if problem.bias and not family.bias:
            return f"bias: {family.experts} has none; only swigluoai's GptOssExperts does"
        if problem.router_weight_on_input:
            return "router_weight_on_input: these modules weight their outputs"
        if problem.shared_experts:
            return "shared_experts: a module of their own in transformers"
        import_transformers("utils.import_utils")
        if find_spec(f"transformers.models.{family.model}") is None:
            return f"activation: limit={problem.limit} needs {family.experts}, which this transformers does not have"
        return None

    def plans(self, problem: Any) -> list[dict]:
        """One plan, read off the module's code: products stored in io, act(gate) rounded before it meets up."""
        return [
            {
                "gate_up": "io", "act_chain": problem.activation != "relu2", "act": "io", "slot": "io",
                "weight": "after_store", "router_weight": "fp32", "combine": "fp32", "quantizes_activations": False,
            }
        ]  # fmt: skip

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k], topk_ids [T, k], out=None) -> [T, K] io."""
        skeleton: tuple[tuple, Any] = ((), None)

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            nonlocal skeleton
            problem = layer.problem
            family, experts = _family(problem), layer.w13.shape[0]
            key = (
                family, experts, problem.hidden_size, problem.intermediate_size, problem.activation, problem.limit
            )  # fmt: skip
            known, module = skeleton
            if known != key:
                module = _empty_module(family, problem, experts, self.implementation)
                skeleton = key, module
            module = _with_weights(module, family, layer)
            sentinel = layer.expert_map is not None or problem.invalid_ids
            module._is_expert_parallel = sentinel
            ids = topk_ids.long()
            if sentinel:
                ids, topk_weights = _dispatch(ids, topk_weights, problem.num_experts, layer.expert_map, experts)
            with torch.no_grad():
                result = module(hidden_states, ids, topk_weights)
            return result if out is None else out.copy_(result)

        return call


class Eager(_Transformers):
    """The loop over experts in each module's own forward: index_add_ into a buffer in io, expert by expert."""

    name = "transformers-eager"
    implementation = "eager"

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason"."""
        # one_hot without a class for the sentinel (GptOss); the sentinel's class run as an expert (NemotronH).
        if _family(problem) in (_GPT_OSS, _UNGATED) and (problem.invalid_ids or problem.ep is not None):
            keyword = "invalid_ids" if problem.invalid_ids else "expert_map"
            return f"{keyword}: the loop of {_family(problem).experts} fails on the sentinel of slots not served here"
        return super().supports(problem)

    def plans(self, problem: Any) -> list[dict]:
        """As the others, but the weighted slot is rounded to io and summed in io; not so for relu2, whose module sums
        in the dtype of topk_weights: float32."""
        (plan,) = super().plans(problem)
        return [plan if problem.activation == "relu2" else {**plan, "weight": "rounded", "combine": "io"}]


class BatchedMM(_Transformers):
    """One bmm over all (token, slot) pairs, each with a gathered copy of its expert's weights."""

    name = "transformers-batched-mm"
    implementation = "batched_mm"


class GroupedMM(_Transformers):
    """Pairs sorted by expert and torch's grouped_mm."""

    name = "transformers-grouped-mm"
    implementation = "grouped_mm"

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason"; with a device type the dtype is tried on it."""
        refusal = super().supports(problem) or row_stride_refusal(problem)
        if refusal is None and device is not None:
            reason = grouped_mm_refusal(torch.device(device).type, DTYPES[problem.dtype])
            refusal = reason and f"dtype: {reason}"
        return refusal


def _empty_module(family: _Family, problem: Any, experts: int, implementation: str) -> Any:
    """The family's experts module without weights (on the meta device)."""
    act, inner = _ACTIVATIONS[problem.activation], problem.intermediate_size
    limit = 7.0 if problem.limit is None and problem.activation == "swigluoai" else problem.limit
    configurations = import_transformers(f"models.{family.model}.configuration_{family.model}")
    models = import_transformers(f"models.{family.model}.modeling_{family.model}")
    configuration = getattr(configurations, family.configuration)(hidden_size=problem.hidden_size)
    # Assigned, not passed: the families validate what they are given against a whole model that is not built here.
    for name, value in (
        ("num_local_experts", experts), ("n_routed_experts", experts), ("intermediate_size", inner),
        ("moe_intermediate_size", inner), ("hidden_act", act), ("mlp_hidden_act", act), ("swiglu_limit", limit),
        ("_experts_implementation", implementation),
    ):  # fmt: skip
        setattr(configuration, name, value)
    with torch.device("meta"):
        module = getattr(models, family.experts)(configuration).eval()
    want = _own_layout(family, layout="nk", tensor=torch.empty(experts, 1, problem.hidden_size, device="meta")).shape
    have = getattr(module, family.w13).shape
    if have[0] != want[0] or problem.hidden_size not in have:
        raise RuntimeError(f"{family.experts}.{family.w13} is {list(have)}: this transformers is not the one adapted to")
    return module


def _own_layout(family: _Family, layout: str, tensor: Tensor) -> Tensor:
    return tensor if family.layout == layout else tensor.transpose(1, 2)


def _with_weights(empty: Any, family: _Family, layer: Any) -> Any:
    """A copy of the module with the layer's tensors as parameters: threads do not share it, and weights die with it."""
    layout, dtype = layer.problem.layout, layer.w13.dtype
    tensors = {
        family.w13: _own_layout(family, layout, layer.w13),
        "down_proj": _own_layout(family, layout, layer.w2),
    }
    if family.bias:
        for name, bias, weight in ((family.w13, layer.w13_bias, "w13"), ("down_proj", layer.w2_bias, "w2")):
            if bias is None:  # x + 0 is exact
                bias = torch.zeros(tensors[name].shape[0], tensors[name].shape[2], dtype=dtype, device=layer.w13.device)
            tensors[f"{name}_bias"] = bias
    missing = set(empty._parameters) ^ set(tensors)
    if missing:
        raise RuntimeError(f"{family.experts} has parameters {sorted(empty._parameters)}, this adapter {sorted(tensors)}")
    module = copy.copy(empty)
    module._parameters = {n: torch.nn.Parameter(t.detach(), requires_grad=False) for n, t in tensors.items()}
    return module


def _dispatch(
    ids: Tensor, weights: Tensor, num_experts: int, expert_map: Tensor | None, experts: int
) -> tuple[Tensor, Tensor]:
    """Local expert ids, `experts` where none serves the slot, and weights that are 0 there."""
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map is not None:
        ids = expert_map.long()[ids.clamp(0, num_experts - 1)]
        valid &= ids >= 0
    return torch.where(valid, ids, experts), torch.where(valid, weights, 0)
