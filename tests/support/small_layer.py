"""A layer small enough to build in a microsecond, and a naive stand-in for the kernels that compute it."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kernels.cached import CachedFusedMoE

E, K, I, TOP = 4, 48, 16, 2  # noqa: E741


def make_problem(**changes):
    fields = dict(
        tokens=6, hidden_size=K, intermediate_size=I, num_experts=E, top_k=TOP, dtype="bf16", quant=None,
        activation="silu", limit=None, bias=False, router_weight_on_input=False, layout="kn", ep=None,
        invalid_ids=False, shared_experts=0,
    )  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def tensors(seed=0, experts=E):
    rng = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, K, 2 * I, generator=rng) / math.sqrt(K)
    return w13.bfloat16(), (torch.randn(experts, I, K, generator=rng) / math.sqrt(I)).bfloat16()


def make_layer(seed=0, **changes):
    w13, w2 = tensors(seed)
    absent = dict.fromkeys(("w13_scale", "w2_scale", "w13_bias", "w2_bias", "a13_scale", "a2_scale", "expert_map"))
    return SimpleNamespace(**{**absent, "problem": make_problem(), "w13": w13, "w2": w2, **changes})


def make_call(tokens=6, top_k=TOP, experts=E):
    rng = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=rng).argsort(1)[:, :top_k].int()
    return torch.randn(tokens, K, generator=rng).bfloat16(), torch.rand(tokens, top_k, generator=rng), ids


class Launch:
    """Stands for the Triton kernels: the same arguments, a naive layer. Keeps the arguments that are no tensors."""

    def __init__(self):
        self.seen, self.between = [], lambda: None

    def __call__(self, x, w13, w2, weights, ids, *, activation, out, expert_map, w13_scale, w13_bias, **rest):
        self.seen.append({"activation": activation, **{k: v for k, v in rest.items() if not torch.is_tensor(v)}})
        act = {"silu": F.silu, "gelu": F.gelu}[activation]
        local = ids.long() if expert_map is None else expert_map.long()[ids.long()]
        scale = torch.ones(len(w13)) if w13_scale is None else w13_scale
        total = torch.zeros(out.shape)
        first = [
            [row.float() @ w13[e].float() * scale[e] if e >= 0 else None for e in mine]
            for row, mine in zip(x, local.tolist())
        ]
        self.between()  # GEMM 1 has read its weights, GEMM 2 has not
        for t in range(len(x)):
            for j, h in enumerate(first[t]):
                if h is not None:
                    gate, up = (h if w13_bias is None else h + w13_bias[local[t, j]].float()).chunk(2)
                    total[t] += weights[t, j] * ((act(gate) * up) @ w2[local[t, j]].float())
        out.copy_(total)


def answer(layer, call):
    """What a new instance, built for the layer as it is now, computes."""
    out = torch.full_like(call[0], math.nan)
    CachedFusedMoE(layer, Launch()).apply(out, *call)
    return out


def apply(instance, call):
    out = torch.full_like(call[0], math.nan)
    assert instance.apply(out, *call) is None
    return out


def rebind_data(layer):
    layer.w13.data = tensors(9)[0]


def new_parameters(layer):
    layer.w13, layer.w2 = (torch.nn.Parameter(t) for t in tensors(9))
