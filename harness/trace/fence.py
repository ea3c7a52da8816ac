"""Tensors between fences: a kernel that reads beyond one computes NaN, and a write there is detected.

A fenced tensor lies in a buffer of its own, FENCE elements from either end. The ends are the fences: they hold
canaries, one bit pattern for each element size, which is NaN in every floating format of that size and a large number
as an integer (for one byte all bits are set: NaN in both fp8 formats). A tensor's offset in its storage shows whether
it is fenced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FENCE = 512  #: elements before and behind: a multiple of every alignment that kernels require
#: {element size: (the integer type of that size, the canary's value in it)}
_CANARY = {
    1: (torch.uint8, 0xFF),
    2: (torch.int16, 0x7FFD),
    4: (torch.int32, 0x7FFDA5A5),
    8: (torch.int64, 0x7FFDA5A57FFDA5A5),
}
POISON_INT = {1: 0x7B, 2: 0x7BCD, 4: 0x7BCDEF01, 8: 0x7BCDEF01}
STALE, STALE_CODE = 1024.0, 0x7B  #: a large value in every floating format, 352 in e4m3 (in e5m2: 57344)
_stale = False


@contextmanager
def stale() -> Iterator[None]:
    """Make poison finite, like the data of an earlier call: an amax ignores NaN, but not this.

    Integers become 0: unlike huge numbers, zeros are valid row and expert numbers.
    """
    global _stale
    _stale = True
    try:
        yield
    finally:
        _stale = False


def poison_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with NaN (all bits of the fp8 code set), or with a large number (integers), and return it."""
    if _stale:
        return _overwrite_as_used(tensor)
    if tensor.dtype.is_floating_point:
        if tensor.element_size() == 1:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN in e4m3fn and in e5m2
        else:
            tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    elif not tensor.dtype.is_complex:
        tensor.fill_(POISON_INT[tensor.element_size()])
    return tensor


def _overwrite_as_used(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point and tensor.element_size() == 1:
        tensor.view(torch.uint8).fill_(STALE_CODE)
        return tensor
    return tensor.fill_(STALE) if tensor.dtype.is_floating_point else tensor.zero_()


def fenced(like: Tensor, device: torch.device | None = None) -> Tensor:
    """Fenced memory of like's shape, strides and dtype, on its device or another. Only the fences are written."""
    span = _span(like)
    buffer = torch.empty(span + 2 * FENCE, dtype=like.dtype, device=device or like.device)
    for end in (buffer[:FENCE], buffer[FENCE + span :]):
        kind, canary = _canary(end)
        end.view(kind).fill_(canary)
    return buffer.as_strided(like.shape, like.stride(), FENCE)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, fenced."""
    return fenced(torch.empty(shape, dtype=dtype, device="meta"), device)


def keep(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A fenced copy, on the tensor's device or another. Strides are kept; the gaps between rows are poison."""
    copy = fenced(tensor, device)
    if tensor.numel() and _span(tensor) != tensor.numel():
        poison_(copy.as_strided((_span(tensor),), (1,), FENCE))
    return copy.copy_(tensor)


def fences(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tensor's fences (before, behind); None if it is not fenced."""
    size, span = tensor.element_size(), _span(tensor)
    storage = tensor.untyped_storage()
    if tensor.storage_offset() != FENCE or storage.nbytes() != (span + 2 * FENCE) * size:
        return None
    buffer = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (span + 2 * FENCE,), (1,))
    return buffer[:FENCE], buffer[FENCE + span :]


def intact(ends: Iterable[Tensor]) -> bool:
    """Whether every canary in these fences is unchanged. Waits once for each device, not once for each fence."""
    together: dict[tuple[torch.device, int], list[Tensor]] = {}
    for end in ends:
        together.setdefault((end.device, end.element_size()), []).append(end.view(_canary(end)[0]))
    unchanged: dict[torch.device, list[Tensor]] = {}
    for (device, _), same in together.items():
        unchanged.setdefault(device, []).append((torch.cat(same) == _canary(same[0])[1]).all())
    return all(bool(torch.stack(each).all()) for each in unchanged.values())


def _canary(tensor: Tensor) -> tuple[torch.dtype, int]:
    return _CANARY.get(tensor.element_size(), _CANARY[1])


def _span(tensor: Tensor) -> int:
    """The number of elements of storage from the first to the last element."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
