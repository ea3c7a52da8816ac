"""Stateful model checking: random sequences of calls, swaps, conversions and errors, shrunk to the shortest that fails.

A sequence is a tuple of steps (steps.py). They change the prepared layers of a `World`; the oracle is the
model, and every good call is judged. Each sequence ends with one call of every layer that it touched. What a backend
declares not to do, or not to follow, is never picked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import BackendError, Unsupported
from harness.base.minimal import find_minimal, missing, pick
from harness.device import DeviceLost
from harness.diagnose.failure import Failed
from harness.inputs.draw import Inputs
from harness.problem.case import ROUTINGS, DescriptorError
from harness.scenarios import bad_input
from harness.scenarios.registry import SCENARIOS, scenario
from harness.scenarios.stateful.state import PARTS, SAME_SHAPES, State
from harness.scenarios.stateful.steps import Activate, Call, Configure, Fault, NaN, Part, Poison, Prepare, Swap
from harness.session.session import Session

EXAMPLES, STEPS, SHRINKS = 5, 20, 150  #: sequences a case, steps a sequence at most, sequences to shrink one with
#: Whole swaps by the kind of change that a backend must follow for them (scenarios/weight_swap.py).
SWAPS = {
    "copy_": "in_place", "data_copy_": "in_place", "inference_mode": "in_place", "data": "rebinding",
    "parameter": "rebinding", "same_address": "rebinding", "offload": "rebinding",
}  # fmt: skip
BY = {"copy_": "in_place", "assignment": "rebinding"}


class Crashed(Exception):
    """A sequence that ended in an exception, which is the cause; the message lists the steps."""


# -- what is picked from ----------------------------------------------------------------------------------------------
#: As often as they stand here; a failing sequence shrinks towards the first.
KINDS = (Call, Call, Call, Swap, Swap, Part, Configure, Activate, Prepare, NaN, Fault, Poison)


def options(s: Session) -> dict[str, list[Any]]:
    """What the fields of a step may be for this backend and case."""
    case, problem = s.case, s.case.problem
    inputs = s.draw()
    follows = getattr(s.backend, "follows", {"in_place", "rebinding", "config"})

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
    scratch = [17, problem.tokens, 40] if hasattr(s.backend, "make_scratch") else []
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
        "room": [None, *scratch],
        "scratch": scratch,
        "fault": list(_faults(inputs)) if "errors" in getattr(s.backend, "promises", ()) else [],
    }


def _faults(inputs: Inputs) -> Iterator[str]:
    """The faults that are any for these inputs."""
    problem = inputs.case.problem
    harmless = {"ids_tokens"} if problem.tokens == 0 else set()
    harmless |= {"weight_on_input_top_k"} if problem.top_k == 1 else set()
    for name in (name.removeprefix("error.") for name in SCENARIOS if name.startswith("error.")):
        x = inputs.hidden_states
        bad = bad_input.Call(
            x, inputs.topk_weights, inputs.topk_ids, torch.empty_like(x), replace(inputs.backend_layer)
        )
        try:
            getattr(bad_input, name)(bad)
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
    # In halves: Hypothesis draws lists of five on average, and deletes from two as well as from one.
    return strategies.tuples(half, half).map(lambda halves: (*halves[0], *halves[1]))


@scenario("sequence.calls")
def calls(s: Session) -> None:
    """Random sequences of everything that may happen to a layer; the seed is the case's."""
    if reason := missing():
        raise Unsupported(f"package: {reason}")

    quick = _unexplained(s)

    def ask(sequence: tuple[Any, ...]) -> Failed | Crashed | None:
        return _failure(State(quick), sequence)

    found = find_minimal(steps(s), ask, seed=s.case.seed, examples=EXAMPLES, shrinks=SHRINKS)
    if found is not None:
        raise _failure(State(s), found[0]) or _once_only(found[1])


def _failure(world: State, sequence: tuple[Any, ...]) -> Failed | Crashed | None:
    """What the first step that goes wrong tells, and the steps up to it."""
    done: list[str] = []
    try:
        for step in _and_last_calls(world, sequence):
            done.append(str(step))
            step.take(world)
    except Failed as failure:
        summary = f"{_after(done)}: {failure.summary}"
        report = "\n".join([summary, "", _listed(done), "", failure.report])
        return Failed(summary, report, failure.error_map)
    except (Unsupported, DeviceLost, BackendError):
        raise
    except Exception as error:  # whatever a kernel raises: it is the verdict of the shortest sequence
        crash = Crashed(f"{_after(done)}: {type(error).__name__}: {error}\n{_listed(done)}")
        crash.__cause__ = error
        return crash
    return None


def _and_last_calls(world: State, sequence: tuple[Any, ...]) -> Iterator[Any]:
    """The steps, and then a call of every layer that they touched."""
    yield from sequence
    problem = world.s.case.problem
    for layer in sorted(world.layers) or [0]:
        yield Call(layer, problem.tokens, problem.routing, problem.ids, problem.padded, True, False)


def _once_only(failure: Exception) -> Failed:
    told = f"a sequence that failed, and was right when it was played again: {str(failure).splitlines()[0]}"
    return Failed(told, f"{told}\n{getattr(failure, 'report', failure)}")


def _unexplained(s: Session) -> Session:
    """The same session, in which a failure is not explained: while a sequence is shrunk nobody reads it."""
    quick = copy.copy(s)

    def accept(out: Tensor, inputs: Inputs, what: str = "", call: Any = None) -> None:
        if not s.judged(out, inputs).passed:
            raise Failed("wrong", "wrong")
        s.accept(out, inputs, what, call)

    quick.accept = accept  # type: ignore[method-assign]
    return quick


def _after(done: list[str]) -> str:
    return "after 1 step" if len(done) == 1 else f"after {len(done)} steps"


def _listed(done: list[str]) -> str:
    lines = [f"  {n:2}  {step}" for n, step in enumerate(done, 1)]
    return "\n".join(["  the sequence; its last step failed", *lines])
