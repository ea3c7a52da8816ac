"""A floor for the time of a call, from the bytes and operations that it needs and the measured rates of the device.

    floor = max(bytes / copy bandwidth, flops / matrix rate)

No version runs much faster than the floor. The measured time over the floor bounds the possible gain (S. Williams et
al., "Roofline", CACM 52(4), 2009).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from harness.device import Device
from harness.problem.case import Problem
from reference.formats import torch_dtype
from reference.moe import local_experts


@dataclass(frozen=True)
class Work:
    """The least bytes and operations of one call."""

    bytes: int  #: weights and scales of the routed experts, hidden_states, router weights, ids, and the output
    flops: int  #: two for each product of both GEMMs, for the (token, expert) pairs with a local expert


def work(problem: Problem, topk_ids: Tensor, expert_map: Tensor | None = None) -> Work:
    """The work of one call with topk_ids [T, k]. Intermediate results are not counted: they could stay on the chip."""
    local = local_experts(topk_ids, problem.num_experts, expert_map)
    routed = local[local >= 0]
    pairs, experts = int(routed.numel()), int(routed.unique().numel())
    k, i, rows = problem.hidden_size, problem.intermediate_size, problem.w13_rows
    weights = rows * k + k * i
    io = torch_dtype(problem.dtype).itemsize
    expert_bytes = weights * io
    if problem.quant:
        scheme = problem.quant.weights
        scales = prod(scheme.scale_shape((rows, k))) + prod(scheme.scale_shape((k, i)))
        expert_bytes = scheme.code_bytes(weights) + 4 * scales
    if problem.bias:
        expert_bytes += (rows + k) * io
    shared = problem.shared_experts
    moved = 2 * problem.tokens * k * io + topk_ids.numel() * (4 + topk_ids.element_size())
    return Work((experts + shared) * expert_bytes + moved, 2 * (pairs + shared * problem.tokens) * weights)


def mean(works: list[Work]) -> Work:
    """The mean work of several calls, rounded down."""
    return Work(sum(w.bytes for w in works) // len(works), sum(w.flops for w in works) // len(works))


def operand(problem: Problem) -> str:
    """The format of both operands of the matrix units, a key of `Ceilings.flops_per_s`."""
    return "fp8" if problem.quant and problem.quant.activation else problem.dtype


@dataclass(frozen=True)
class Ceilings:
    """The rates of this device, measured in this process."""

    copy_bytes_per_s: float  #: a large copy on the device, bytes read plus bytes written
    flops_per_s: dict[str, float]  #: a large matrix product on random data, by operand format

    def floor_us(self, problem: Problem, needed: Work) -> float:
        """The floor in microseconds. No call is much faster."""
        rate = self.flops_per_s.get(operand(problem), float("inf"))
        return 1e6 * max(needed.bytes / self.copy_bytes_per_s, needed.flops / rate)


def ceilings(device: Device, *operands: str) -> Ceilings:
    """Measure each rate once a process: a copy of 4 GiB (CPU: 256 MiB), and products of 8192 (CPU: 1024) squared."""
    rates = {name: rate for name in operands if (rate := _matrix_rate(device, name)) is not None}
    return Ceilings(_copy_rate(device), rates)


@lru_cache
def _copy_rate(device: Device) -> float:
    source = torch.ones(2**28 if device.on_cpu else 2**32, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(device, lambda: target.copy_(source))


@lru_cache
def _matrix_rate(device: Device, name: str) -> float | None:
    n = 1024 if device.on_cpu else 8192
    product = _product(name, n, device.torch)
    return None if product is None else 2 * n**3 / _seconds(device, product)


def _product(name: str, n: int, device: torch.device) -> Callable[[], Tensor] | None:
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    if name != "fp8":
        a, b = a.to(torch_dtype(name)), b.to(torch_dtype(name))
        return lambda: a @ b
    one = torch.ones((), device=device)
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

    def product() -> Tensor:
        return torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        product()
    except (RuntimeError, ValueError):
        return None  # this device has no fp8 matrix units, and no such ceiling
    return product


def _seconds(device: Device, task: Callable[[], object], budget: float = 1.0) -> float:
    """The least time of 13 runs, or of as many (at least 2) as fit into the budget: a ceiling is the best rate."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 13 and (len(times) < 2 or time.perf_counter() - begun < budget):
        device.synchronize()
        started = time.perf_counter()
        task()
        device.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
