"""The decision whether an output is a correct kernel's. No tolerance is set by hand.

Every threshold follows from the predicted variance, the number of elements and rows, and the false-alarm level ALPHA.
Statistics (each is a share of its budget: above 1 fails; modes: see deviation.py):

    equal    exact fill: the share of elements that differ must be zero
    class    NaN and the infinities must be where the oracle has them
    rho      the largest deviation against t, where P(|diff| > t) <= ALPHA / 2n. Unrounded: roundings are bounded, so
             their sum is sub-Gaussian: t = sqrt(2 L v), L = ln(2 n / ALPHA). Repeated roundings: flips are rare and
             large: Bennett.
    rms      unrounded: root mean square of diff / sigma, over all rows and over the rows of each expert
    median   root of the median row's mean square: rare flips do not move it, an error in half of the rows does
    count    repeated roundings: the number of disturbed rows against the predicted number of flips (Chernoff bound of a
             Poisson)
    slope    repeated roundings: a coherent scale error: the median over rows of the regression of diff on y

Limits other than ALPHA's are calibrated on 4461 correct runs (docs/oracle.md): the observed maximum lies below each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.oracle.deviation import Expected

ALPHA = 1e-6  #: false alarms per case
RMS_ALL, MEDIAN_ALL, MEDIAN_EXPERT, SLOPE = 1.15, 1.15, 1.25, 4e-4


@dataclass
class Judgement:
    """The used shares of the error budget, and the elements beyond it."""

    budgets: dict[str, float] = field(default_factory=dict)
    wrong: Tensor | None = None  #: [T, K] bool
    got: Tensor | None = None  #: [T, K] float64
    expected: Tensor | None = None
    sigma: Tensor | None = None
    plan: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def budget(self) -> float:
        """The largest share of its budget that a statistic used."""
        return max(self.budgets.values(), default=0.0)

    @property
    def worst(self) -> str:
        """The statistic with the largest used share."""
        return max(self.budgets, key=self.budgets.__getitem__, default="")

    @property
    def passed(self) -> bool:
        """Whether every statistic is within its budget."""
        return self.budget <= 1.0


def judge_exact(got: Tensor, expected: Tensor) -> Judgement:
    """Judge bit for bit, but for the sign of zero: got and expected [T, K] float64, values of the io dtype."""
    wrong = ~((got == expected) | (got.isnan() & expected.isnan()))
    share = float(wrong.double().mean()) if wrong.numel() else 0.0
    # Any difference fails: the budget is zero, so the share used is infinite.
    return Judgement({"equal": math.inf if share else 0.0}, wrong, got, expected, plan="exact")


def judge(got: Tensor, expected: Expected) -> Judgement:
    """Judge statistically: got [T, K] float64, the values of the io dtype."""
    out = expected.out
    judgement = Judgement(
        {}, torch.zeros_like(out, dtype=torch.bool), got, out, expected.variance.sqrt(), str(expected.plan)
    )
    if not out.numel():
        return judgement
    same_class = (got.isnan() == out.isnan()) & ((got.isinf() == out.isinf()) & (~out.isinf() | (got == out)))
    judgement.wrong = ~same_class
    judgement.budgets["class"] = math.inf if judgement.wrong.any() else 0.0
    finite = torch.isfinite(out) & torch.isfinite(got)
    diff = torch.where(finite, got - out, 0.0)
    variance = torch.where(finite, expected.variance, 0.0)
    level = math.log(2 * out.numel() / ALPHA)
    limit = (
        _bennett(variance, expected.max_flip, level) if expected.repeats_roundings else (2 * level * variance).sqrt()
    )
    # Where nothing may differ (a zero row), any difference is infinitely many budgets.
    share = torch.where(diff == 0, 0.0, diff.abs() / (limit + 2 * math.sqrt(2 * level) * expected.tie_sigma))
    judgement.budgets["rho"] = float(share.max())
    judgement.wrong |= share > 1
    rows = (variance > 0).any(1) & (expected.tie_sigma == 0).all(1) & finite.all(1)
    if rows.any():
        z2 = (diff**2 / torch.where(variance > 0, variance, math.inf))[rows].mean(1)
        experts = _experts_of_rows(expected, rows)
        _row_statistics(judgement, expected, z2, experts)
        if expected.repeats_roundings:
            _flip_statistics(judgement, expected, diff, rows)
    return judgement


def _row_statistics(judgement: Judgement, expected: Expected, z2: Tensor, experts: dict[int, Tensor]) -> None:
    n, budgets = len(z2), judgement.budgets
    if not expected.repeats_roundings:
        limit = RMS_ALL if n >= 64 else 1.10 + 0.6 / math.sqrt(n)
        budgets["rms"] = float(z2.mean().sqrt()) / limit
        for e, mine in experts.items():
            if len(mine) >= 4:
                used = float(z2[mine].mean().sqrt()) / (1.10 + 0.6 / math.sqrt(len(mine)))
                _keep_worst(judgement, "rms", used, f"rms of expert {e}")
    if expected.repeats_roundings or n >= 32:
        median = float(z2.median().sqrt())
        if n >= 8:
            budgets["median"] = median / MEDIAN_ALL
        for e, mine in experts.items():
            if len(mine) >= (8 if expected.repeats_roundings else 32):
                _keep_worst(
                    judgement, "median", float(z2[mine].median().sqrt()) / MEDIAN_EXPERT, f"median row of expert {e}"
                )


def _keep_worst(judgement: Judgement, name: str, used: float, note: str) -> None:
    if used > judgement.budgets.get(name, 0.0):
        judgement.budgets[name] = used
        if used > 1:
            judgement.notes.append(f"{note}: {used:.2f} of its budget")


def _flip_statistics(judgement: Judgement, expected: Expected, diff: Tensor, rows: Tensor) -> None:
    columns, n = diff.shape[1], int(rows.sum())
    without_flips = expected.variance_without_flips[rows]
    variance = torch.where(without_flips > 0, without_flips, math.inf)
    energy = (diff[rows] ** 2).mean(1) / without_flips.mean(1)
    level = math.log(n / ALPHA)
    disturbed = int((energy > 1 + 2 * math.sqrt(level / columns) + 2 * level / columns).sum())
    predicted = float((1 - torch.exp(-expected.flips[rows])).sum())
    if disturbed > predicted:
        surprise = disturbed * math.log(disturbed / max(predicted, 1e-12)) - disturbed + predicted
        judgement.budgets["count"] = surprise / math.log(1 / ALPHA)
        if surprise > math.log(1 / ALPHA):
            judgement.notes.append(f"{disturbed} of {n} rows disturbed, {predicted:.1f} predicted")
    if expected.rne_accumulator and n >= 16:
        # Row by row and then the median, with the rows' own scatter as noise: a flip bends the slope of its row.
        y = expected.out[rows]
        power = (y**2 / variance).sum(1)
        slopes = ((diff[rows] * y / variance).sum(1) / power)[power > 0]
        if len(slopes):
            middle = slopes.median()
            noise = 1.2533 * 1.4826 * float((slopes - middle).abs().median()) / math.sqrt(len(slopes))
            judgement.budgets["slope"] = abs(float(middle)) / (SLOPE + math.sqrt(2 * math.log(2 / ALPHA)) * noise)


def _bennett(variance: Tensor, max_flip: Tensor, level: float) -> Tensor:
    """Return t with P(|sum| > t) <= 2 exp(-level) for independent errors, none above max_flip = M (Bennett 1962).

    Solves v/M^2 ((1 + x) ln(1 + x) - x) = level for x, t = x v / M, by Newton steps from Bernstein's bound.
    """
    gaussian = (2 * level * variance).sqrt()
    rare = (max_flip > 0) & (variance > 0)
    m = torch.where(rare, max_flip, 1.0)
    v = torch.where(rare, variance, 1.0)
    target = level * m**2 / v
    x = (target / 3 + (target**2 / 9 + 2 * target).sqrt()).clamp(min=1e-12)
    for _ in range(8):
        log = torch.log1p(x)
        x = (x - ((1 + x) * log - x - target) / log).clamp(min=1e-12)
    return torch.where(rare, torch.maximum(x * v / m, gaussian), gaussian)


def _experts_of_rows(expected: Expected, rows: Tensor) -> dict[int, Tensor]:
    """Return, per local expert, the positions among the rows (bool [T]) of the tokens that it serves."""
    place = torch.full((len(rows),), -1, dtype=torch.long, device=rows.device)
    place[rows] = torch.arange(int(rows.sum()), device=rows.device)
    positions = {}
    for e in expected.topk_experts.unique().tolist():
        mine = place[expected.topk_tokens[expected.topk_experts == e].unique()]
        positions[int(e)] = mine[mine >= 0]
    return positions
