"""Stateful model checking: random sequences of calls, swaps, conversions and errors, shrunk to the shortest that fails.

A sequence is a tuple of steps (steps.py), which change the prepared layers of a `State`. The oracle is the model, and
every good call is judged. Each sequence ends with one call of every layer that it used. Steps that a backend declares
not to support, or not to follow, are never picked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from harness.backend import BackendError, Unsupported
from harness.base.minimal import find_minimal, missing, pick
from harness.base.raised import describe_error
from harness.device import DeviceLost
from harness.diagnose.failure import Failed
from harness.diagnose.report import Report
from harness.inputs.draw import Inputs
from harness.problem.case import ROUTINGS, DescriptorError
from harness.scenarios import bad_input
from harness.scenarios.registry import scenario
from harness.scenarios.stateful.state import PARTS, SAME_SHAPES, State
from harness.scenarios.stateful.steps import Activate, BadArgument, Call, Configure, NaN, Part, Poison, Prepare, Swap
from harness.session.session import Session

EXAMPLES, STEPS, SHRINKS = 5, 20, 150  #: sequences a case, steps a sequence at most, sequences to shrink a failure
#: Swaps of all weights, by the kind of change that the backend must follow (scenarios/weight_swap.py).
SWAPS = {
    "copy_": "in_place", "data_copy_": "in_place", "inference_mode": "in_place", "data": "rebinding",
    "parameter": "rebinding", "same_address": "rebinding", "offload": "rebinding",
}  # fmt: skip
BY = {"copy_": "in_place", "assignment": "rebinding"}


class Crashed(Exception):
    """A sequence that ended in an exception, which is the cause; the message lists the steps."""


# -- the steps to pick from -------------------------------------------------------------------------------------------
#: Each is picked as often as it is listed; a failing sequence shrinks towards the first.
KINDS = (Call, Call, Call, Swap, Swap, Part, Configure, Activate, Prepare, NaN, BadArgument, Poison)


def options(s: Session) -> dict[str, list[Any]]:
    """The values of each field of a step, for this backend and case."""
    case, problem = s.case, s.case.problem
    inputs = s.draw()
    follows = s.backend.follows

    def possible(**changes: Any) -> bool:
        try:
            return s.why_not(replace(problem, **changes)) is None
        except DescriptorError:  # no such Problem
            return False

    tokens = dict.fromkeys((problem.tokens, 1, 2, 3, 0, problem.tokens + 1, 17, 2 * problem.tokens + 1))
    settings = {
        "dtype": "fp16" if problem.dtype == "bf16" else "bf16", "num_experts": 2 * problem.num_experts,
        "top_k": problem.top_k + 1, "activation": "gelu" if problem.activation == "relu2" else "relu2",
        "layout": "kn" if problem.layout == "nk" else "nk",
    }  # fmt: skip
    scratch = [17, problem.tokens, 40] if s.backend.make_scratch else []
    return {
        "layer": [0, 0, 1],
        "tokens": [n for n in tokens if possible(tokens=n)],
        "routing": [r for r in dict.fromkeys((problem.routing, *ROUTINGS)) if possible(routing=r)],
        "ids": [problem.ids, 32 if problem.ids == 64 else 64],
        "padded": [problem.padded, not problem.padded],
        "out": [True, False],
        "twice": [False, False, True],
        "swap": [name for name, kind in SWAPS.items() if kind in follows],
        "seed": [case.seed + n for n in (1, 2, 0)],
        "part": [name for name in PARTS if getattr(inputs.backend_layer, name) is not None],
        "by": [name for name, kind in BY.items() if kind in follows],
        "setting": [(k, v) for k, v in settings.items() if "config" in follows and possible(**{k: v})],
        "activation": [a for a in SAME_SHAPES if "config" in follows and possible(activation=a)],
        "layout": ["same", "other"] if possible(layout=settings["layout"]) else ["same"],
        "capacity": [None, *scratch],
        "scratch": scratch,
        "fault": list(_faults(inputs)) if "errors" in s.backend.promises else [],
    }


def _faults(inputs: Inputs) -> Iterator[str]:
    """The names of the faults (scenarios/bad_input.py) that make a call of these inputs wrong."""
    problem = inputs.case.problem
    harmless = {"ids_tokens"} if problem.tokens == 0 else set()
    harmless |= {"weight_on_input_top_k"} if problem.top_k == 1 else set()
    for name, fault in bad_input.FAULTS.items():
        x = inputs.hidden_states
        bad = bad_input.BadCall(
            x, inputs.topk_weights, inputs.topk_ids, torch.empty_like(x), replace(inputs.backend_layer)
        )
        try:
            fault.spoil(bad)
        except Unsupported:
            continue
        if name not in harmless:
            yield name


def steps(s: Session) -> Any:
    """The strategy of sequences for this backend and case."""
    from hypothesis import strategies

    picked = options(s)
    kinds = [kind for kind in KINDS if all(picked[f.name] for f in fields(kind))]
    each = {kind: strategies.builds(kind, **{f.name: pick(picked[f.name]) for f in fields(kind)}) for kind in kinds}
    half = strategies.lists(pick(kinds).flatmap(each.__getitem__), max_size=STEPS // 2)
    # Two halves: Hypothesis draws lists of five on average, and deletes from two lists as well as from one.
    return strategies.tuples(half, half).map(lambda halves: (*halves[0], *halves[1]))


@scenario("sequence.calls")
def calls(s: Session) -> None:
    """Random sequences of calls and of changes of a layer; the seed is the case's."""
    if reason := missing():
        raise Unsupported(f"package: {reason}")

    def ask(sequence: tuple[Any, ...]) -> Failed | Crashed | None:
        return _failure(State(s), sequence)

    s.explain = False  # while a sequence is shrunk, only whether it fails counts
    smallest = find_minimal(steps(s), ask, seed=s.case.seed, examples=EXAMPLES, shrinks=SHRINKS)
    s.explain = True
    if smallest is not None:
        sequence, failure = smallest
        raise _failure(State(s), sequence) or _not_reproduced(failure)


def _failure(state: State, sequence: tuple[Any, ...]) -> Failed | Crashed | None:
    """Apply the steps; the failure of the first one that fails, with the list of steps up to it."""
    done: list[str] = []
    try:
        for step in _and_last_calls(state, sequence):
            done.append(str(step))
            step.apply(state)
    except Failed as failure:
        report = failure.report
        details = ["", *_listed(done).splitlines(), "", *report.lines()]
        return Failed(Report(f"{_after(done)}: {report.summary}", details=details, error_map=report.error_map))
    except (Unsupported, DeviceLost, BackendError, KeyboardInterrupt):
        raise
    except BaseException as error:  # any exception of a kernel is the verdict of the shortest sequence
        crash = Crashed(f"{_after(done)}: {describe_error(error)}\n{_listed(done)}")
        crash.__cause__ = error
        return crash
    return None


def _and_last_calls(state: State, sequence: tuple[Any, ...]) -> Iterator[Any]:
    """The steps, and then a call of every layer that they used."""
    yield from sequence
    problem = state.s.case.problem
    for layer in sorted(state.layers) or [0]:
        yield Call(layer, problem.tokens, problem.routing, problem.ids, problem.padded, True, False)


def _not_reproduced(failure: Exception) -> Failed:
    summary = f"a sequence that failed, and was right when it was played again: {str(failure).splitlines()[0]}"
    return Failed(Report(summary, details=str(getattr(failure, "report", failure)).splitlines()))


def _after(done: list[str]) -> str:
    return "after 1 step" if len(done) == 1 else f"after {len(done)} steps"


def _listed(done: list[str]) -> str:
    lines = [f"  {n:2}  {step}" for n, step in enumerate(done, 1)]
    return "\n".join(["  the sequence; its last step failed", *lines])
