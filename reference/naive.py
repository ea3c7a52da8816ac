"""The Mixture-of-Experts layer by definition, to be checked against a paper. No roundings but those of quantization.

For every token t and slot j with an expert e here (topk_ids[t, j] in [0, num_experts), not -1 in expert_map):

    h = w13[e] @ x_t + w13_bias[e]        x_t = hidden_states[t] (times its router weight, if applied on input)
    a = activation(h)
    y = w2[e] @ a + w2_bias[e]
    out_t += topk_weights[t, j] * y       (not weighted again, if the weight was applied on input)

Shared experts serve every token with weight 1, and their input is not weighted. Quantized activations: x_t and a are
first rounded to code * scale, with a dynamic scale per tensor, token or group, or a static one (reference/quant.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference import quant
from reference.activation import activate
from reference.moe import Experts
from reference.scheme import Scheme


def naive(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts) -> Tensor:
    """Return the layer's output [T, K], float64.

    hidden_states [T, K] float64, topk_weights [T, k] float64, topk_ids [T, k] integers.
    """
    e, tokens = experts, len(hidden_states)
    x = hidden_states * topk_weights if e.router_weight_on_input else hidden_states  # k = 1
    plain = 0  # x[plain + t] is the input of shared experts
    if e.router_weight_on_input and e.shared:
        x, plain = torch.cat([x, hidden_states]), tokens
    pairs = []  # (token, row of x, expert, weight)
    for t in range(tokens):
        for expert, weight in zip(topk_ids[t].tolist(), topk_weights[t]):
            valid = 0 <= expert < e.global_experts()
            local = int(e.expert_map[expert]) if valid and e.expert_map is not None else expert
            if valid and local >= 0:
                pairs.append((t, t, local, 1.0 if e.router_weight_on_input else weight))
        pairs += [(t, plain + t, len(e.w13) - e.shared + s, 1.0) for s in range(e.shared)]
    expert_of = [expert for _, _, expert, _ in pairs]

    x = _quantized(x, e.activation_quant, e.a13_scale)
    h = _product(x[[row for _, row, _, _ in pairs]], expert_of, e.w13, e.w13_bias)
    a = _quantized(activate(h, e.activation, e.limit, e.alpha), e.activation_quant, e.a2_scale)
    y = _product(a, expert_of, e.w2, e.w2_bias)
    out = torch.zeros_like(hidden_states)
    for (t, _, _, weight), y_of_pair in zip(pairs, y):
        out[t] += weight * y_of_pair
    return out


def _quantized(x: Tensor, scheme: Scheme | None, static_scale: float | None) -> Tensor:
    """Round x [M, K] to code * scale; None: not at all."""
    if scheme is None:
        return x
    codes, scale = quant.quantize_activation(x, scheme, static_scale)
    return codes * scale


def _product(rows: Tensor, expert_of: list[int], weights: Any, bias: Tensor | None) -> Tensor:
    """Return weights[e] @ row + bias[e] for every row [K] and its expert e: [P, N].

    The rows of one expert are one product, as in moe.py: the last bit of a row of a product depends on the number of
    its rows, and both layers are to agree in every bit.
    """
    out = rows.new_zeros(len(rows), weights.shape[1])
    for e in set(expert_of):
        mine = [p for p, expert in enumerate(expert_of) if expert == e]
        out[mine] = rows[mine] @ weights[e].T
        if bias is not None:
            out[mine] += bias[e]
    return out
