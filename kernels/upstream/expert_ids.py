"""Ids as serving engines hand them to a kernel: those of this rank's experts, and -1 where none of them serves."""

from __future__ import annotations

import torch
from torch import Tensor

#: Why a package does not run cases with ids past the last expert.
BEYOND = "invalid_ids: -1 stands for no expert; an id beyond the experts has no meaning there, and may index memory"


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """[T, k]: ids of experts, -1 where there is none, through expert_map [E] (local id or -1; None: all are local)."""
    if expert_map is None:
        return topk_ids
    return torch.where(topk_ids < 0, -1, expert_map[topk_ids.clamp(min=0).long()])
