"""Shared by the tests that interpret Triton kernels. Import it first: it skips them if no kernel can be interpreted."""

import math

import pytest
import torch

from harness import device
from harness.trace import interpreter

if device.present() != ("cpu",):
    pytest.skip("a process that sees a GPU compiles kernels; these tests interpret them", allow_module_level=True)
if reason := interpreter.usable():
    pytest.skip(reason, allow_module_level=True)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill uninitialized memory with NaN, and with integers beyond every bound."""
    allocate = torch.empty

    def poison(tensor):
        if tensor.dtype.itemsize == 1:
            tensor.view(torch.uint8).fill_(0x7F)
        else:
            tensor.fill_(math.nan if tensor.is_floating_point() else 2**30)
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(allocate(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: poison(allocate(x.shape, dtype=x.dtype, device=x.device)))


def random_map(num_experts, generator):
    """An expert map that keeps about half of the experts, in any order."""
    mine = torch.randperm(num_experts, generator=generator)[: max(1, num_experts // 2)]
    table = torch.full((num_experts,), -1, dtype=torch.int32)
    table[mine] = torch.arange(len(mine), dtype=torch.int32)
    return table


def local_ids(ids, num_experts, expert_map):
    """Local expert of each pair as a list, -1 if invalid."""
    known = [e if 0 <= e < num_experts else -1 for e in ids.flatten().tolist()]
    return [int(expert_map[e]) if e >= 0 and expert_map is not None else e for e in known]


def reference_activation(h, name, limit, alpha=1.702):
    """float64 h [.., 2I] -> [.., I]."""
    if name == "relu2":
        return h.clamp(min=0) ** 2
    half = h.shape[-1] // 2
    g, u = (h[..., 0::2], h[..., 1::2]) if name == "swigluoai" else (h[..., :half], h[..., half:])
    limit = 7.0 if limit is None and name == "swigluoai" else limit
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if name == "swigluoai":
        return g * torch.sigmoid(alpha * g) * (u + 1)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    act = torch.nn.functional.silu(g) if name == "silu" else torch.nn.functional.gelu(g, approximate=approximate)
    return act * u
