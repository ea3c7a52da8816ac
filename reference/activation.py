"""The activations between the two GEMMs, in float64.

A gated activation maps [.., 2I], a gate g and an up projection u side by side, to [.., I]:

    silu        silu(g) * u                      Shazeer 2020, arXiv:2002.05202 (SwiGLU)
    gelu        gelu(g) * u, with erf            Hendrycks & Gimpel 2016, arXiv:1606.08415
    gelu_tanh   gelu(g) * u, tanh approximation  ibid.
    swigluoai   g * sigmoid(alpha g) * (u + 1)   gpt-oss; clamped, limit 7, and g, u INTERLEAVED

A limit clamps first: g = min(g, limit), u = clamp(u, -limit, limit). relu2, relu(h)^2 (So et al. 2021,
arXiv:2109.08668), is ungated: [.., I] -> [.., I].

NaN gives NaN. A gate of -inf gives NaN too: the formula is -inf * 0, NaN in IEEE arithmetic, and torch's silu and gelu
return the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.formats import require_float64

GATED = ("silu", "gelu", "gelu_tanh", "swigluoai")
ACTIVATIONS = (*GATED, "relu2")
SWIGLUOAI_LIMIT = 7.0


def is_gated(name: str) -> bool:
    """Return whether the activation takes a gate and an up projection. ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; valid are {', '.join(ACTIVATIONS)}")
    return name in GATED


def activate(h: Tensor, activation: str, limit: float | None = None, alpha: float = 1.702) -> Tensor:
    """Apply an activation to h float64 [.., 2I] ([.., I] if ungated); return float64 [.., I].

    limit=None means 7 for swigluoai and no clamp for the others. Only swigluoai reads alpha.
    """
    return combine_gate_up(*split_gate_up(h, activation), activation, limit, alpha)


def split_gate_up(h: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """Split h [.., 2I] into g and u [.., I]; (h, None) if ungated. ValueError if gated and the last size is odd."""
    require_float64(h, "h")
    if not is_gated(activation):
        return h, None
    if h.shape[-1] % 2:
        raise ValueError(f"last size of h is {h.shape[-1]}; activation {activation!r} is gated and needs an even one")
    if activation == "swigluoai":
        return h[..., 0::2], h[..., 1::2]
    intermediate_size = h.shape[-1] // 2
    return h[..., :intermediate_size], h[..., intermediate_size:]


def combine_gate_up(
    g: Tensor, u: Tensor | None, activation: str, limit: float | None = None, alpha: float = 1.702
) -> Tensor:
    """Combine g and u, float64 [.., I], into float64 [.., I]; u is None if ungated. Differentiable in g and u."""
    require_float64(g, "g")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit is {limit}; valid are None and positive numbers")
    if not is_gated(activation):
        if limit is not None or u is not None:
            raise ValueError(f"limit is {limit} and u is {type(u).__name__}; both must be None for relu2")
        return torch.relu(g) ** 2
    if u is None:
        raise ValueError(f"u is None; activation {activation!r} is gated and needs a tensor")
    require_float64(u, "u")
    if activation == "swigluoai" and limit is None:
        limit = SWIGLUOAI_LIMIT
    if limit is not None:
        g = g.clamp(max=limit)  # clamp keeps NaN
        u = u.clamp(-limit, limit)
    if activation == "silu":
        return g * torch.sigmoid(g) * u
    if activation == "gelu":
        # erfc(-g) is 1 + erf(g) without the cancellation at negative g.
        return 0.5 * g * torch.special.erfc(-g / math.sqrt(2.0)) * u
    if activation == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), again without the cancellation.
        z = math.sqrt(2.0 / math.pi) * (g + 0.044715 * g**3)
        return g * torch.sigmoid(2.0 * z) * u
    return g * torch.sigmoid(alpha * g) * (u + 1.0)
