"""Backends "ipex" and "ipex-gated-mlp": the MoE kernels of Intel Extension for PyTorch (IPEX), on the CPU.

    ipex              torch.ops.torch_ipex.fused_experts: one fused call; bf16, silu
    ipex-gated-mlp    ipex.llm.modules.GatedMLPMOE: a loop over experts; fp32, bf16, fp16, silu

IPEX was archived in March 2026; 2.8 is its last version, and each version needs the torch of the same number: with
another one `import` fails, and not with ImportError. So that is asked of the metadata, before anything is imported.

Both pack the weights once, the module when it is first called, and nothing notices when they change: nothing followed.
The module routes by itself, from logits; it takes a routing function instead, which here returns what the call was
given.

Importing IPEX replaces operators of torch in the whole process: on the CPU matmul, sum, mean, cat, index_select, norms
and pools, and others under autocast. The oracle computes there, too: the test asks that it answers as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.layer import DTYPES
from kernels.upstream.package import installed, numbers

PACKAGE = "intel-extension-for-pytorch"
ALIGNMENT, WIDE = 32, 128  #: of both sizes; of an intermediate size from 2 * WIDE on
_importing = threading.Lock()


def import_ipex() -> Any:
    """The module intel_extension_for_pytorch. Only where available() has no objection."""
    with _importing:
        import intel_extension_for_pytorch

        return intel_extension_for_pytorch


def _mismatch() -> str | None:
    """Why IPEX cannot be imported here, or None. Imports nothing."""
    found = installed(PACKAGE)
    if found is None:
        return f"the package {PACKAGE} is not installed"
    _, version = found
    if numbers(version)[:2] != numbers(torch.__version__)[:2]:
        return f"{PACKAGE} {version} needs torch {'.'.join(map(str, numbers(version)[:2]))}, not {torch.__version__}"
    return None


class _Ipex:
    devices = {"cpu"}
    follows: frozenset[str] = frozenset()  # packed once: see above
    dtypes: tuple[str, ...]

    def available(self) -> str | None:
        """None, or why it cannot be used here: IPEX is missing, or made for another torch. Imports nothing."""
        return _mismatch()

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if problem.quant is not None:
            return "quant: neither has fp8 weights"
        if problem.dtype not in self.dtypes:
            return f"dtype: {problem.dtype}; valid: {', '.join(self.dtypes)}"
        if problem.activation != "silu" or problem.limit is not None:
            return f"activation: {problem.activation}, limit={problem.limit}; both have silu, unclamped"
        if problem.bias:
            return "bias: neither has a parameter for one"
        if problem.router_weight_on_input:
            return "router_weight_on_input: both weight their outputs"
        if problem.shared_experts:
            return "shared_experts: another operator of IPEX's"
        if problem.ep is not None:
            return "expert_map: neither has a parameter for one"
        if problem.invalid_ids:
            return "invalid_ids: an id that is no expert's is an error to both"
        return None


class FusedExperts(_Ipex):
    """fused_experts over weights that convert_weight_packed_moe_bf16 packed."""

    name = "ipex"
    dtypes = ("bf16",)
    batch_invariant = True

    def available(self) -> str | None:
        """None, or why it cannot be used here: also if this CPU has no AVX512_BF16."""
        if reason := super().available():
            return reason
        return None if torch.cpu._is_avx512_bf16_supported() else "fused_experts needs a CPU with AVX512_BF16"

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        for name in ("hidden_size", "intermediate_size"):
            if getattr(problem, name) % ALIGNMENT:
                return f"shape: {name}={getattr(problem, name)}; fused_experts wants multiples of {ALIGNMENT}"
        if problem.intermediate_size >= 2 * WIDE and problem.intermediate_size % WIDE:
            return f"shape: intermediate_size={problem.intermediate_size}; from {2 * WIDE} on, multiples of {WIDE} only"
        if problem.padded:
            return "shape: fused_experts wants contiguous hidden_states, and says so"
        return super().supports(problem)

    def plans(self, problem: Any) -> list[dict]:
        """One plan: the activation and each weighted slot are stored in bf16."""
        return [{"act": "io", "slot": "io"}]

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] bf16, topk_weights [T, k], topk_ids [T, k], out=None) -> [T, K] bf16."""
        import_ipex()
        ops = torch.ops.torch_ipex
        w13, w2 = (_nk(problem, w).contiguous() for w in (layer.w13, layer.w2))
        w13, w2 = ops.convert_weight_packed_moe_bf16(w13, w2)

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            # not in place, packed, not distributed, unquantized: the rest describes quantized weights
            result = ops.fused_experts(
                hidden_states, w13, w2, topk_weights.float().contiguous(), topk_ids.int().contiguous(),
                False, True, False, False, 1, -1, 2, None, None, None, None, None, None,
            )  # fmt: skip
            return result if out is None else out.copy_(result)

        return call


class GatedMLP(_Ipex):
    """GatedMLPMOE, prepacked as it is by default; fp16, which it prepacks for AVX512_FP16 only, as it comes."""

    name = "ipex-gated-mlp"
    dtypes = tuple(DTYPES)

    def plans(self, problem: Any) -> list[dict]:
        """One plan: everything is stored in io, the sum over the slots too, once for each expert."""
        return [
            {
                "gate_up": "io", "act_chain": True, "act": "io", "slot": "io", "router_weight": "io", "combine": "io",
                "weight": "rounded" if problem.dtype == "fp16" else "after_store",
            }
        ]  # fmt: skip

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k], topk_ids [T, k], out=None) -> [T, K] io."""
        modules = import_ipex().llm.modules
        # Copies: it packs bf16 weights where they lie, and the layer's would be what it made of them.
        w13, w2 = (_nk(problem, w).clone(memory_format=torch.contiguous_format) for w in (layer.w13, layer.w2))
        module = modules.GatedMLPMOE(w13, w2, use_prepack=problem.dtype != "fp16")

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            def routed(**_: Any) -> tuple[Tensor, Tensor]:
                return topk_weights, topk_ids

            with torch.no_grad():
                result = module(
                    hidden_states, use_grouped_topk=False, top_k=topk_ids.shape[1], router_logits=None,
                    renormalize=False, custom_routing_function=routed,
                )  # fmt: skip
            return result if out is None else out.copy_(result)

        return call


def _nk(problem: Any, stacked: Tensor) -> Tensor:
    """Weights in layout "nk", which is the one that IPEX packs."""
    return stacked if problem.layout == "nk" else stacked.transpose(1, 2)
