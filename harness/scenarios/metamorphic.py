"""Metamorphic relations: inputs derived from the case's, whose outputs follow from the output of the first call.

    @relation("token_order")
    def token_order(inputs): ...      # the tokens in another order: the same rows in that order

A relation takes the case's inputs, derives others from them, and says what the first output implies for theirs. The
oracle judges every output as in any scenario; then the outputs are compared with each other, value by value, where
correct kernels must agree (`Related.holds`):

exact   on the exact fill, where nothing rounds, on any path and in any order of summation
path    on any fill, from a deterministic backend: shapes and routing stay, so the same instructions compute with the
        same numbers, or with numbers twice as large, or with numbers that differ only where they must not be read
batch   on any fill, from a backend that declares batch_invariant = True: other rows of the batch come, go or move

Every relation derives exact inputs from exact inputs (inputs/exact_fill.py): it permutes, repeats or leaves out terms
of sums, adds zeros, or doubles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from harness.backend import Layer, Unsupported
from harness.diagnose.explain import explain
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
    """Derived inputs, whose outputs [T, K] (float64, on the CPU), joined, must be what the first output implies."""

    others: dict[str, Inputs]  #: by what was changed, for the report
    implied: Callable[[Tensor], Tensor] = lambda out: out
    joined: Callable[[list[Tensor]], Tensor] = lambda outs: outs[0]
    holds: str = "exact"  #: exact, path or batch: see above
    first: Inputs | None = None  #: instead of the inputs as drawn, with the same layer
    copies: int = 1  #: how often the others' outputs repeat the first's rows
    nan: bool = False  #: whether NaN stands where no kernel may read


Relate = Callable[[Inputs], Related | list[Related]]


def relation(name: str) -> Callable[[Relate], Relate]:
    """Register relate(inputs) as the scenario relation.<name>."""

    def register(relate: Relate) -> Relate:
        @scenario(f"relation.{name}")
        def related(s: Session) -> None:
            inputs = s.draw()
            relations = relate(inputs)
            check_relations(s, name, inputs, relations if isinstance(relations, list) else [relations])

        return relate

    return register


def check_relations(s: Session, name: str, inputs: Inputs, relations: list[Related]) -> None:
    """Call with all inputs, judge every output, and compare the outputs with each other."""
    if any(r.nan for r in relations) and not s.backend.nan_safe:
        raise Unsupported(f"scenario: {s.backend.name} declares that NaN in unused rows or weights reaches its output")
    for other in (other for r in relations for other in r.others.values()):
        if other.backend_layer is not inputs.backend_layer and (reason := s.why_not(other.case.problem)):
            raise Unsupported(reason)
    call = s.prepare(inputs.case.problem, inputs.backend_layer)
    first = relations[0].first or inputs
    first_out = decode(s.check(call, first, "the first question").cpu())
    for r in relations:
        outs = []
        for what, other in r.others.items():
            same_layer = other.backend_layer is inputs.backend_layer
            other_call = call if same_layer else s.prepare(other.case.problem, other.backend_layer)
            outs.append(_output(s, other_call, what, other, first, r.copies))
        if _must_hold(s, r.holds):
            verdict = judge_exact(r.joined(outs), r.implied(first_out))
            if not verdict.passed:
                about = next(iter(r.others.values())) if len(r.others) == 1 else first
                raise Failed(explain(verdict, about, f"{name}: not what the first answer implies"))


def _output(s: Session, call: Callable[..., Tensor], what: str, inputs: Inputs, first: Inputs, copies: int) -> Tensor:
    """The output [T, K], float64 on the CPU, judged. Copies of the first call's rows are judged one by one, as those
    rows: the oracle's statistics take the rows of a batch to be independent."""
    if copies == 1:
        return decode(s.check(call, inputs, what).cpu())
    out, trace = s.call(call, inputs, what)
    s.traces.append(trace)
    for n, part in enumerate(out.chunk(copies)):
        s.accept(part, first, f"{what}, copy {n + 1}")
    return decode(out.cpu())


def _must_hold(s: Session, holds: str) -> bool:
    """Whether correct kernels keep the relation bit for bit on this fill and backend."""
    if s.case.fill == "exact":
        return True
    if not s.backend.deterministic:
        return False
    return holds == "path" or (holds == "batch" and s.backend.batch_invariant is True)


# -- deriving inputs --------------------------------------------------------------------------------------------------


def tokens_of(inputs: Inputs, rows: Tensor) -> Inputs:
    """These tokens of the batch, for the same layer. rows: [n] int64."""
    case = inputs.case.change(tokens=len(rows))
    x = inputs.hidden_states[rows]
    return replace(
        inputs, case=case, hidden_states=padded_rows(x) if case.problem.padded else x,
        topk_weights=inputs.topk_weights[rows], topk_ids=inputs.topk_ids[rows],
    )  # fmt: skip


def other_layer(inputs: Inputs, layer: Layer, changes: dict[str, Any] | None = None, **tensors: Any) -> Inputs:
    """The same call, but for the arguments in `tensors`, of another layer (in layout "nk"). changes: of Problem."""
    case = inputs.case.change(**changes or {})
    layer = replace(layer, problem=case.problem)
    return replace(inputs, case=case, layer=layer, backend_layer=in_layout(layer, case.problem.layout), **tensors)


def refuse(condition: bool, reason: str) -> None:
    """Unsupported where a relation cannot hold. reason: begins with a keyword of backend.UNSUPPORTED."""
    if condition:
        raise Unsupported(reason)


def batch_is_one(problem: Problem) -> bool:
    """Whether rows depend on each other: a dynamic per-tensor scale belongs to the whole batch."""
    return problem.quant is not None and problem.quant.over_rows


def in_batch(problem: Problem) -> str:
    """`Related.holds` of a relation between batches: "exact" where the batch itself has a scale."""
    return "exact" if batch_is_one(problem) else "batch"
