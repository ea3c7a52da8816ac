"""Name the bug: a wrong output, compared with the outputs of a bank of wrong oracles (harness/bank).

    equal, bit for bit, to ...                      exact fill: the suspect's output, everywhere
    equal, bit for bit, where it is wrong, to ...   exact fill: and right elsewhere, so the mistake is made only there
    within rounding of ...                          the suspect passes the very judgement that the right oracle failed
    within rounding, in N of T rows, of ...         likewise, the other rows being right
    closest to ...                                  none fits, but one takes most of the error away: a hint, no name

Only a failed output is asked about, so a suspect that is no mistake here (it computes the same) cannot be named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.diagnose.faults import FAULTS, Fault
from harness.inputs.draw import Inputs
from harness.oracle.deviation import Expected
from harness.oracle.judge import Judgement, judge
from harness.oracle.stages import Answer, Oracle, on_cpu
from reference.plan import RoundingPlan

EQUAL, WHERE_WRONG = "equal, bit for bit, to", "equal, bit for bit, where it is wrong, to"
WITHIN, CLOSEST = "within rounding of", "closest to"
SHOWN = 3
MOST_WEIGHTS, MOST_WORK = 2**22, 2**28  #: elements of the layer, and products of one pass, that the bank is asked for
TELLING = 32  #: outputs that must agree before a mistake is believed that is made only in places
#: What must be left of the error (mean square): of a suspect that is judged at all, of one for some rows, of a hint.
LEFT, LEFT_IN_ROWS, LEFT_OF_HINT = 0.5, 0.2, 0.1

Past = list[tuple[Inputs, Tensor]]  #: earlier calls and what they returned, [T, K] float64


@dataclass(frozen=True)
class Match:
    """What a wrong output is like."""

    how: str
    names: tuple[str, ...]  #: the best first
    note: str = ""

    @property
    def cause(self) -> str:
        """The mistake's name, "" where nothing but a hint was found."""
        return "" if self.how == CLOSEST else self.names[0]

    def __str__(self) -> str:
        return f"{self.how}: {self.names[0]}{self.note}"

    def lines(self) -> list[str]:
        return [f"  {'cause' if self.cause else 'hint':<13} {self}", *(f"  {'':<13} or {n}" for n in self.names[1:])]


@dataclass
class _Fit:
    """How well one suspect fits."""

    name: str
    left: float  #: share of the error that it leaves
    rows: int = 0  #: in which it was taken; 0: in all


def affordable(inputs: Inputs) -> bool:
    """Whether the bank can be asked: some 300 answers, each a pass of the oracle on the CPU."""
    p = inputs.case.problem
    rows = p.w13_rows + p.intermediate_size
    experts, pairs = p.local_experts + p.shared_experts, p.tokens * (p.top_k + p.shared_experts)
    return experts * rows * p.hidden_size <= MOST_WEIGHTS and pairs * rows * p.hidden_size <= MOST_WORK


def match(
    judgement: Judgement, inputs: Inputs, plans: Iterable[RoundingPlan], earlier: Past | None = None
) -> Match | None:
    """What the wrong output is like; None if it is like nothing known, right, or too large to ask.

    plans: those that the output was judged under, or may have been; earlier: calls before this one, the last one last.
    """
    assert judgement.got is not None and judgement.wrong is not None and judgement.expected is not None
    if judgement.passed or not affordable(inputs):
        return None
    asked = {**stale(earlier or []), **FAULTS}  # where a call before may explain it, it explains it best
    got = judgement.got.cpu()
    if inputs.case.fill == "exact":
        found = _equal(got, judgement.expected.cpu(), Oracle(inputs), asked)
        if found:
            return found
    hint = None
    for plan in plans:
        found = _close(got, Oracle(inputs, plan), asked)
        if found and found.how != CLOSEST:
            return found
        hint = hint or found
    return hint


def _answers(o: Oracle, asked: dict[str, Fault]) -> Iterator[tuple[str, Answer]]:
    """What the suspects answer. Nothing but NaN says nothing: many mistakes end in it."""
    for suspect, function in asked.items():
        answer = function(o)
        if answer is None:
            continue
        out = answer.stages.out
        if not out.isnan().any() or (torch.isfinite(out) & (out != 0)).any():
            yield suspect, answer


def _equal(got: Tensor, right: Tensor, o: Oracle, asked: dict[str, Fault]) -> Match | None:
    wrong = ~_same(got, right)
    everywhere, places = [], []
    for suspect, answer in _answers(o, asked):
        out = o.stored(answer)
        differs = ~_same(out, right)
        if not differs.any() or not _same(out, got)[wrong].all():
            continue
        if bool((differs == wrong).all()):
            everywhere.append(suspect)
        elif int((torch.isfinite(out) & (out != 0) & wrong).sum()) >= TELLING:
            places.append((suspect, int(wrong.sum()) / int(differs.sum())))
    if everywhere:
        return Match(EQUAL, tuple(everywhere[:SHOWN]))
    if not places:
        return None
    # The fewer outputs a mistake would change elsewhere, the better it says what these have in common.
    most = max(share for _, share in places)
    return Match(WHERE_WRONG, tuple([s for s, share in places if share >= 0.9 * most][:SHOWN]))


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _close(got: Tensor, o: Oracle, asked: dict[str, Fault]) -> Match | None:
    right = o.right.expected()
    variance = right.variance.nan_to_num(posinf=0.0).mean(1, keepdim=True)
    unit = variance.clamp(min=float(variance.mean()) * 1e-6 if len(variance) else 1.0).clamp(min=1e-300)
    base = _error(got, right.out, unit)
    whole, part, hints = [], [], []
    for suspect, answer in _answers(o, asked):
        error = _error(got, answer.stages.out, unit)
        # A row that is NaN is like any other: alone it speaks for no suspect.
        better = (error < base) & ~(answer.stages.out.isnan() & ~right.out.isnan()).any(1)
        left = _share(error.sum(), base.sum())
        mixed = _share(torch.where(better, error, base).sum(), base.sum())
        if left < LEFT and judge(got, answer.expected()).passed:
            whole.append(_Fit(suspect, left))
        elif mixed < LEFT_IN_ROWS and judge(got, _in_rows(better, answer.expected(), right)).passed:
            part.append(_Fit(suspect, mixed, int(better.sum())))
        if left < LEFT_OF_HINT:
            hints.append(_Fit(suspect, left))
    if whole:
        return Match(WITHIN, _best(whole))
    if part:
        best = _best(part)
        rows = next(f.rows for f in part if f.name == best[0])
        return Match(f"within rounding, in {rows} of {len(got)} rows, of", best)
    if hints:
        least = min(hints, key=lambda f: f.left)
        return Match(CLOSEST, (least.name,), f", which explains {1 - least.left:.1%} of the error")
    return None


def _error(got: Tensor, out: Tensor, unit: Tensor) -> Tensor:
    """[T] squared error of every row in units of its variance; infinite where NaN or infinity is out of place."""
    alike = _same(got, out)
    error = torch.where(alike, 0.0, (got - out) ** 2 / unit)
    return error.nan_to_num(nan=float("inf")).sum(1)


def _share(error: Tensor, base: Tensor) -> float:
    return float(error / base) if torch.isfinite(base) else 0.0 if torch.isfinite(error) else 1.0


def _in_rows(rows: Tensor, wrong: Expected, right: Expected) -> Expected:
    """The wrong answer in these rows [T], the right one in the others."""

    def mixed(field: str) -> Tensor:
        a, b = getattr(wrong, field), getattr(right, field)
        return torch.where(rows if a.dim() == 1 else rows[:, None], a, b)

    fields = ("out", "variance", "smooth", "jump", "flips", "either")
    values: dict[str, Any] = {field: mixed(field) for field in fields}
    return replace(right, **values)


def _best(fits: list[_Fit]) -> tuple[str, ...]:
    """Those that leave least, in the bank's order where they leave alike."""
    least = min(f.left for f in fits)
    return tuple([f.name for f in fits if f.left <= 1.1 * least + 1e-12][:SHOWN])


# -- what earlier calls left behind -----------------------------------------------------------------------------------
def stale(earlier: Past) -> dict[str, Fault]:
    """Suspects of a session: what this call would give with something of a call before it."""
    found: dict[str, Fault] = {}
    for n, (past, out) in enumerate(reversed(earlier)):
        when = "the call before" if n == 0 else f"{n + 1} calls before"
        found |= {f"{what} of {when}": function for what, function in _left_by(past, out)}
    return found


#: What may be left of a call, and the layer's tensors that this is; the least first.
LEFTOVERS: dict[str, tuple[str, ...]] = {
    **{f.name: (f.name,) for f in fields(Layer) if f.name != "problem"},
    "the weights": ("w13", "w2"),
    "the scales": ("w13_scale", "w2_scale", "a13_scale", "a2_scale"),
    "the biases": ("w13_bias", "w2_bias"),
    "all the layer's tensors": tuple(f.name for f in fields(Layer) if f.name != "problem"),
    **{what: () for what in ("router weights", "ids", "hidden_states", "the output")},
}


def _left_by(past: Inputs, out: Tensor) -> Iterator[tuple[str, Fault]]:
    old = on_cpu(past.layer)

    def tensors(names: tuple[str, ...]) -> Fault:
        def function(o: Oracle):
            mine = {n: getattr(old, n) for n in names if getattr(old, n) is not None}
            fits = mine and all(_fits(getattr(o.layer, n), t) for n, t in mine.items())
            return o(layer=replace(o.layer, **mine)) if fits else None

        return function

    def argument(name: str, tensor: Tensor) -> Fault:
        inputs: dict[str, Any] = {name: tensor}
        return lambda o: o(**inputs) if tensor.shape == getattr(o, name).shape else None

    def rows(o: Oracle):
        if out.shape[1] != o.x.shape[1]:
            return None
        kept = torch.full_like(o.x, float("nan"))
        kept[: len(out)] = out[: len(kept)]
        return o.resume(out=kept)

    for what, names in LEFTOVERS.items():
        if names:
            yield what, tensors(names)
    before = Oracle(past)
    yield "router weights", argument("weights", before.weights)
    yield "ids", argument("ids", before.ids)
    yield "hidden_states", argument("x", before.x)
    yield "the output", rows


def _fits(mine: Tensor | None, other: Tensor) -> bool:
    return mine is not None and mine.shape == other.shape and mine.dtype == other.dtype
