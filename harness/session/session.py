"""`Session`, what a scenario (scenarios/registry.py) works with: it draws inputs, prepares the backend, checks calls.

case -> inputs -> backend.prepare -> call into fenced, poisoned memory -> judged against the oracle
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness import backend as backends
from harness.backend import Layer, as_backend
from harness.base.progress import PROGRESS
from harness.base.text import share
from harness.device import Device
from harness.diagnose import failure
from harness.diagnose.failure import Failed
from harness.diagnose.faults.leftovers import Past
from harness.diagnose.report import Report
from harness.inputs.draw import Inputs
from harness.oracle.judge import Judgement, judge, judge_exact
from harness.problem.case import Case, Problem
from harness.results.verdict import Verdict
from harness.session.applies import why_not
from harness.session.oracle_cache import ORACLE_CACHE, oracle_device, with_own_layer
from harness.trace import fence
from harness.trace.bits import digest, same_bits
from harness.trace.tracing import Trace, Tracing
from reference.formats import decode
from reference.moe import local_experts
from reference.plan import Accumulator, RoundingPlan, parse_plan, undeclared_plans

#: Called with every output that is judged, its inputs and the judgement.
Observer = Callable[[Tensor, Inputs, Judgement], None]


class Session:
    """One backend under one case. Every `check` judges one call; the first that fails ends the case.

    explain: whether a failed output is explained. Off while a failing sequence is shrunk, when only the fact counts.
    """

    def __init__(
        self, case: Case, backend: Any, device: Device, observers: Iterable[Observer] = (), explain: bool = True
    ) -> None:
        self.case, self.backend, self.device = case, as_backend(backend), device
        self.observers, self.explain = tuple(observers), explain
        self.judgements: list[Judgement] = []
        self.doubts: list[str] = []
        self.traces: list[Trace] = []
        self.past: Past = []
        self.widest_offset: int | None = None  #: elements that a 32-bit offset must not reach (trace/sanitizer.py)

    # -- what scenarios use -------------------------------------------------------------------------------------------
    def draw(self, **changes: Any) -> Inputs:
        """Draw the case's inputs on the device, with other values for fields of Problem or Case. The backend's layer is
        a copy, so that a scenario may write to it; scenario "once", which does not, shares one layer."""
        with PROGRESS.own():
            drawn = ORACLE_CACHE.inputs(self.case.change(scenario="once", **changes), self.device)
            return drawn if self.case.scenario == "once" else with_own_layer(drawn)

    def prepare(self, problem: Problem, layer: Layer, **options: Any) -> Callable[..., Tensor]:
        """Call backend.prepare(); returns call(hidden_states, topk_weights, topk_ids, out=None)."""
        return self.backend.prepare(problem, layer, **options)

    def check(self, call: Callable[..., Tensor], inputs: Inputs, what: str = "") -> Tensor:
        """Call and judge; returns the output. Failed, with a report, if anything is wrong. what: which call it is, for
        the report."""
        out, trace = self.call(call, inputs, what)
        self.traces.append(trace)
        self.accept(out, inputs, what, call)
        return out

    def accept(self, out: Tensor, inputs: Inputs, what: str = "", call: Callable[..., Tensor] | None = None) -> None:
        """Judge an output that a scenario got by itself. call: what returned it, if it can be called again to locate
        the wrong stage."""
        with PROGRESS.own():
            judgement = self.judged(out, inputs)
        if not judgement.passed:
            PROGRESS.failed(f"the output is wrong: {judgement.worst} uses {share(judgement.budget)} of its budget")
        if not judgement.passed and not self.explain:
            raise Failed(Report("wrong"))
        self.judgements.append(judgement)
        for observer in self.observers:
            observer(out, inputs, judgement)
        if not judgement.passed:
            plans = self.plans(inputs.case.problem)
            with PROGRESS.own():
                raise failure.failure(self.backend, plans, judgement, inputs, what, call, self.past)
        with PROGRESS.own():
            self.past = failure.remember(self.past, inputs, judgement)
        if doubt := _doubt(judgement, inputs):
            self.doubts.append(doubt)

    def why_not(self, problem: Problem) -> str | None:
        """None, or the enumerated reason why another problem does not run on this backend and device."""
        return why_not(replace(self.case, problem=problem), self.backend, self.device)

    def require(self, condition: bool, message: str) -> None:
        """Failed, with this message, unless a property other than the output's values holds."""
        if not condition:
            raise Failed(Report(message))

    # -- one call -----------------------------------------------------------------------------------------------------
    def call(self, call: Callable[..., Tensor], inputs: Inputs, what: str = "") -> tuple[Tensor, Trace]:
        """One call into poisoned, fenced memory, from fenced inputs; returns the output and what was traced. Failed if
        the call wrote to its inputs, to the layer or outside of what it allocated."""
        where = f" ({what})" if what else ""
        arguments = {name: t if fence.fences(t) else fence.keep(t) for name, t in inputs.arguments().items()}
        x = inputs.hidden_states
        tracing = Tracing()
        out = tracing.trace.fenced(torch.empty(x.shape, dtype=x.dtype, device=x.device), "out")
        for name, tensor in {**arguments, **inputs.backend_layer.tensors()}.items():
            tracing.trace.watch(tensor, name)
        before = {name: t.clone() for name, t in arguments.items()}
        digests = {name: digest(t) for name, t in inputs.backend_layer.tensors().items()}
        keywords = {"out": out} if backends.takes_out(call) else {}
        with self._guarding(tracing.trace) as faults, tracing as trace:
            result = call(*arguments.values(), **keywords)
        self.device.synchronize()
        self.require(not faults, f"{'; '.join(map(str, faults))}{where}")
        self.require(isinstance(result, Tensor), f"returned {type(result).__name__}, not a tensor{where}")
        shape = f"{tuple(result.shape)} {result.dtype} on {result.device}"
        wanted = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        self.require(shape == wanted, f"returned {shape}; it must be {wanted}{where}")
        overrun = trace.overrun()
        self.require(not overrun, f"wrote outside of {overrun}: a canary next to it changed{where}")
        for name, old in before.items():
            self.require(same_bits(old, arguments[name]), f"{name} was changed by the call{where}")
        changed = [name for name, t in inputs.backend_layer.tensors().items() if digest(t) != digests[name]]
        self.require(not changed, f"the layer's {', '.join(changed)} was changed by the call{where}")
        return result, trace

    def _guarding(self, trace: Trace) -> AbstractContextManager[list[Any]]:
        """Watch the memory accesses of interpreted kernels; yields the list of illegal ones."""
        if not (self.backend.interpreted and self.device.interprets_triton):
            return nullcontext([])
        from harness.trace import sanitizer

        return sanitizer.guarding(trace, self.widest_offset)

    def judged(self, out: Tensor, inputs: Inputs) -> Judgement:
        """The judgement of one output, under the admissible plan that fits best."""
        place = oracle_device(inputs.case.problem, self.device)
        got = decode(out.to(place))
        if inputs.case.fill == "exact":
            return judge_exact(got, ORACLE_CACHE.exact_output(inputs, place))
        best = None
        for expected in ORACLE_CACHE.expected(inputs, self.plans(inputs.case.problem), place):
            judgement = judge(got, expected)
            if best is None or judgement.budget < best.budget:
                best = judgement
            if judgement.passed:
                break
        assert best is not None
        return best

    def plans(self, problem: Problem) -> list[RoundingPlan]:
        """The backend's declared plans, also with this device's imprecise accumulator where it has one."""
        declared = self.backend.plans(problem) if self.backend.plans else undeclared_plans()
        plans = [parse_plan(p) for p in declared]
        scheme = problem.quant.activations if problem.quant else None
        imprecise = self.device.accumulator(scheme.codes) if scheme else Accumulator()
        if imprecise.bits is not None:
            # Which instruction a tile size leads to is the compiler's choice: the exact sum is tried first.
            plans += [replace(p, accumulator=imprecise) for p in plans if p.quantizes_activations]
        return plans

    def fill_in(self, verdict: Verdict) -> None:
        """Write the numbers of the judged calls into the verdict: calls, budgets, plan, trace of the last call."""
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
    """Why a match proves little, or None: in the served rows too few outputs are larger than the rounding noise."""
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
