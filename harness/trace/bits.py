"""The bits of tensors: compared, where NaN must equal itself, and hashed, where a copy would be too large."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

WIDTH = 2**15  #: words of a tensor that share one sum
WORDS_AT_ONCE = 2**24  #: words of a tensor on a GPU that are multiplied at once: a temporary of 128 MiB


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and the same bytes."""
    return a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(tensor: Tensor) -> Tensor:
    """The tensor's bytes in the order of its elements, [n] uint8; a copy if the tensor is not contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8)


def digest(tensor: Tensor) -> str:
    """A hash of the tensor's bytes in the order of its elements, whatever its strides; 32 hexadecimal digits.

    A multilinear hash (Lemire & Kaser 2014, "Strongly universal string hashing is fast"): the sum over 32-bit words
    times random 64-bit multipliers, modulo 2^64, one sum for each WIDTH words. Two tensors of one size, drawn without
    looking at the multipliers, share a sum with probability 2^-33 at most. blake2b joins the sums, so that the order of
    the runs of WIDTH words counts as the order of words within them does.

    Cheap enough to be taken around every call, also of layers that fill a GPU: one pass, and no copy but of a tensor
    that is not contiguous.
    """
    data = raw(tensor)
    if data.storage_offset() % 4:
        data = data.clone()  # words must be aligned
    words = data[: len(data) // 4 * 4].view(torch.int32)
    multipliers = _multipliers(data.device)
    runs = len(words) // WIDTH
    at_once = 1 if data.device.type == "cpu" else WORDS_AT_ONCE // WIDTH  # on the CPU products stay in the cache
    sums = []
    if runs:
        for part in words[: runs * WIDTH].view(runs, WIDTH).split(at_once):
            sums.append((part * multipliers).sum(1))
    rest = words[runs * WIDTH :]
    sums.append((rest * multipliers[: len(rest)]).sum().view(1))
    joined = hashlib.blake2b(torch.cat(sums).cpu().numpy().tobytes(), digest_size=16)
    joined.update(bytes(data[len(words) * 4 :].tolist()))
    joined.update(str(len(data)).encode())
    return joined.hexdigest()


@lru_cache
def _multipliers(device: torch.device) -> Tensor:
    """[WIDTH] int64, the same in every process."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (WIDTH,), generator=torch.Generator().manual_seed(0))
    return drawn.to(device)
