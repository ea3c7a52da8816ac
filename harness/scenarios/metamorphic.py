"""Metamorphic relations, and how they are held: questions whose answers follow from the answer to another.

    @relation("token_order")
    def token_order(given): ...      # the tokens in another order: the same rows in that order

A relation draws the case, makes other questions of it and says what the first answer implies for theirs. Every answer
is judged by the oracle as any other; then the answers are held against each other, value by value, as far as correct
kernels owe that (`Related.holds`):

exact   on the exact fill, where nothing rounds, on any path and in any order of summation
path    on any fill, from a deterministic backend: shapes and routing stay, so the same instructions meet the same
        numbers, or numbers that are twice as large, or differ only where nobody may look
batch   on any fill, from a backend that declares batch_invariant = True: other rows of the batch come, go or move

Every relation leads from an exact problem to an exact problem (inputs/exact_fill.py): it permutes, repeats or leaves
out terms of sums, adds zeros, or doubles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from harness.backend import Layer, Unsupported
from harness.diagnose import error_map, explain
from harness.diagnose.failure import Failed
from harness.inputs.draw import Inputs, in_layout
from harness.inputs.reshape import padded_rows
from harness.oracle.judge import judge_exact
from harness.problem.case import Problem
from harness.scenarios.registry import scenario
from harness.session.session import Session
from reference.formats import decode


@dataclass
class Related:
    """`others`, whose answers [T, K] (float64, on the CPU), joined, must be what the answer to `first` implies."""

    others: list[Inputs]
    implied: Callable[[Tensor], Tensor] = lambda answer: answer
    joined: Callable[[list[Tensor]], Tensor] = lambda answers: answers[0]
    holds: str = "exact"  #: exact, path or batch: see above
    first: Inputs | None = None  #: instead of the inputs as drawn, with the same layer
    copies: int = 1  #: how often the others' answers repeat the first's rows
    nan: bool = False  #: whether NaN stands where nobody may look


def relation(name: str) -> Callable:
    """Registers relate(given) -> Related, or a list of them, as the scenario relation.<name>."""

    def register(relate: Callable[[Inputs], Related | list[Related]]) -> Callable:
        @scenario(f"relation.{name}")
        def related(s: Session) -> None:
            inputs = s.draw()
            found = relate(inputs)
            hold(s, name, inputs, found if isinstance(found, list) else [found])

        return relate

    return register


def hold(s: Session, name: str, inputs: Inputs, relations: list[Related]) -> None:
    """Ask everything, judge everything, and hold the answers against each other."""
    if any(r.nan for r in relations) and not getattr(s.backend, "nan_safe", True):
        raise Unsupported(f"scenario: {s.backend.name} declares that it multiplies by zero what nobody asks for")
    for asked in (q for r in relations for q in r.others if q.backend_layer is not inputs.backend_layer):
        if reason := s.why_not(asked.case.problem):
            raise Unsupported(reason)
    call = s.prepare(inputs.case.problem, inputs.backend_layer)
    first = relations[0].first or inputs
    answer = decode(s.check(call, first, "the first question").cpu())
    for r in relations:
        answers = []
        for asked in r.others:
            same_layer = asked.backend_layer is inputs.backend_layer
            again = call if same_layer else s.prepare(asked.case.problem, asked.backend_layer)
            answers.append(_answer(s, again, asked, first, r.copies))
        if _owed(s, r.holds):
            verdict = judge_exact(r.joined(answers), r.implied(answer))
            if not verdict.passed:
                about = r.others[0] if len(r.others) == 1 else first
                words = explain.explain(verdict, about, f"{name}: not what the first answer implies")
                raise Failed(*words, error_map.of(verdict, about))


def _answer(s: Session, call: Callable, asked: Inputs, first: Inputs, copies: int) -> Tensor:
    """[T, K] float64 on the CPU, judged. Copies of the first question's rows are judged by themselves, as those rows:
    the oracle's statistics take the rows of a batch to be independent."""
    if copies == 1:
        return decode(s.check(call, asked, asked.variant).cpu())
    out, trace = s.call(call, asked, asked.variant)
    s.traces.append(trace)
    for n, part in enumerate(out.chunk(copies)):
        s.accept(part, first, f"{asked.variant}, copy {n + 1}")
    return decode(out.cpu())


def _owed(s: Session, holds: str) -> bool:
    """Whether correct kernels owe the relation bit for bit here."""
    if s.case.fill == "exact":
        return True
    if getattr(s.backend, "deterministic", True) is not True:
        return False
    return holds == "path" or (holds == "batch" and getattr(s.backend, "batch_invariant", False) is True)


# -- making other questions of one ------------------------------------------------------------------------------------


def tokens_of(inputs: Inputs, variant: str, rows: Tensor) -> Inputs:
    """The same layer asked about these tokens of the batch."""
    case = inputs.case.change(tokens=len(rows))
    x = inputs.hidden_states[rows]
    return replace(
        inputs, case=case, hidden_states=padded_rows(x) if case.problem.padded else x,
        topk_weights=inputs.topk_weights[rows], topk_ids=inputs.topk_ids[rows], variant=variant,
    )  # fmt: skip


def other_layer(
    inputs: Inputs, variant: str, layer: Layer, changes: dict[str, Any] | None = None, **tensors: Any
) -> Inputs:
    """Another layer (in layout "nk"), with changes of fields of Problem, asked about the same tokens or `tensors`."""
    case = inputs.case.change(**changes or {})
    layer = replace(layer, problem=case.problem)
    handed = in_layout(layer, case.problem.layout)
    return replace(inputs, case=case, layer=layer, backend_layer=handed, variant=variant, **tensors)


def refuse(condition: bool, reason: str) -> None:
    """Where a relation does not hold by its nature; reason begins with a keyword of backend.UNSUPPORTED."""
    if condition:
        raise Unsupported(reason)


def batch_is_one(problem: Problem) -> bool:
    """Whether rows depend on each other: a dynamic per-tensor scale belongs to the whole batch."""
    return problem.quant is not None and problem.quant.activation == "tensor"


def in_batch(problem: Problem) -> str:
    """What a relation between batches holds by: not by the batch, where the batch itself has a scale."""
    return "exact" if batch_is_one(problem) else "batch"
