"""Name the bug: compare a wrong output with the outputs of the bank of faults (faults/).

    equal, bit for bit, to ...                      exact fill: the fault's output, everywhere
    equal, bit for bit, where it is wrong, to ...   exact fill: right elsewhere, so the mistake is made in places only
    within rounding of ...                          the fault passes the judgement that the right oracle failed
    within rounding, in N of T rows, of ...         likewise, the other rows being right
    closest to ...                                  no fault fits, but one explains most of the error: a hint, no name

Only failed outputs are compared: a fault that makes no difference here computes the right output, and cannot be named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.diagnose.faults import FAULTS, Fault, with_text
from harness.diagnose.faults.leftovers import Past, leftover_with_text, leftovers
from harness.inputs.draw import Inputs
from harness.oracle.deviation import Expected
from harness.oracle.judge import Judgement, judge
from harness.oracle.stages import Answer, Oracle
from reference.plan import RoundingPlan

EQUAL, WHERE_WRONG = "equal, bit for bit, to", "equal, bit for bit, where it is wrong, to"
WITHIN, CLOSEST = "within rounding of", "closest to"
SHOWN = 3  #: faults that a match lists at most
#: The largest problem that the bank is compared with: elements of the layer, and products of one pass.
MOST_WEIGHTS, MOST_WORK = 2**22, 2**28
TELLING = 32  #: wrong outputs that must agree with a fault that is made in places only
#: Shares of the error (mean square) that a fault may leave: to be judged at all, to be judged in some rows, for a hint.
LEFT, LEFT_IN_ROWS, LEFT_OF_HINT = 0.5, 0.2, 0.1


@dataclass(frozen=True)
class Match:
    """The faults whose outputs a wrong output resembles."""

    how: str
    faults: tuple[Fault, ...]  #: the best first
    note: str = ""

    @property
    def hint(self) -> bool:
        """Whether no fault fits: the first one explains most of the error."""
        return self.how == CLOSEST

    @property
    def cause(self) -> str:
        """The text of the first fault, "" for a hint."""
        return "" if self.hint else self.faults[0].text

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The texts of the faults with the same output as the first one here."""
        return tuple(f.text for f in self.faults[1:])

    def __str__(self) -> str:
        return f"{self.how}: {self.faults[0].text}{self.note}"


@dataclass
class _Fit:
    """How well one fault fits."""

    fault: Fault
    left: float  #: share of the error that it leaves
    rows: int = 0  #: rows in which it is assumed; 0: all


def affordable(inputs: Inputs) -> bool:
    """Whether the problem is small enough for the bank: some 300 passes of the oracle on the CPU."""
    p = inputs.case.problem
    rows = p.w13_rows + p.intermediate_size
    experts, pairs = p.local_experts + p.shared_experts, p.tokens * (p.top_k + p.shared_experts)
    return experts * rows * p.hidden_size <= MOST_WEIGHTS and pairs * rows * p.hidden_size <= MOST_WORK


def match(
    judgement: Judgement, inputs: Inputs, plans: Iterable[RoundingPlan], past: Past | None = None
) -> Match | None:
    """The faults that a wrong output resembles; None if there are none, the output passed, or the problem is too large.

    plans: the rounding plans that the output was judged under, or may follow; past: the calls before this one.
    """
    assert judgement.got is not None and judgement.wrong is not None and judgement.expected is not None
    if judgement.passed or not affordable(inputs):
        return None
    # A leftover comes first: where the bank has a fault with the same output, the leftover explains it better.
    faults = [*leftovers(past or []).values(), *FAULTS.values()]
    got = judgement.got.cpu()
    if inputs.case.fill == "exact":
        equal = _equal(got, judgement.expected.cpu(), Oracle(inputs), faults)
        if equal:
            return equal
    hint = None
    for plan in plans:
        close = _close(got, Oracle(inputs, plan), faults)
        if close and not close.hint:
            return close
        hint = hint or close
    return hint


def _answers(o: Oracle, faults: Iterable[Fault]) -> Iterator[tuple[Fault, Answer]]:
    """The answers of the faults. Skips outputs of NaN and zeros alone: many mistakes end in them."""
    for fault in faults:
        answer = fault(o)
        if answer is None:
            continue
        out = answer.stages.out
        if not out.isnan().any() or (torch.isfinite(out) & (out != 0)).any():
            yield fault, answer


def _equal(got: Tensor, right: Tensor, o: Oracle, faults: Iterable[Fault]) -> Match | None:
    wrong = ~_same(got, right)
    everywhere, places = [], []
    for fault, answer in _answers(o, faults):
        out = o.stored(answer)
        differs = ~_same(out, right)
        if not differs.any() or not _same(out, got)[wrong].all():
            continue
        if bool((differs == wrong).all()):
            everywhere.append(fault)
        elif int((torch.isfinite(out) & (out != 0) & wrong).sum()) >= TELLING:
            places.append((fault, int(wrong.sum()) / int(differs.sum())))
    if everywhere:
        return Match(EQUAL, tuple(everywhere[:SHOWN]))
    if not places:
        return None
    # The fewer right outputs a fault would change, the better it describes the wrong ones.
    most = max(share for _, share in places)
    return Match(WHERE_WRONG, tuple([f for f, share in places if share >= 0.9 * most][:SHOWN]))


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _close(got: Tensor, o: Oracle, faults: Iterable[Fault]) -> Match | None:
    right = o.right.expected()
    variance = right.variance.nan_to_num(posinf=0.0).mean(1, keepdim=True)
    unit = variance.clamp(min=float(variance.mean()) * 1e-6 if len(variance) else 1.0).clamp(min=1e-300)
    base = _error(got, right.out, unit)
    whole, part, hints = [], [], []
    for fault, answer in _answers(o, faults):
        error = _error(got, answer.stages.out, unit)
        # Any row of NaN resembles any other: alone it is no evidence for a fault.
        better = (error < base) & ~(answer.stages.out.isnan() & ~right.out.isnan()).any(1)
        left = _share(error.sum(), base.sum())
        mixed = _share(torch.where(better, error, base).sum(), base.sum())
        if left < LEFT and judge(got, answer.expected()).passed:
            whole.append(_Fit(fault, left))
        elif mixed < LEFT_IN_ROWS and judge(got, _in_rows(better, answer.expected(), right)).passed:
            part.append(_Fit(fault, mixed, int(better.sum())))
        if left < LEFT_OF_HINT:
            hints.append(_Fit(fault, left))
    if whole:
        return Match(WITHIN, _best(whole))
    if part:
        best = _best(part)
        rows = next(f.rows for f in part if f.fault is best[0])
        return Match(f"within rounding, in {rows} of {len(got)} rows, of", best)
    if hints:
        least = min(hints, key=lambda f: f.left)
        return Match(CLOSEST, (least.fault,), f", which explains {1 - least.left:.1%} of the error")
    return None


def _error(got: Tensor, out: Tensor, unit: Tensor) -> Tensor:
    """[T] squared error of every row in units of its variance; infinite where one of two is NaN or infinite alone."""
    alike = _same(got, out)
    error = torch.where(alike, 0.0, (got - out) ** 2 / unit)
    return error.nan_to_num(nan=float("inf")).sum(1)


def _share(error: Tensor, base: Tensor) -> float:
    return float(error / base) if torch.isfinite(base) else 0.0 if torch.isfinite(error) else 1.0


def _in_rows(rows: Tensor, wrong: Expected, right: Expected) -> Expected:
    """The wrong answer in the rows [T] bool, the right one in the others."""

    def mixed(field: str) -> Tensor:
        a, b = getattr(wrong, field), getattr(right, field)
        return torch.where(rows if a.dim() == 1 else rows[:, None], a, b)

    fields = ("out", "variance", "variance_without_flips", "max_flip", "flips", "tie_sigma")
    values: dict[str, Any] = {field: mixed(field) for field in fields}
    return replace(right, **values)


def _best(fits: list[_Fit]) -> tuple[Fault, ...]:
    """The faults that leave the least error, in the order of the bank where they leave the same."""
    least = min(f.left for f in fits)
    return tuple([f.fault for f in fits if f.left <= 1.1 * least + 1e-12][:SHOWN])


def fault_id(text: str) -> str | None:
    """The id of the fault with this text, leftovers of earlier calls included; None if there is none."""
    fault = with_text(text)
    return fault.id if fault else leftover_with_text(text)
