"""The logits of a router's case."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from harness.inputs.draw import generator
from harness.problem.case import Case
from reference.formats import torch_dtype

#: Biases [E] of normal n [E]: about as large as scores are; large beside them; below all of them.
BIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "even": lambda n: n * 0.1,
    "twelve": lambda n: 12 + n * 0.01,
    "negative": lambda n: -1 - n.abs(),
}

BEYOND = 6e4  #: lies between padded rows: a router that takes it for a logit chooses it


def _except(n: Tensor, value: float, every: int) -> Tensor:
    return torch.where(torch.arange(len(n)) % every == 0, value, n)


#: Rows [E] of the extreme fill, of normal n [E].
EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "all negative": lambda n: -1 - n.abs(),
    "coarse: many ties": torch.round,
    "all equal": lambda n: torch.zeros_like(n),
    "sigmoids of about 1e-8": lambda n: n - 18,
    "sigmoids of about 1e-20": lambda n: n * 2 - 46,
    "sigmoids that vanish": lambda n: n * 4 - 120,
    "sigmoids that saturate": lambda n: n + 20,
    "NaN in one": lambda n: torch.where(n == n.max(), math.nan, n),
    "NaN in half": lambda n: _except(n, math.nan, 2),
    "all NaN": lambda n: torch.full_like(n, math.nan),
    "-inf in two thirds": lambda n: torch.where(torch.arange(len(n)) % 3 > 0, -math.inf, n),
    "all -inf": lambda n: torch.full_like(n, -math.inf),
    "all but one -inf": lambda n: torch.where(n == n.min(), n, -math.inf),
    "+inf in one": lambda n: torch.where(n == n.min(), math.inf, n),
    "huge": lambda n: n * 1e4,
    "equal but for the last bits": lambda n: 1 + n * 2.0**-22,
    "ascending": lambda n: n.sort().values,
    "descending": lambda n: n.sort(descending=True).values,
}


def draw_logits(case: Case, device: torch.device, tokens: int | None = None) -> Tensor:
    """The case's logits [T, E] on the device, in its dtype; where it is padded, there is room between the rows."""
    problem = case.problem
    shape = (problem.tokens if tokens is None else tokens, problem.num_experts)
    rng = generator(case, f"logits{tokens}")
    x = torch.randn(shape, generator=rng)
    if case.fill == "exact":
        # A quarter apart, so that no format rounds them, down to where the rest are equal.
        x = (8 - x.argsort(1).argsort(1) / 4).clamp(min=-16)
    if case.fill == "extreme":
        kinds = list(EXTREMES.values())
        for t, row in enumerate(x):
            x[t] = kinds[(t + case.seed) % len(kinds)](row)
    whole = torch.full((shape[0], shape[1] + (5 if problem.padded else 0)), BEYOND)
    whole[:, : shape[1]] = x
    return whole.to(torch_dtype(problem.dtype)).to(device)[:, : shape[1]]
