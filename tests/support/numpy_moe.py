"""A second Mixture-of-Experts layer, in NumPy, to check the oracle with: token by token, slot by slot.

It was written from the definition and shares no line with reference/.
"""

import math

import numpy as np


def _sigmoid(v):
    return 1.0 / (1.0 + math.exp(-v)) if v >= 0 else math.exp(v) / (1.0 + math.exp(v))


def _activate_row(h, activation, limit):
    """One row h, a list of floats, through the activation."""
    if activation == "relu2":
        return [max(v, 0.0) ** 2 for v in h]
    half = len(h) // 2
    if activation == "swigluoai":
        pairs = [(h[2 * i], h[2 * i + 1]) for i in range(half)]
        limit = 7.0 if limit is None else limit
    else:
        pairs = [(h[i], h[half + i]) for i in range(half)]
    row = []
    for g, u in pairs:
        if limit is not None:
            g = min(g, limit)
            u = max(-limit, min(u, limit))
        if activation == "silu":
            row.append(g * _sigmoid(g) * u)
        elif activation == "gelu":
            row.append(g * (1.0 + math.erf(g / math.sqrt(2.0))) / 2.0 * u)
        elif activation == "gelu_tanh":
            row.append(g * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * g * g * g))) / 2.0 * u)
        elif activation == "swigluoai":
            row.append(g * _sigmoid(1.702 * g) * (u + 1.0))
        else:
            raise ValueError(activation)
    return row


def _one_expert(x, w13, w2, activation, limit, b13=None, b2=None):
    h = w13 @ x
    if b13 is not None:
        h = h + b13
    a = np.array(_activate_row([float(v) for v in h], activation, limit))
    y = w2 @ a
    return y if b2 is None else y + b2


def numpy_moe(
    hidden_states, w13, w2, topk_weights, topk_ids, activation="silu", limit=None, w13_bias=None, w2_bias=None,
    expert_map=None, router_weight_on_input=False, shared=None,
):  # fmt: skip
    """The whole layer in float64.

    hidden_states [T, K], w13 [E_local, 2I, K] (or [E_local, I, K]), w2 [E_local, K, I], topk_weights and topk_ids
    [T, k], biases [E_local, 2I] and [E_local, K], expert_map [E_global] of local numbers or -1.  An id outside the
    experts, or mapped to -1, adds nothing.  router_weight_on_input: x * weight goes into GEMM 1, the bias is not
    weighted, nor is the output.  shared: a list of (w13 [2I, K], w2 [K, I]); they see every token's x as it is,
    with weight 1.  Returns [T, K].
    """
    x = np.asarray(hidden_states, np.float64)
    w13, w2, weights = (np.asarray(a, np.float64) for a in (w13, w2, topk_weights))
    ids = np.asarray(topk_ids)
    num_experts = len(w13) if expert_map is None else len(expert_map)
    out = np.zeros(x.shape)
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            e, weight = int(ids[t, j]), weights[t, j]
            if e < 0 or e >= num_experts:
                continue
            if expert_map is not None:
                e = int(expert_map[e])
                if e == -1:
                    continue
            b13 = None if w13_bias is None else np.asarray(w13_bias[e], np.float64)
            b2 = None if w2_bias is None else np.asarray(w2_bias[e], np.float64)
            if router_weight_on_input:
                out[t] += _one_expert(x[t] * weight, w13[e], w2[e], activation, limit, b13, b2)
            else:
                out[t] += weight * _one_expert(x[t], w13[e], w2[e], activation, limit, b13, b2)
        for s13, s2 in shared or []:
            out[t] += _one_expert(x[t], np.asarray(s13, np.float64), np.asarray(s2, np.float64), activation, limit)
    return out
