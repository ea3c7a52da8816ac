"""The MoE layer as one would write it in PyTorch, computed in the io dtype: the baseline of FlashAttention's rule.

It shares with the oracle how weights are decoded, and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.expected import oracle_experts
from harness.inputs import Inputs
from reference.moe import local_experts


def naive(given: Inputs) -> Tensor:
    """[T, K] in the dtype of hidden_states: expert by expert, every product, sum and activation rounded to it."""
    problem, x = given.case.problem, given.hidden_states
    experts = oracle_experts(given.layer, x.device)
    local = local_experts(given.topk_ids, problem.num_experts, experts.expert_map)
    out = torch.zeros_like(x)

    def expert(number: int, rows: Tensor) -> Tensor:
        h = rows @ experts.w13[number].to(x.dtype).T
        if experts.w13_bias is not None:
            h = h + experts.w13_bias[number].to(x.dtype)
        a = _activate(h, problem.activation, problem.limit)
        y = a @ experts.w2[number].to(x.dtype).T
        return y if experts.w2_bias is None else y + experts.w2_bias[number].to(x.dtype)

    for number in local[local >= 0].unique().tolist():
        token, slot = torch.nonzero(local == number, as_tuple=True)
        weight = given.topk_weights[token, slot, None].to(x.dtype)
        if problem.router_weight_on_input:
            out.index_add_(0, token, expert(number, x[token] * weight))
        else:
            out.index_add_(0, token, expert(number, x[token]) * weight)
    for number in range(problem.shared_experts):
        out += expert(problem.local_experts + number, x)
    return out


def _activate(h: Tensor, activation: str, limit: float | None) -> Tensor:
    """[P, 2I] -> [P, I], or as many columns for relu2; every operation in the dtype of h."""
    if activation == "relu2":
        return F.relu(h).square()
    interleaved = activation == "swigluoai"
    gate, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=1)
    limit = 7.0 if interleaved and limit is None else limit
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if interleaved:
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
