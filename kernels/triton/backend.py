"""The layer as backends of the harness: plain classes that know its protocol, and import nothing from it."""

import dataclasses
from collections.abc import Callable

from kernels.layer import ACTIVATIONS, DTYPES, FP8, Fp8Scheme
from kernels.triton.align import moe_align_block_size
from kernels.triton.fused_moe import GemmConfig, fused_moe, permuted_moe, takes_low_latency_path
from kernels.triton.gemm import default_config, low_latency_config
from kernels.triton.permute import MoEPermuteScratch, moe_permute, moe_unpermute
from kernels.triton.stages import record
from kernels.triton.topk import fused_topk

_STORES_IO = dict(
    gate_up="io", act="io", slot="io", router_weight="fp32", combine="fp32", weighted_input="accumulator",
    quantizes_activations=True,
)  # fmt: skip


def scheme(problem) -> Fp8Scheme | None:
    """The Fp8Scheme of a problem: a static per-tensor scale is "tensor" with scales."""
    if problem.quant is None:
        return None
    activation = problem.quant.activation
    return Fp8Scheme(problem.quant.weight, "tensor" if activation == "tensor_static" else activation)


def takes_low_latency(problem) -> bool:
    """Whether fused_moe, called for this problem, launches the kernels of the low latency path."""
    return problem.tokens > 0 and takes_low_latency_path(
        problem.tokens, problem.top_k, problem.num_experts, problem.ep or None
    )


def arguments(layer) -> dict:
    """The keyword arguments of fused_moe for a layer, read from it now: weights may have been swapped."""
    problem = layer.problem
    return dict(
        activation=problem.activation, limit=problem.limit, fp8=scheme(problem), layout=problem.layout,
        w13_scale=layer.w13_scale, w2_scale=layer.w2_scale, a13_scale=layer.a13_scale, a2_scale=layer.a2_scale,
        w13_bias=layer.w13_bias, w2_bias=layer.w2_bias, expert_map=layer.expert_map, num_experts=problem.num_experts,
        apply_router_weight_on_input=problem.router_weight_on_input,
    )  # fmt: skip


def tile_configs(problem) -> list[GemmConfig]:
    """The tiles that batches of any size get for this layer, smallest first, and neighbours of both ends: half as many
    columns or terms, row tiles that share their columns by three, or not at all, and sums in two or three parts."""
    dtype = FP8["e4m3"] if problem.quant and problem.quant.activation else DTYPES[problem.dtype]
    chosen = [default_config(2**n, 1, dtype, problem.quant is not None) for n in range(12)]
    near = []
    for c, group_m, split_k in ((chosen[0], 1, 3), (chosen[-1], 3, 2)):
        smaller = (dict(block_n=c.block_n // 2), dict(block_k=c.block_k // 2), dict(group_m=group_m))
        near += [dataclasses.replace(c, **change) for change in (*smaller, dict(split_k=split_k))]
    return list(dict.fromkeys([low_latency_config(dtype), *chosen, *near]))


class TritonMoE:
    """fused_moe as a user calls it: the low latency path for small batches, the aligned path otherwise."""

    name = "triton"
    devices = {"cpu", "cuda", "xpu"}
    interpreted = True
    promises = frozenset({"errors", "no_extra_tensor", "best_first", "small_sigmoids", "ascending", "no_wait", "graph"})
    batch_invariant = "configured"  # default tiles follow the batch, and with them the order of summation
    path = "auto"
    max_chunk_tokens: int | None = None
    # The same for the classes below: once is enough to ask about these stages.
    route: Callable | None = staticmethod(fused_topk)
    align: Callable | None = staticmethod(moe_align_block_size)

    def supports(self, problem) -> str | None:
        """None, or "<keyword>: why not"."""
        if problem.dtype not in DTYPES:
            return f"dtype: {problem.dtype} is none of {', '.join(DTYPES)}"
        if problem.activation not in ACTIVATIONS:
            return f"activation: {problem.activation} is none of {', '.join(ACTIVATIONS)}"
        if problem.limit is not None and problem.activation == "relu2":
            return "activation: relu2 has no gate to clamp"
        if problem.quant and problem.quant.weight_format not in FP8:
            return f"quant: weights in {problem.quant.weight_format}"
        if problem.router_weight_on_input and problem.top_k != 1:
            return f"router_weight_on_input: needs top_k=1, not {problem.top_k}"
        if problem.shared_experts:
            return "shared_experts: not fused here; the caller adds them"
        return None

    def plans(self, problem) -> list[dict]:
        """The roundings between hidden_states and out."""
        return [dict(_STORES_IO, weight="before_store")]

    def configurations(self, problem) -> dict[str, dict]:
        """Options for prepare(), by name: every tile configuration that a batch of this layer may get, and more."""
        return {str(c): {"config": c} for c in tile_configs(problem)}

    def prepare(self, problem, layer, config=None):
        """call(hidden_states, topk_weights, topk_ids, out=None); reads the layer at every call. config: GemmConfig."""

        def call(hidden_states, topk_weights, topk_ids, out=None):
            return fused_moe(
                hidden_states, layer.w13, layer.w2, topk_weights, topk_ids, path=self.path, out=out, config=config,
                max_chunk_tokens=self.max_chunk_tokens, **arguments(layer),
            )  # fmt: skip

        return call

    def stages(self, call, hidden_states, topk_weights, topk_ids) -> dict:
        """One call of what prepare() returned, with every value between its stages: see kernels.triton.stages."""
        return record(call, hidden_states, topk_weights, topk_ids)

    def expected_launches(self, problem) -> tuple[set[str], set[str]]:
        """(required, forbidden) substrings of the names of the kernels that one call launches."""
        if problem.tokens == 0:
            return set(), {"moe_gemm"}
        required, forbidden = {"moe_gemm", "activate", "combine"}, {"permute"}
        if problem.quant and problem.quant.activation:
            required.add("quantize")
        else:
            forbidden.add("quantize")
        low_latency = self.path == "auto" and takes_low_latency(problem)
        (forbidden if low_latency else required).add("align")
        return required, forbidden


class TritonAlignedMoE(TritonMoE):
    """fused_moe on the aligned path where `triton` takes the other one."""

    name = "triton-aligned"
    route = align = None
    path = "aligned"

    def supports(self, problem) -> str | None:
        """None, or "<keyword>: why not"."""
        reason = super().supports(problem)
        if reason is None and not takes_low_latency(problem):
            return "scenario: the aligned path is what `triton` takes here already"
        return reason


class TritonChunkedMoE(TritonMoE):
    """fused_moe that serves a few tokens at a time, where that makes more than one chunk."""

    name = "triton-chunked"
    route = align = None
    max_chunk_tokens = 16

    def supports(self, problem) -> str | None:
        """None, or "<keyword>: why not"."""
        reason = super().supports(problem)
        if reason is None and problem.quant and problem.quant.activation == "tensor":
            return "quant: a dynamic per-tensor scale belongs to the whole batch, which is cut here"
        if reason is None and problem.tokens <= self.max_chunk_tokens:
            return f"scenario: {problem.tokens} tokens are one chunk, as `triton` serves them already"
        if reason is None and problem.num_experts > 32:
            return "scenario: tokens are cut as they are with up to 32 experts; more only take longer"
        return reason

    def expected_launches(self, problem) -> tuple[set[str], set[str]]:
        """As for `triton`, for the first of the chunks: the last may be short enough for the other path."""
        required, forbidden = super().expected_launches(dataclasses.replace(problem, tokens=self.max_chunk_tokens))
        return required, forbidden - {"align"}


class TritonPermuteMoE(TritonMoE):
    """permuted_moe; its permutation is open to tests of its own."""

    name = "triton-permute"
    route = align = None
    promises = frozenset({"errors", "steady_scratch", "no_wait", "graph"})
    path = "aligned"
    permute = staticmethod(moe_permute)
    unpermute = staticmethod(moe_unpermute)

    def plans(self, problem) -> list[dict]:
        """As for fused_moe, but the router weight meets the stored slot."""
        return [dict(_STORES_IO, weight="after_store")]

    def make_scratch(self, problem, device, **kw) -> MoEPermuteScratch:
        """A scratch for the problem's sizes on `device`; kw as for MoEPermuteScratch."""
        sizes = dict(
            max_num_tokens=max(1, problem.tokens), top_k=problem.top_k, num_experts=problem.num_experts,
            num_local_experts=problem.num_experts // (problem.ep.size if problem.ep else 1),
            hidden_size=problem.hidden_size, hidden_dtype=DTYPES[problem.dtype],
        )  # fmt: skip
        return MoEPermuteScratch(device=device, **(sizes | kw))

    def prepare(self, problem, layer, scratch=None, config=None):
        """call(hidden_states, topk_weights, topk_ids, out=None), with the permutation's buffers in `scratch`."""

        def call(hidden_states, topk_weights, topk_ids, out=None):
            return permuted_moe(
                hidden_states, layer.w13, layer.w2, topk_weights, topk_ids, out=out, scratch=scratch, config=config,
                **arguments(layer),
            )  # fmt: skip

        return call

    def expected_launches(self, problem) -> tuple[set[str], set[str]]:
        required, forbidden = super().expected_launches(problem)
        return (required | {"permute"} if required else required), forbidden - {"permute"}
