"""Backends "transformers-eager", "transformers-batched-mm", "transformers-grouped-mm": transformers 5's own experts.

transformers keeps stacked expert weights in one module per model family and computes them by one of several
interchangeable functions, chosen by `config._experts_implementation`. Here those modules run with the layer's tensors:

    silu, gelu, gelu_tanh            MixtralExperts           swigluoai      GptOssExperts (biases or zeros)
    the same with a clamp (limit)    DeepseekV4Experts        relu2          NemotronHExperts (ungated)

Layout: each module has one of its own and gets transposed views, not copies, where the layer has the other.
Invalid ids and experts of other ranks: the adapter maps ids to local experts and those that have none to the sentinel
`num_experts` with weight 0, which is what transformers' expert-parallel dispatch hands to the very same modules.
Nothing is kept between calls but the empty module: every call hangs the layer's current tensors into a copy of it.

These modules differ between versions of transformers: in some the loop asserts on the sentinel (on a GPU that ends the
process), in some a product runs over it, in some the limit is 7 whatever the configuration says. What a version does
is found by trying a tiny problem on the CPU, once, not by its number.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.grouped import activate, grouped_mm_refusal, local_experts, row_stride_refusal
from kernels.layer import ALPHA, DTYPES, effective_limit
from kernels.upstream.package import missing

OLDEST = (5,)  #: the first version with stacked experts and interchangeable implementations
MOST_GATHERED = 8 * 2**30  #: bytes of weights that batched_mm may gather
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
            probe.cache_clear()  # an earlier call may have filled the cache
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
        return missing("transformers", since=OLDEST)

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
        version = f"transformers {importlib.metadata.version('transformers')}"
        if find_spec(f"transformers.models.{family.model}") is None:
            return f"activation: {problem.activation}, limit={problem.limit} needs {family.experts}; {version} has none"
        where = f"{version}, {self.implementation}"

        def failure(sentinel: bool) -> str | None:
            return _failure(self.implementation, problem.activation, problem.limit, sentinel)

        # Plain Mixtral is not tried: there is no telling a problem that it cannot do from a fault of it.
        if family is not _MIXTRAL and (reason := failure(sentinel=False)):
            return f"activation: {problem.activation}, limit={problem.limit} in {where}: {family.experts}: {reason}"
        if (problem.invalid_ids or problem.ep is not None) and (reason := failure(sentinel=True)):
            keyword = "invalid_ids" if problem.invalid_ids else "expert_map"
            return f"{keyword}: {where}: {family.experts} fails on an id without expert: {reason}"
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
                ids = local_experts(ids, problem.num_experts, layer.expert_map, experts)
                topk_weights = topk_weights.masked_fill(ids >= experts, 0.0)
            with torch.no_grad():
                result = module(hidden_states, ids, topk_weights)
            return result if out is None else out.copy_(result)

        return call


class Eager(_Transformers):
    """The loop over experts in each module's own forward: index_add_ into a buffer in io, expert by expert."""

    name = "transformers-eager"
    implementation = "eager"

    def plans(self, problem: Any) -> list[dict]:
        """As the others, but the weighted slot is rounded to io and summed in io; not so for relu2, whose module sums
        in the dtype of topk_weights: float32."""
        (plan,) = super().plans(problem)
        return [plan if problem.activation == "relu2" else {**plan, "weight": "rounded", "combine": "io"}]


class BatchedMM(_Transformers):
    """One bmm over all (token, slot) pairs, each with a gathered copy of its expert's weights."""

    name = "transformers-batched-mm"
    implementation = "batched_mm"
    nan_safe = False  # an id without expert reads another expert's weights, times zero

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason"."""
        if refusal := super().supports(problem):
            return refusal
        rows = _w13_rows(problem) + problem.intermediate_size
        size = problem.tokens * problem.top_k * rows * problem.hidden_size * DTYPES[problem.dtype].itemsize
        return f"memory: gathers {size / 2**30:.0f} GiB of weights" if size > MOST_GATHERED else None


class GroupedMM(_Transformers):
    """Pairs sorted by expert and torch's grouped_mm."""

    name = "transformers-grouped-mm"
    implementation = "grouped_mm"
    nan_safe = False  # seen on an H200: NaN in a row without any valid id makes every token NaN

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason"; with a device type the dtype is tried on it."""
        refusal = super().supports(problem) or row_stride_refusal(problem)
        if refusal is None and device is not None:
            reason = grouped_mm_refusal(torch.device(device).type, DTYPES[problem.dtype])
            refusal = reason and f"dtype: {reason}"
        return refusal


class _Unwritten(TorchDispatchMode):
    """grouped_mm as it may be on any device: rows past offs[-1] hold anything, here NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.name() in ("aten::_grouped_mm", "aten::grouped_mm"):
            offs = kwargs["offs"] if "offs" in kwargs else args[2]
            result[int(offs[-1]) :] = torch.nan
        return result


@cache
def _failure(implementation: str, activation: str, limit: float | None, sentinel: bool) -> str | None:
    """What goes wrong in a tiny problem on the CPU, with an id that has no expert if `sentinel`, or None."""
    problem = SimpleNamespace(
        hidden_size=16, intermediate_size=16, num_experts=3, activation=activation, limit=limit, layout="nk",
        invalid_ids=sentinel,
    )  # fmt: skip
    rng = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cpu")

    reach = 3 * (effective_limit(activation, limit) or 1.0)  # a third of the gates and ups lies beyond the limit
    x, w13, w2 = normal(8, 16), normal(3, _w13_rows(problem), 16) * reach / 4, normal(3, 16, 16)
    ids = (torch.arange(8, device="cpu")[:, None] + torch.tensor([0, 1], device="cpu")) % 3
    weights = 1 + normal(8, 2).abs()
    if sentinel:
        ids[::2, 1] = -1
    a = activate(torch.einsum("tk,enk->ten", x, w13), activation, limit)
    slots = torch.einsum("tei,eki->tek", a, w2)[torch.arange(8, device="cpu")[:, None], ids.clamp(min=0)]
    want = (slots * weights.masked_fill(ids < 0, 0.0)[..., None]).sum(1)
    layer = SimpleNamespace(problem=problem, w13=w13, w2=w2, w13_bias=None, w2_bias=None, expert_map=None)
    backend = _Transformers()
    backend.implementation = implementation
    try:
        with _Unwritten():
            got = backend.prepare(problem, layer)(x, weights, ids)
    except Exception as error:  # a real call would raise it too, or die of it
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    wrong = ~torch.isclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())).all(1)
    return f"computes {int(wrong.sum())} of {len(wrong)} tokens wrong" if wrong.any() else None


def _w13_rows(problem: Any) -> int:
    return problem.intermediate_size * (1 if problem.activation == "relu2" else 2)


def _empty_module(family: _Family, problem: Any, experts: int, implementation: str) -> Any:
    """The family's experts module without weights (on the meta device)."""
    act, inner = _ACTIVATIONS[problem.activation], problem.intermediate_size
    limit = effective_limit(problem.activation, problem.limit)
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
    # Some versions have both as constants of the module, whatever the configuration says.
    for name, value in (("limit", limit), ("alpha", ALPHA)):
        if hasattr(module, name):
            setattr(module, name, value)
    want = _own_layout(family, layout="nk", tensor=torch.empty(experts, 1, problem.hidden_size, device="meta")).shape
    have = getattr(module, family.w13).shape
    if have[0] != want[0] or problem.hidden_size not in have:
        raise RuntimeError(
            f"{family.experts}.{family.w13} is {list(have)}: this transformers is not the one adapted to"
        )
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
        for name, bias in ((family.w13, layer.w13_bias), ("down_proj", layer.w2_bias)):
            if bias is None:  # x + 0 is exact
                bias = torch.zeros(tensors[name].shape[0], tensors[name].shape[2], dtype=dtype, device=layer.w13.device)
            tensors[f"{name}_bias"] = bias
    differing = set(empty._parameters) ^ set(tensors)
    if differing:
        raise RuntimeError(
            f"{family.experts} has parameters {sorted(empty._parameters)}, this adapter {sorted(tensors)}"
        )
    module = copy.copy(empty)
    module._parameters = {n: torch.nn.Parameter(t.detach(), requires_grad=False) for n, t in tensors.items()}
    return module
