"""The tensors of a Case: hidden_states, router weights and ids, and the layer. Deterministic in the descriptor.

Every tensor is drawn on `device` from a seeded generator of its own, expert by expert, so that whole-size layers fit.
Every tensor lies between fences (trace/fence.py): a kernel that reads beyond one computes NaN.
fp8 weights are drawn as codes and scales: no quantizer takes part, and every granule has a scale of its own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.inputs import exact_fill
from harness.inputs.reshape import padded_rows
from harness.problem.case import Case, Problem
from harness.problem.exactness import OFF, pair_weight
from harness.trace import fence
from reference.formats import FORMATS, encode, round_to, torch_dtype
from reference.quant import block_amax, expand_scale
from reference.scheme import Format, Scheme

CPU = torch.device("cpu")
SIGMA = 1.5  #: standard deviation of GEMM 1's output under the random fill: where silu, gelu and their swap differ

DrawLayer = Callable[[Problem, str, int, torch.device], tuple[Layer, Layer]]  #: draw_layer, or a cache of it


@dataclass
class Inputs:
    """One call's tensors. `layer` is in layout "nk"; `backend_layer` is the same layer in the backend's layout."""

    case: Case
    hidden_states: Tensor  #: [T, K]
    topk_weights: Tensor  #: [T, k] float32
    topk_ids: Tensor  #: [T, k] int32 or int64
    layer: Layer
    backend_layer: Layer

    def arguments(self) -> dict[str, Tensor]:
        """What the call is given besides the layer, by name, in order."""
        return {name: getattr(self, name) for name in ("hidden_states", "topk_weights", "topk_ids")}

    def with_arguments(self, arguments: dict[str, Tensor], **changes: Any) -> Inputs:
        """The same with other arguments for the call."""
        return replace(self, **{**arguments, **changes})


def draw(case: Case, device: torch.device = CPU, layers: DrawLayer | None = None) -> Inputs:
    """The case's tensors. layers: `draw_layer`, or a cache of it, whose layers several calls share."""
    problem = case.problem
    layer, backend_layer = (layers or draw_layer)(problem.weights_key(), case.fill, case.seed, device)
    rng = generator(case, "call", device)
    topk_ids = _topk_ids(problem, rng).to(torch.int64 if problem.ids == 64 else torch.int32).contiguous()
    if case.fill == "exact":
        x = exact_fill.hidden_states(problem, exact_fill.sign_patterns(problem, case.seed, device), rng)
        topk_weights = exact_fill.router_weights(problem, rng, device)
    else:
        x = torch.randn(problem.tokens, problem.hidden_size, generator=rng, device=device)
        topk_weights = torch.rand(problem.tokens, problem.top_k, generator=rng, device=device) * 0.75 + 0.25
        if case.fill == "extreme":
            x = _extreme_rows(problem, x)
    x = x.to(torch_dtype(problem.dtype))
    if problem.padded:
        x = padded_rows(x)
    return Inputs(
        case, fence.keep(x), fence.keep(topk_weights), fence.keep(topk_ids), replace(layer, problem=problem),
        replace(backend_layer, problem=problem),
    )  # fmt: skip


def generator(case: Case, purpose: str, device: torch.device = CPU) -> torch.Generator:
    """Return a generator seeded by the case, without its scenario, and by the purpose of the numbers."""
    seed = zlib.crc32(f"{replace(case, scenario='once')}/{purpose}".encode())
    return torch.Generator(device=device).manual_seed(seed)


def _extreme_rows(problem: Problem, x: Tensor) -> Tensor:
    """Change rows, in turn: none, NaN in the first column (a read past the end of the previous row gets it), large,
    zero, tiny, one outlier, a common sign, NaN in the last column."""
    kind = torch.arange(len(x), device=x.device) % 9
    over_rows = problem.quant is not None and problem.quant.over_rows
    tiny = 2.0**-9 if problem.dtype == "fp16" else 2.0**-20
    x[kind == 2] *= 12
    x[kind == 3] = 0
    x[kind == 4] *= tiny
    x[kind == 5, problem.hidden_size // 2] = 96
    x[kind == 6] += 2
    if problem.dtype != "fp16" and not over_rows:
        x[kind == 8] *= 2.0**24  # infinite in a kernel with float16 on the way
    # One NaN would make a dynamic scale over all rows NaN, and no contract says what the other rows become then.
    if not over_rows:
        x[kind == 1, 0] = math.nan
        x[kind == 7, problem.hidden_size - 1] = math.nan
    return x


def _topk_ids(problem: Problem, rng: torch.Generator) -> Tensor:
    tokens, experts, k = problem.tokens, problem.num_experts, problem.top_k
    device = rng.device

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device)

    scores = rand(tokens, experts)
    mine = expert_map(problem, device)
    if problem.routing == "balanced":
        return torch.arange(tokens * k, device=device).reshape(tokens, k) % experts
    if problem.routing == "skewed":
        scores = scores.log() * torch.arange(1, experts + 1, device=device)  # P(expert j first) ~ 1/j
    if problem.routing == "one":
        scores = scores[:1].expand(tokens, -1).clone() if tokens else scores
        if mine is not None and tokens:
            scores += (mine >= 0).float()
    if problem.routing == "half" and experts >= 2 * k:
        scores[:, : experts // 2] = -1
    if problem.routing == "remote" and mine is not None:
        scores[:, mine >= 0] = -1
    ids = scores.argsort(1, descending=True)[:, :k]
    if problem.routing == "duplicate":
        ids[::2] = ids[::2, :1]
    if problem.routing == "invalid":
        ids[rand(tokens, k) < 0.3] = -1
        ids[1::5] = -1
    if problem.routing == "beyond":  # what a stale or uninitialised entry holds
        last = 2**32 + 1 if problem.ids == 64 else -(2**31)  # the lower half of the first names an expert
        strange = torch.tensor([experts, -1, experts + 7, 2**31 - 1, last], device=device)
        hit = rand(tokens, k) < 0.4
        ids[hit] = strange[torch.arange(int(hit.sum()), device=device) % len(strange)]
    if problem.routing == "nobody":
        ids[:] = -1
    return ids


def expert_map(problem: Problem, device: torch.device) -> Tensor | None:
    """int32 [num_experts]: local expert, or -1 for experts of other ranks."""
    if problem.ep is None:
        return None
    ids, local = torch.arange(problem.num_experts, device=device), problem.local_experts
    rank, place = (ids % problem.ep.size, ids // problem.ep.size) if problem.ep.strided else (ids // local, ids % local)
    return torch.where(rank == problem.ep.rank, place, -1).int()


def draw_layer(problem: Problem, fill: str, seed: int, device: torch.device) -> tuple[Layer, Layer]:
    """The layer in layout "nk", and the same layer as the backend gets it."""
    rng = generator(Case(problem, fill, seed), "layer", device)
    layer = _layer(problem, fill, seed, rng)
    return layer, in_layout(layer, problem.layout)


def _layer(problem: Problem, fill: str, seed: int, rng: torch.Generator) -> Layer:
    device, quant, io = rng.device, problem.quant, torch_dtype(problem.dtype)
    scheme = quant.weights if quant else None
    experts = problem.local_experts + problem.shared_experts
    shapes = {
        "w13": (problem.w13_rows, problem.hidden_size),
        "w2": (problem.hidden_size, problem.intermediate_size),
    }
    stored = torch_dtype(scheme.codes) if scheme else io
    weights = {name: fence.empty(experts, *shape, dtype=stored, device=device) for name, shape in shapes.items()}
    scales = {n: fence.keep(_scales(problem, fill, experts, s, rng)) for n, s in shapes.items()} if scheme else {}
    biases = {name: fence.empty(experts, s[0], dtype=io, device=device).zero_() for name, s in shapes.items()}
    s = exact_fill.sign_patterns(problem, seed, device) if fill == "exact" else None
    for e in range(experts):
        if s is not None:
            values = dict(zip(shapes, exact_fill.expert_weights(problem, s, rng)))
            if problem.bias:
                bias = exact_fill.expert_biases(problem, rng, device)
                biases["w13"][e] = torch.where(_forced(problem, values["w13"], s), 0, bias[0]).to(io)
                biases["w2"][e] = bias[1].to(io)
            for name, value in values.items():
                if scheme:
                    scales[name][e] = _fitted(scales[name][e], value, scheme)
                    ratio = value / expand_scale(scales[name][e], scheme.granularity, value.shape)
                    weights[name][e] = _codes(ratio, scheme.codes)
                else:
                    weights[name][e] = value.to(stored)
        else:
            for name, shape in shapes.items():
                value = torch.randn(shape, generator=rng, device=device)
                spread = _real_sigma(name == "w13", shape[1]) if scheme is None else scheme.codes.sigma_drawn
                value = value * spread
                if fill == "extreme" and name == "w2":
                    _extreme_outputs(value, spread, problem)
                weights[name][e] = _stored(value, scheme, io)
                biases[name][e] = (torch.randn(shape[0], generator=rng, device=device) * 0.5).to(io)
    static = {}
    if quant and quant.activations and quant.activations.granularity.static:
        # Random: 0.7 of what is needed, so that some values saturate.
        codes = quant.activations.codes
        pair = exact_fill.static_scales(problem) if fill == "exact" else (0.7 * 4.5 / codes.max, 0.7 * 9 / codes.max)
        static = {f"{n}_scale": fence.keep(torch.tensor([v], device=device)) for n, v in zip(("a13", "a2"), pair)}
    places = expert_map(problem, device)
    return Layer(
        problem, weights["w13"], weights["w2"], scales.get("w13"), scales.get("w2"),
        biases["w13"] if problem.bias else None, biases["w2"] if problem.bias else None,
        **static, expert_map=places if places is None else fence.keep(places),
    )  # fmt: skip


def _real_sigma(gemm_1: bool, terms: int) -> float:
    """Standard deviation of weights whose sums of so many terms have SIGMA behind GEMM 1, and 1 behind GEMM 2."""
    return (SIGMA if gemm_1 else 1.0) / math.sqrt(terms)


def _stored(value: Tensor, scheme: Scheme | None, io: torch.dtype) -> Tensor:
    """Random weights [N, K] as they are stored: codes of the scheme, or values of the io dtype."""
    if scheme is None:
        return value.to(io)
    largest = scheme.codes.largest_drawn
    return _codes(value.clamp(-largest, largest), scheme.codes)


def _codes(value: Tensor, codes: Format) -> Tensor:
    """Float32 values within the range of the codes, rounded once and stored."""
    dtype = torch_dtype(codes)
    return value.to(dtype) if dtype.is_floating_point else encode(value.double(), codes)


def _extreme_outputs(w2: Tensor, spread: float, problem: Problem) -> None:
    """Put the weights of some outputs at the edges of a narrow format: every fifth among the subnormal numbers and, of
    codes, every fifth at the largest. Subnormal numbers of bf16 and fp32 are so small that devices may flush them."""
    form = problem.quant.weights.codes if problem.quant else FORMATS[problem.dtype]
    if form.name in ("bf16", "fp32"):
        return
    w2[1::5] *= 0.4 * 2.0**form.emin / spread
    if form.bits:
        w2[2::5] = form.largest_drawn * w2[2::5].sign()


def _fitted(scale: Tensor, value: Tensor, scheme: Scheme) -> Tensor:
    """Powers of two, moved so far that no code of an exact weight [N, K] is too large or too small for the format."""
    codes = scheme.codes
    if codes.max >= 2 * abs(OFF) and codes.step(0) <= pair_weight(None) / 2:
        return scale  # a format of so wide a range has codes for all of them under every scale drawn
    largest = block_amax(value, scheme.granularity)
    smallest = 1 / block_amax(torch.where(value == 0, 0.0, 1 / value), scheme.granularity)  # inf where all are 0
    mantissa, exponent = torch.frexp(largest / codes.max)
    least = torch.where(largest > 0, 2.0 ** (exponent - (mantissa == 0.5).int()), 0.0)
    most = torch.where(largest > 0, 2.0 ** (torch.frexp(smallest / codes.step(0)).exponent - 1), torch.inf)
    return scale.minimum(most).maximum(least)


def _forced(problem: Problem, w13: Tensor, s: exact_fill.SignPatterns) -> Tensor:
    forced = exact_fill.forced_rows(w13, s)
    return forced if s.amax else torch.zeros_like(forced)


def _scales(problem: Problem, fill: str, experts: int, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Float32 scales of w13 or w2 [E, N, K], each a value of the scheme's format of scales."""
    assert problem.quant is not None
    scheme = problem.quant.weights
    granules = scheme.scale_shape((experts, *shape))
    if fill == "exact":
        return 2.0 ** (torch.randint(3, granules, generator=rng, device=rng.device) - 1.0)
    spread = _real_sigma(shape[1] == problem.hidden_size, shape[1]) / scheme.codes.sigma_drawn
    scales = spread * (0.5 + torch.rand(granules, generator=rng, device=rng.device))
    if fill == "extreme":
        # Experts, rows and blocks that nobody trained: checkpoints have scales of 0 for them, or of 1e-23.
        scales.view(-1)[3::7] = 0.0
        scales.view(-1)[5::7] *= 2.0**-70
    return round_to(scales.double(), scheme.granularity.scale).float()


def in_layout(layer: Layer, layout: str) -> Layer:
    """The layer as a backend of this layout gets it: "kn" transposes weights and block scales into new memory."""
    if layout == "nk":
        return replace(layer)

    def flip(t: Tensor) -> Tensor:
        if t.dim() != 3:
            return t
        return fence.empty(*t.transpose(-1, -2).shape, dtype=t.dtype, device=t.device).copy_(t.transpose(-1, -2))

    weights = ("w13", "w2", "w13_scale", "w2_scale")
    flipped: dict[str, Any] = {name: flip(t) for name, t in layer.tensors().items() if name in weights}
    return replace(layer, **flipped)
