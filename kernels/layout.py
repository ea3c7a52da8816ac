"""Weight layouts: "nk", rows are outputs, as checkpoints and Triton kernels have them, and "kn", its transpose.

              nk             kn
    w13       [E, 2I, K]     [E, K, 2I]        ungated activations: I instead of 2I
    w2        [E, K, I]      [E, I, K]

One entry point per target: `to_kn` and `to_nk`. The layout is a tag that travels with the weights and is never guessed
from shapes: with K == 2I or K == I both layouts have the same shapes, a kernel that gets the wrong one silently
computes with transposed matrices, and two conversions give back the original. So a conversion to the layout that the
weights already have is refused, and so are shapes that do not fit the tag.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.checks import LAYOUTS, require_one_of, require_weight_scale

GRANULARITIES = (None, "tensor", "channel", "block")


@dataclass(frozen=True)
class ExpertWeights:
    """The two stacked matrices of E local experts in one layout, with their dequantization scales.

    w13, w2: any dtype, shapes as in the module's table. granularity says what the scales mean:
    None (no scales) | "tensor": [E] | "channel": one per output, w13_scale [E, 2I] and w2_scale [E, K] |
    "block": one per block of 128 x 128, in the weight's own layout.
    Constructing does not check; `validate` does, and both conversions call it.
    """

    w13: Tensor
    w2: Tensor
    layout: str
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    granularity: str | None = None
    hidden_size: int = field(kw_only=True)
    intermediate_size: int = field(kw_only=True)
    gated: bool = field(default=True, kw_only=True)

    def validate(self) -> None:
        """ValueError, naming the field, what it is and what it should be, unless shapes, tag and scales agree."""
        require_one_of("layout", self.layout, LAYOUTS)
        require_one_of("granularity", self.granularity, GRANULARITIES)
        hidden, inner = self.hidden_size, self.intermediate_size
        outer = 2 * inner if self.gated else inner
        # name, weight, scale, outputs N, inputs K, and which of the two is the hidden size
        for name, weight, scale, n, k, hidden_is in (
            ("w13", self.w13, self.w13_scale, outer, hidden, "k"),
            ("w2", self.w2, self.w2_scale, hidden, inner, "n"),
        ):
            self._check_weight(name, weight, n, k, hidden_is)
            require_weight_scale(f"{name}_scale", scale, self.granularity, (len(weight), n, k), self.layout)

    def _check_weight(self, name: str, weight: Tensor, n: int, k: int, hidden_is: str) -> None:
        experts = self.w13.shape[0] if self.w13.dim() else 0
        want = _ordered(self.layout, n, k)
        if weight.dim() == 3 and tuple(weight.shape) == (experts, *want):
            return
        text = (
            f"{name} is {list(weight.shape)}; layout {self.layout!r} with hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, gated={self.gated} wants {[experts, *want]}"
        )
        other = "kn" if self.layout == "nk" else "nk"
        if weight.dim() == 3 and tuple(weight.shape[1:]) == _ordered(other, n, k):
            text += f"; these are the shapes of layout {other!r}"
        position = 1 + (self.layout == "kn") if hidden_is == "n" else 1 + (self.layout == "nk")
        if weight.dim() == 3 and weight.shape[position] != self.hidden_size:
            text = f"Hidden size mismatch {self.hidden_size} != {weight.shape[position]}: {text}"
        raise ValueError(text)


def to_kn(weights: ExpertWeights) -> ExpertWeights:
    """The same weights in layout "kn", in new contiguous tensors; block scales move with them. ValueError if they are
    in "kn" already, or do not fit their tag."""
    return _convert(weights, "kn")


def to_nk(weights: ExpertWeights) -> ExpertWeights:
    """The same weights in layout "nk"; the exact inverse of `to_kn`, bit for bit, with the same refusals."""
    return _convert(weights, "nk")


def _convert(weights: ExpertWeights, target: str) -> ExpertWeights:
    weights.validate()
    if weights.layout == target:
        raise ValueError(
            f"weights are in layout {target!r} already (w13 {list(weights.w13.shape)}, w2 {list(weights.w2.shape)}); "
            f"converting again would transpose them back under the same tag"
        )
    moved: dict[str, Any] = {}
    if weights.granularity == "block":
        assert weights.w13_scale is not None and weights.w2_scale is not None
        moved = {"w13_scale": _transposed(weights.w13_scale), "w2_scale": _transposed(weights.w2_scale)}
    return replace(weights, w13=_transposed(weights.w13), w2=_transposed(weights.w2), layout=target, **moved)


def _transposed(tensor: Tensor) -> Tensor:
    # As bytes where elements are bytes: not every device copies strided fp8, and no NaN payload may change on the way.
    flat = tensor.detach()
    flat = flat.view(torch.uint8) if flat.element_size() == 1 else flat
    # clone, not contiguous(): with a dimension of 1 contiguous() returns the input itself, and a later in-place write
    # to the original would reach into the converted weights.
    return flat.transpose(-1, -2).clone(memory_format=torch.contiguous_format).view(tensor.dtype)


def _ordered(layout: str, n: int, k: int) -> tuple[int, int]:
    return (n, k) if layout == "nk" else (k, n)
