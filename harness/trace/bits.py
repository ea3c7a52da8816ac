"""The bits of tensors: compared where NaN must equal itself, and summed up where a copy would be too large."""

from __future__ import annotations

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(raw(a), raw(b))


def digest(t: Tensor) -> tuple[int, ...]:
    """A checksum of the tensor's bits: cheap enough to be taken around every call, also of whole-size layers."""
    data = raw(t)
    words = data[: len(data) // 4 * 4].view(torch.int32)
    parts = (words, words[::2], data[len(words) * 4 :])
    return (*(int(part.sum(dtype=torch.int64)) for part in parts), len(data))


def raw(tensor: Tensor) -> Tensor:
    """The tensor's bytes, [n] uint8: what is compared where NaN must equal itself."""
    return tensor.contiguous().flatten().view(torch.uint8)
