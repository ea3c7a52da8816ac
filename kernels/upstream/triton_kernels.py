"""Backends "triton-kernels", "triton-kernels-sorted", "triton-kernels-invariant": Triton's own MoE kernels.

Both products are one call each of `matmul_ogs`: the first gathers rows by the routing, the second multiplies by the
router weights (gammas), scatters and sums over the slots. swigluoai is fused into the first, as gpt-oss models run it;
the other activations are computed by torch, in float32, between the two.

    triton-kernels             routed by the package: a bitmatrix of the ids, then routing_from_bitmatrix
    triton-kernels-sorted      routed by a stable sort in torch, and the package's compute_expt_data
    triton-kernels-invariant   the first, with PrecisionConfig(enforce_bitwise_invariance=True)

The package has no release of its own on PyPI (what is called triton-kernels there is something else): it comes with
Triton's sources, and vLLM ships a copy, which is found and imported here without vLLM. Layouts: matmul_ogs reads
w [E, K, N] by its strides, so both layouts go in as views. -1 among the ids is a slot without expert, as it is where
vLLM calls these kernels. Nothing is kept between calls.

The interpreter cannot run it: `specialize` demands compiled functions, and the GPU determines tile sizes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels.grouped import activate
from kernels.layer import ALPHA, DTYPES, effective_limit
from kernels.upstream.expert_ids import BEYOND, local_ids
from kernels.upstream.package import missing

NAME = "triton_kernels"
NEEDED = ("matmul_ogs.py", "routing.py", "swiglu.py")  #: what tells version 3.5 from later ones, and from strangers
WORD = 32  # ids in a word of the bitmatrix
LARGEST = 448.0  # of e4m3
_import_lock = threading.Lock()


def find() -> tuple[Path | None, str]:
    """(the package's folder, "") or (None, why there is none). Imports nothing: an installed one, else vLLM's copy."""
    strangers = []
    for top, below in ((NAME, ""), ("vllm", f"third_party/{NAME}")):
        spec = importlib.util.find_spec(top)
        for location in (spec and spec.submodule_search_locations) or ():
            folder = Path(location) / below
            lacking = [name for name in NEEDED if not (folder / name).is_file()]
            if not lacking:
                return folder, ""
            if folder.is_dir():
                strangers.append(f"the {NAME} of {top} has no {', '.join(lacking)}: another version or package")
    return None, "; ".join(strangers) or f"{NAME} is not installed, nor a vllm that has a copy"


@cache
def import_package() -> SimpleNamespace:
    """Its modules. ImportError if there is none, or if it does not fit the Triton that is installed."""
    folder, reason = find()
    if folder is None:
        raise ImportError(reason)
    with _import_lock:
        loaded = sys.modules.get(NAME)
        if loaded is None or str(folder) not in map(str, loaded.__path__):
            # Its modules import each other by this name. vLLM, should it come later, finds it and takes it as well.
            spec = importlib.util.spec_from_file_location(
                NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[NAME] = module
            spec.loader.exec_module(module)
        return SimpleNamespace(
            matmul=importlib.import_module(f"{NAME}.matmul_ogs"),
            routing=importlib.import_module(f"{NAME}.routing"),
            swiglu=importlib.import_module(f"{NAME}.swiglu"),
            tensor=importlib.import_module(f"{NAME}.tensor"),
            numerics=importlib.import_module(f"{NAME}.numerics"),
            flags=importlib.import_module(f"{NAME}.matmul_ogs_details.opt_flags"),
        )


class _TritonKernels:
    name: str
    devices = {"cuda", "xpu"}
    batch_invariant = False  # tiles and split-k are chosen by the number of rows
    bitwise = False  # PrecisionConfig.enforce_bitwise_invariance

    def available(self) -> str | None:
        """None, or why it cannot be used here. Imports nothing."""
        return find()[1] or missing("triton", "triton-xpu", "pytorch-triton-xpu")

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason"."""
        if device == "xpu" and not _knows_xpu():
            return f"device: make_opt_flags of this {NAME} knows CUDA and HIP only"
        if problem.shared_experts:
            return "shared_experts: no concern of a product; experts without a router are another call"
        if problem.routing == "beyond":
            return BEYOND
        if problem.router_weight_on_input and problem.bias:
            return "router_weight_on_input: gammas multiply what a product gives, its bias included"
        if (quant := problem.quant) is not None:
            scheme = quant.weight_format, quant.weight, quant.activation
            if scheme != ("e4m3", "tensor", "tensor_static"):
                return (
                    f"quant: {quant}; an e4m3 product has one scale for all rows, given beforehand, and one an expert"
                )
            if problem.layout != "nk":
                return f"layout: {problem.layout}; matmul_ogs asserts that fp8 weights have their K contiguous"
        return self._routing_refusal(problem)

    def _routing_refusal(self, problem: Any) -> str | None:
        k = problem.top_k
        return (
            f"shape: top_k={k}; its routing kernel has a range of 32 * top_k, a power of two" if k & (k - 1) else None
        )

    def plans(self, problem: Any) -> list[dict]:
        """Two: slots are stored in io, or, where K is split among programs, as partial sums in float32. Which of them
        follows from the sizes and the number of multiprocessors. Bias and weight meet the accumulator."""
        plan = {
            "gate_up": "fp32" if _fused(problem) else "io", "act": "io", "slot": "io", "weight": "before_store",
            "router_weight": "fp32", "combine": "fp32", "weighted_input": "product",
            "tf32": "truncated" if problem.dtype == "fp32" else False,
        }  # fmt: skip
        return [plan, {**plan, "slot": "fp32"}]

    def prepare(self, problem: Any, layer: Any, constraints: dict[str, int] | None = None) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io.

        constraints: of update_opt_flags_constraints, in force during a call (for the whole process)."""
        package = import_package()

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            ids = local_ids(topk_ids, layer.expert_map).to(torch.int32).contiguous()
            with _constrained(package, constraints):
                routed = self._route(package, ids, topk_weights.contiguous(), layer.w13.shape[0])
                return _forward(package, layer, hidden_states, *routed, out, self.bitwise)

        return call

    def _route(self, package: Any, ids: Tensor, weights: Tensor, experts: int) -> tuple[Any, Any, Any]:
        """(RoutingData, GatherIndx, ScatterIndx) of local ids int32 [T, k], -1 for none."""
        tokens, slots = ids.shape
        words = -(-experts // WORD)
        chosen = torch.zeros(tokens, words * WORD + 1, dtype=torch.int64, device=ids.device)
        chosen.scatter_(1, ids.long().masked_fill(ids < 0, words * WORD), 1)
        bits = chosen[:, :-1].view(tokens, words, WORD) << torch.arange(WORD, device=ids.device)
        # Two's complement: bit 31 is the sign of an int32, and torch has few operators for uint32.
        packed = bits.sum(-1).to(torch.int32).view(torch.uint32)
        bitmatrix = package.tensor.Bitmatrix(packed, shape=[tokens, words * WORD], shape_max=[tokens, None])
        return package.routing.routing_from_bitmatrix(bitmatrix, weights, ids, experts, slots)


class TritonKernels(_TritonKernels):
    """Routed by the package itself."""

    name = "triton-kernels"

    def configurations(self, problem: Any) -> dict[str, dict[str, dict[str, int]]]:
        """Tile heights at both ends, and K split: constraints of the package's own opt_flags."""
        wanted: tuple[dict[str, int], ...] = ({"block_m": 16}, {"block_m": 128}, {"split_k": 3})
        return {" ".join(f"{k}={v}" for k, v in c.items()): {"constraints": c} for c in wanted}


class TritonKernelsSorted(TritonKernels):
    """The same products; pairs are sorted by torch, so that any top_k and ids that repeat are possible."""

    name = "triton-kernels-sorted"

    def _routing_refusal(self, problem: Any) -> str | None:
        return None

    def _route(self, package: Any, ids: Tensor, weights: Tensor, experts: int) -> tuple[Any, Any, Any]:
        routing, flat = package.routing, ids.flatten()
        expert, order = torch.sort(flat.masked_fill(flat < 0, experts), stable=True)
        edges = torch.searchsorted(expert, torch.arange(experts + 1, device=ids.device, dtype=expert.dtype))
        hist = edges.diff().to(torch.int32)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=ids.device)
        source = order.masked_fill(expert == experts, -1).to(torch.int32)
        target = back.masked_fill(flat < 0, -1).to(torch.int32)
        metadata = routing.compute_expt_data(hist, experts, len(flat))
        data = routing.RoutingData(weights.flatten()[order], hist, experts, ids.shape[1], metadata)
        return data, routing.GatherIndx(source, target), routing.ScatterIndx(target, source)


class TritonKernelsInvariant(_TritonKernels):
    """As TritonKernels, with the option for the same bits in every batch."""

    name = "triton-kernels-invariant"
    batch_invariant = True
    bitwise = True


def _forward(
    package: Any, layer: Any, hidden_states: Tensor, data: Any, gather: Any, scatter: Any, out: Tensor | None,
    bitwise: bool,
) -> Tensor:  # fmt: skip
    problem, matmul = layer.problem, package.matmul
    dtype, gammas = DTYPES[problem.dtype], data.gate_scal
    on_input = problem.router_weight_on_input

    def operands(x: Tensor, w: Tensor, scale: Tensor | None, x_scale: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        flex = matmul.FlexCtx()
        if scale is not None and x_scale is not None:
            x = (x.float() / x_scale).clamp(-LARGEST, LARGEST).to(w.dtype)
            known = package.numerics.InFlexData
            flex = matmul.FlexCtx(known(w.dtype, x_scale), known(w.dtype, scale))
        precision = matmul.PrecisionConfig(flex_ctx=flex, out_dtype=dtype, enforce_bitwise_invariance=bitwise)
        return x, w.transpose(1, 2) if problem.layout == "nk" else w, precision

    fused = None
    if _fused(problem):
        specs = matmul.FnSpecs("swiglu", package.swiglu.swiglu_fn, ("alpha", "limit"))
        limit = effective_limit(problem.activation, problem.limit)
        fused = matmul.FusedActivation(specs, (ALPHA, limit), 2)
    x, w, precision = operands(hidden_states, layer.w13, layer.w13_scale, layer.a13_scale)
    h = matmul.matmul_ogs(
        x, w, _float(layer.w13_bias), data, gather_indx=gather, precision_config=precision,
        gammas=gammas if on_input else None, fused_activation=fused,
    )  # fmt: skip
    a = h if fused else activate(h.float(), problem.activation, problem.limit).to(dtype)
    x, w, precision = operands(a, layer.w2, layer.w2_scale, layer.a2_scale)
    result = matmul.matmul_ogs(
        x, w, _float(layer.w2_bias), data, scatter_indx=scatter, precision_config=precision,
        gammas=None if on_input else gammas, y=None if out is None else out.unsqueeze(0),
    )  # fmt: skip
    return result if out is None else out


def _fused(problem: Any) -> bool:
    # A router weight on the input has to meet gate and up before the activation: gammas come after a fused one.
    return problem.activation == "swigluoai" and not problem.router_weight_on_input


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


@contextmanager
def _constrained(package: Any, constraints: dict[str, int] | None) -> Iterator[None]:
    if not constraints:
        yield
        return
    package.flags.update_opt_flags_constraints(constraints)
    try:
        yield
    finally:
        package.flags.reset_opt_flags_constraints()


@cache
def _knows_xpu() -> bool:
    folder, _ = find()
    source = folder / "matmul_ogs_details" / "opt_flags.py" if folder else None
    return source is not None and source.is_file() and '"xpu"' in source.read_text(encoding="utf-8")
