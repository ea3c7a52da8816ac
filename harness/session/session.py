"""One case on one backend: poison, call, compare, verdict.

    case -> inputs -> backend.prepare -> call into fenced, poisoned memory -> judged against the oracle -> Verdict

`Session` is what a scenario (scenarios/registry.py) works with: it draws inputs, prepares the backend and checks calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness import backend as backends
from harness.backend import Layer
from harness.device import Device
from harness.diagnose import failure
from harness.diagnose.failure import Failed
from harness.diagnose.match import Past
from harness.inputs.draw import Inputs
from harness.oracle.deviation import expect
from harness.oracle.experts import exact_output
from harness.oracle.judge import Judgement, judge, judge_exact
from harness.problem.case import Case, Problem
from harness.results.verdict import Verdict
from harness.session.applies import why_not
from harness.session.oracle_cache import _drawn, _place, _remembered, _with_own_layer
from harness.trace import fence
from harness.trace.bits import digest, same_bits
from harness.trace.tracing import Trace, Tracing
from reference.formats import decode
from reference.moe import local_experts
from reference.plan import RoundingPlan, parse_plan, undeclared_plans

#: Called with every output that is judged, its inputs and the judgement.
Observer = Callable[[Tensor, Inputs, Judgement], None]


class Session:
    """One backend under one case. Every `check` judges one call; the first that fails ends the case."""

    def __init__(self, case: Case, backend: Any, device: Device, observers: Iterable[Observer] = ()) -> None:
        self.case, self.backend, self.device, self.observers = case, backend, device, tuple(observers)
        self.judgements: list[Judgement] = []
        self.doubts: list[str] = []
        self.traces: list[Trace] = []
        self.past: Past = []
        self.widest_offset: int | None = None  #: elements that a 32-bit offset must not reach (trace/sanitizer.py)

    # -- what scenarios use -------------------------------------------------------------------------------------------
    def draw(self, **changes: Any) -> Inputs:
        """The case's inputs on the device, with other values for fields of Problem or Case. The layer is a copy of
        its own, so that a scenario may write to it."""
        case = self.case.change(scenario="once", **changes)
        drawn = _drawn(case, _place(case.problem, self.device), self.device.torch)
        if self.case.scenario == "once":
            return drawn
        return _with_own_layer(drawn)

    def prepare(self, problem: Problem, layer: Layer, **options: Any) -> Callable[..., Tensor]:
        """What a serving engine would keep for this layer."""
        return self.backend.prepare(problem, layer, **options)

    def check(self, call: Callable[..., Tensor], inputs: Inputs, what: str = "") -> Tensor:
        """Call and judge; returns the output. Failed, with a report, if anything is wrong."""
        out, trace = self.call(call, inputs, what)
        self.traces.append(trace)
        self.accept(out, inputs, what, call)
        return out

    def accept(self, out: Tensor, inputs: Inputs, what: str = "", call: Callable[..., Tensor] | None = None) -> None:
        """Judge an output that a scenario got by itself. call: what can be called again, to see its stages."""
        judgement = self.judged(out, inputs)
        self.judgements.append(judgement)
        for watch in self.observers:
            watch(out, inputs, judgement)
        if not judgement.passed:
            plans = self.plans(inputs.case.problem)
            raise failure.failure(self.backend, plans, judgement, inputs, what, call, self.past)
        self.past = failure.remember(self.past, inputs, judgement)
        if doubt := _doubt(judgement, inputs):
            self.doubts.append(doubt)

    def why_not(self, problem: Problem) -> str | None:
        """None, or why this backend cannot be asked about another problem."""
        return why_not(replace(self.case, problem=problem), self.backend, self.device)

    def require(self, condition: bool, message: str) -> None:
        """A property other than the output's values."""
        if not condition:
            raise Failed(message, message)

    # -- one call -----------------------------------------------------------------------------------------------------
    def call(self, call: Callable[..., Tensor], inputs: Inputs, what: str = "") -> tuple[Tensor, Trace]:
        """One call into poisoned, fenced memory, from fenced inputs. Inputs and weights must be what they were."""
        where = f" ({what})" if what else ""
        handed = {name: t if fence.fences(t) else fence.keep(t) for name, t in inputs.arguments().items()}
        x = inputs.hidden_states
        tracing = Tracing()
        out = tracing.trace.fenced(torch.empty(x.shape, dtype=x.dtype, device=x.device), "out")
        for name, tensor in {**handed, **inputs.backend_layer.tensors()}.items():
            tracing.trace.watch(tensor, name)
        before = {name: t.clone() for name, t in handed.items()}
        digests = {name: digest(t) for name, t in inputs.backend_layer.tensors().items()}
        keywords = {"out": out} if backends.takes_out(call) else {}
        with self._guarding(tracing.trace) as faults, tracing as trace:
            result = call(*handed.values(), **keywords)
        self.device.synchronize()
        self.require(not faults, f"{'; '.join(map(str, faults))}{where}")
        self.require(isinstance(result, Tensor), f"returned {type(result).__name__}, not a tensor{where}")
        shape = f"{tuple(result.shape)} {result.dtype} on {result.device}"
        wanted = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        self.require(shape == wanted, f"returned {shape}; it must be {wanted}{where}")
        overrun = trace.overrun()
        self.require(not overrun, f"wrote outside of {overrun}: a canary next to it changed{where}")
        for name, old in before.items():
            self.require(same_bits(old, handed[name]), f"{name} was changed by the call{where}")
        changed = [name for name, t in inputs.backend_layer.tensors().items() if digest(t) != digests[name]]
        self.require(not changed, f"the layer's {', '.join(changed)} was changed by the call{where}")
        return result, trace

    def _guarding(self, trace: Trace) -> AbstractContextManager[list[Any]]:
        """What interpreted kernels do to memory while it is open: the faults that are found."""
        if not (getattr(self.backend, "interpreted", False) and self.device.interprets_triton):
            return nullcontext([])
        from harness.trace import sanitizer

        return sanitizer.guarding(trace, self.widest_offset)

    def judged(self, out: Tensor, inputs: Inputs) -> Judgement:
        """The judgement of one output, under the admissible plan that fits best."""
        place = _place(inputs.case.problem, self.device)
        got = decode(out.to(place))
        if inputs.case.fill == "exact":
            return judge_exact(got, _remembered((inputs, "exact", place), partial(exact_output, inputs, place)))
        best = None
        for plan in self.plans(inputs.case.problem):
            found = judge(got, _remembered((inputs, plan, place), partial(expect, inputs, plan, place)))
            if best is None or found.budget < best.budget:
                best = found
            if found.passed:
                break
        assert best is not None
        return best

    def plans(self, problem: Problem) -> list[RoundingPlan]:
        """The backend's declared plans, also with this device's imprecise accumulator where it has one."""
        declared = self.backend.plans(problem) if hasattr(self.backend, "plans") else undeclared_plans()
        plans = [parse_plan(p) for p in declared]
        imprecise = self.device.accumulator("e4m3")
        if problem.quant and problem.quant.activation and imprecise.bits is not None:
            # Which instruction a tile size leads to is the compiler's choice: the exact sum is tried first.
            plans += [replace(p, accumulator=imprecise) for p in plans if p.quantizes_activations]
        return plans

    def fill_in(self, verdict: Verdict) -> None:
        """What the verdict says about the calls that were judged."""
        verdict.calls = len(self.judgements)
        if self.judgements:
            worst = max(self.judgements, key=lambda j: j.budget)
            verdict.budget, verdict.statistic, verdict.plan = worst.budget, worst.worst, worst.plan
            for judgement in self.judgements:
                for name, used in judgement.budgets.items():
                    verdict.budgets[name] = max(used, verdict.budgets.get(name, 0.0))
        if self.traces:
            verdict.trace = self.traces[-1].summary()


def _doubt(judgement: Judgement, inputs: Inputs) -> str | None:
    """Why a match proves little, if it does: of the rows that are served, too few outputs stand out of the noise."""
    expected = judgement.expected
    if expected is None or not expected.numel():
        return "there is no output to compare"
    local = local_experts(inputs.topk_ids, inputs.case.problem.num_experts, inputs.layer.expert_map)
    served = (local >= 0).any(1).to(expected.device)
    if not served.any() and not inputs.case.problem.shared_experts:
        return "no token meets an expert: only zeros are compared"
    telling = torch.isfinite(expected) & (expected != 0)
    if judgement.sigma is not None:
        telling &= expected.abs() > 4 * judgement.sigma
    rows = served & torch.isfinite(expected).all(1) | (inputs.case.problem.shared_experts > 0)
    share = float(telling[rows].double().mean()) if rows.any() else 0.0
    return None if share >= 0.3 else f"only {share:.0%} of the outputs are large enough to tell right from wrong"
