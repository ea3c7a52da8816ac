"""One case on one backend: poison, call, compare, verdict.

    case -> inputs -> backend.prepare -> call into fenced, poisoned memory -> judged against the oracle -> Verdict

`Session` is what a scenario (harness/scenario.py) works with: it draws inputs, prepares the backend and checks calls.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import backend as backends
from harness import diagnosis, fence, inputs, scenario
from harness.backend import Layer
from harness.device import Device, DeviceLost
from harness.exact import inexact
from harness.expected import exact_output, expect
from harness.inputs import Inputs
from harness.judge import Judgement, judge, judge_exact
from harness.problem import Case, Problem
from harness.scenario import Failed, Unsupported
from harness.suspects import Past
from harness.trace import Trace, Tracing, raw
from harness.verdict import Verdict
from reference.formats import decode
from reference.moe import local_experts
from reference.plan import RoundingPlan, parse_plan, undeclared_plans

ONE_AT_A_TIME = 4 * 2**30  #: bytes of weights from which only one process of a run may hold a layer
WHOLE = 256 * 2**20  #: bytes of weights from which a layer is drawn, and the oracle computed, on the GPU
#: Whoever wants to see every output that is judged, with its inputs and the judgement (harness/mutate/rules.py).
WATCHERS: list[Callable[[Tensor, Inputs, Judgement], None]] = []


def run(case: Case, backend: Any, device: Device, family: str = "") -> Verdict:
    """The verdict for one case. A kernel's fault is a verdict; DeviceLost means that nothing else can run here."""
    started = time.perf_counter()
    if reason := why_not(case, backend, device):
        verdict = Verdict(str(case), backend.name, str(device), "unsupported", family, reason)
    else:
        with _room(case.problem, device):
            verdict = _run(case, backend, device, family)
    verdict.seconds = time.perf_counter() - started
    return verdict


def _run(case: Case, backend: Any, device: Device, family: str) -> Verdict:
    verdict = Verdict(str(case), backend.name, str(device), "passed", family)
    session = None
    try:
        if reason := _no_room(case.problem, device):
            raise Unsupported(reason)
        session = Session(case, backend, device)
        scenario.play(session)
        if len(session.doubts) == len(session.judgements):  # not one call was telling
            verdict.status, verdict.reason = "mistrusted", (session.doubts or ["no call was judged"])[0]
    except Unsupported as reason:
        verdict.status, verdict.reason = "unsupported", str(reason)
    except Failed as failure:
        verdict.status, verdict.reason, verdict.report = "failed", failure.summary, failure.report
        verdict.error_map, verdict.cause, verdict.stage = failure.error_map, failure.cause, failure.stage
    except (DeviceLost, backends.BackendError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a kernel raises is its verdict, with the whole traceback
        device.synchronize()
        verdict.status = "crashed"
        verdict.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        verdict.report = traceback.format_exc()
    if session is not None:
        session.fill_in(verdict)
    if not verdict.green:
        # The tensors are shared between backends: one that broke them must not break the next.
        _forget()
    return verdict


@contextmanager
def _room(problem: Problem, device: Device) -> Iterator[None]:
    """Whole-size layers share the device with other processes of the run: none keeps more than the layer it is at, and
    the largest are tested by one process at a time."""
    size = weight_bytes(problem) + batch_bytes(problem)
    if device.torch.type == "cpu" or size < WHOLE:
        yield
        return
    if (key := problem.weights_key()) != _WHOLE_AT.get("layer"):
        _forget()
        _WHOLE_AT["layer"] = key
    with open(Path(tempfile.gettempdir()) / f"moe-harness-{os.getuid()}-{device.name}.lock", "w") as turn:
        if size > ONE_AT_A_TIME:
            fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if size > ONE_AT_A_TIME:
                _forget()
            device.release()


_WHOLE_AT: dict[str, Problem] = {}


def _forget() -> None:
    """Drop every drawn tensor and expected result."""
    inputs.forget()
    _drawn.cache_clear()
    _EXPECTED.clear()


def why_not(case: Case, backend: Any, device: Device) -> str | None:
    """None, or the enumerated reason why this case does not run on this backend and device."""
    reason = backends.unavailable(backend, device) or backends.unsupported(backend, case.problem, device)
    if reason is None and case.fill == "exact":
        reason = inexact(case.problem)
    unserved = case.problem.invalid_ids or case.problem.ep is not None
    if reason is None and case.fill == "extreme" and unserved and not getattr(backend, "nan_safe", True):
        reason = f"fill: {backend.name} declares that NaN in rows that nobody serves reaches its output"
    return reason


def _no_room(problem: Problem, device: Device) -> str | None:
    needed, room = 3 * weight_bytes(problem) + batch_bytes(problem), device.memory_bytes()
    if needed <= room:
        return None
    return f"memory: needs about {needed / 2**30:.0f} GiB, {room / 2**30:.0f} GiB are free"


def weight_bytes(problem: Problem) -> int:
    size = 1 if problem.quant else inputs.TORCH_DTYPE[problem.dtype].itemsize
    rows = problem.w13_rows + problem.intermediate_size
    return (problem.local_experts + problem.shared_experts) * rows * problem.hidden_size * size


def batch_bytes(problem: Problem) -> int:
    """What a call's batch takes: its inputs and output with their copies, and the stages of its pairs."""
    pairs, stages = problem.tokens * problem.top_k, problem.w13_rows + 2 * problem.intermediate_size
    elements = 4 * problem.tokens * problem.hidden_size + pairs * (3 * problem.hidden_size + stages)
    return elements * inputs.TORCH_DTYPE[problem.dtype].itemsize


class Session:
    """One backend under one case. Every `check` judges one call; the first that fails ends the case."""

    def __init__(self, case: Case, backend: Any, device: Device) -> None:
        self.case, self.backend, self.device = case, backend, device
        self.judgements: list[Judgement] = []
        self.doubts: list[str] = []
        self.traces: list[Trace] = []
        self.past: Past = []
        self.widest_offset: int | None = None  #: elements that a 32-bit offset must not reach (harness/sanitizer.py)

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

    def check(self, call: Callable[..., Tensor], given: Inputs, what: str = "") -> Tensor:
        """Call and judge; returns the output. Failed, with a report, if anything is wrong."""
        out, trace = self.call(call, given, what)
        self.traces.append(trace)
        self.accept(out, given, what, call)
        return out

    def accept(self, out: Tensor, given: Inputs, what: str = "", call: Callable[..., Tensor] | None = None) -> None:
        """Judge an output that a scenario got by itself. call: what can be called again, to see its stages."""
        judgement = self.judged(out, given)
        self.judgements.append(judgement)
        for watch in WATCHERS:
            watch(out, given, judgement)
        if not judgement.passed:
            plans = self.plans(given.case.problem)
            raise diagnosis.failure(self.backend, plans, judgement, given, what, call, self.past)
        self.past = diagnosis.remember(self.past, given, judgement)
        if doubt := _doubt(judgement, given):
            self.doubts.append(doubt)

    def why_not(self, problem: Problem) -> str | None:
        """None, or why this backend cannot be asked about another problem."""
        return why_not(replace(self.case, problem=problem), self.backend, self.device)

    def require(self, condition: bool, message: str) -> None:
        """A property other than the output's values."""
        if not condition:
            raise Failed(message, message)

    # -- one call -----------------------------------------------------------------------------------------------------
    def call(self, call: Callable[..., Tensor], given: Inputs, what: str = "") -> tuple[Tensor, Trace]:
        """One call into poisoned, fenced memory, from fenced inputs. Inputs and weights must be what they were."""
        where = f" ({what})" if what else ""
        handed = {name: t if fence.fences(t) else fence.keep(t) for name, t in given.arguments().items()}
        x = given.hidden_states
        tracing = Tracing()
        out = tracing.trace.fenced(torch.empty(x.shape, dtype=x.dtype, device=x.device), "out")
        for name, tensor in {**handed, **given.handed.tensors()}.items():
            tracing.trace.watch(tensor, name)
        before = {name: t.clone() for name, t in handed.items()}
        digests = {name: digest(t) for name, t in given.handed.tensors().items()}
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
        changed = [name for name, t in given.handed.tensors().items() if digest(t) != digests[name]]
        self.require(not changed, f"the layer's {', '.join(changed)} was changed by the call{where}")
        return result, trace

    def _guarding(self, trace: Trace) -> AbstractContextManager[list[Any]]:
        """What interpreted kernels do to memory while it is open: the faults that are found."""
        if not (getattr(self.backend, "interpreted", False) and self.device.interprets_triton):
            return nullcontext([])
        from harness import sanitizer

        return sanitizer.guarding(trace, self.widest_offset)

    def judged(self, out: Tensor, given: Inputs) -> Judgement:
        """The judgement of one output, under the admissible plan that fits best."""
        place = _place(given.case.problem, self.device)
        got = decode(out.to(place))
        if given.case.fill == "exact":
            return judge_exact(got, _remembered((given, "exact", place), partial(exact_output, given, place)))
        best = None
        for plan in self.plans(given.case.problem):
            found = judge(got, _remembered((given, plan, place), partial(expect, given, plan, place)))
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


_EXPECTED: dict[tuple, Any] = {}


def _remembered(key: tuple[Inputs, Any, torch.device], compute: Callable[[], Any]) -> Any:
    """The oracle's answer for these inputs: every backend of the process is asked the same."""
    given, how, place = key
    known = (given.case, given.variant, how, str(place))
    if known not in _EXPECTED:
        while len(_EXPECTED) >= 12:
            _EXPECTED.pop(next(iter(_EXPECTED)))
        _EXPECTED[known] = compute()
    return _EXPECTED[known]


def _place(problem: Problem, device: Device) -> torch.device:
    """Where the inputs are drawn and the oracle computes: the CPU, but for layers too large for it."""
    if device.torch.type == "cpu" or weight_bytes(problem) < WHOLE:
        return torch.device("cpu")
    require_agreement(device.torch)
    return device.torch


@lru_cache
def require_agreement(device: torch.device) -> None:
    """The oracle on this device must agree with the oracle on the CPU before it may judge anything there."""
    for text in ("t32-h512-i256-e8-k2-bf16-bias-random", "t32-h512-i384-e8-k4-bf16-e4m3.block.group-random"):
        given = inputs.draw(Case.parse(text))
        here, there = (expect(given, RoundingPlan(gate_up="io", act="io"), d) for d in (torch.device("cpu"), device))
        for name in ("out", "variance"):
            a, b = getattr(here, name), getattr(there, name).cpu()
            apart = float((a - b).abs().max() / a.abs().max())
            if apart > 1e-9:
                raise RuntimeError(
                    f"the float64 oracle on {device} differs from the CPU's by {apart:.1e} in {name}: {text}"
                )


@lru_cache(maxsize=2)
def _drawn(case: Case, place: torch.device, device: torch.device) -> Inputs:
    drawn = inputs.draw(case, place)
    return drawn if place == device else _moved(drawn, device)


def _moved(drawn: Inputs, device: torch.device) -> Inputs:
    """The same inputs on another device. Strides are kept: padding between rows is part of the question."""
    arguments = {name: fence.keep(t, device) for name, t in drawn.arguments().items()}
    return drawn.given(arguments, layer=_kept(drawn.layer, device), handed=_kept(drawn.handed, device))


def _with_own_layer(drawn: Inputs) -> Inputs:
    return replace(drawn, handed=_kept(drawn.handed))


def _kept(layer: Layer, device: torch.device | None = None) -> Layer:
    """A fenced copy of a layer, on its device or another."""
    return Layer(layer.problem, **{name: fence.keep(t, device) for name, t in layer.tensors().items()})


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(raw(a), raw(b))


def digest(t: Tensor) -> tuple[int, ...]:
    """A checksum of the tensor's bits: cheap enough to be taken around every call, also of whole-size layers."""
    data = raw(t)
    words = data[: len(data) // 4 * 4].view(torch.int32)
    parts = (words, words[::2], data[len(words) * 4 :])
    return (*(int(part.sum(dtype=torch.int64)) for part in parts), len(data))


def _doubt(judgement: Judgement, given: Inputs) -> str | None:
    """Why a match proves little, if it does: of the rows that are served, too few outputs stand out of the noise."""
    expected = judgement.expected
    if expected is None or not expected.numel():
        return "there is no output to compare"
    local = local_experts(given.topk_ids, given.case.problem.num_experts, given.layer.expert_map)
    served = (local >= 0).any(1).to(expected.device)
    if not served.any() and not given.case.problem.shared_experts:
        return "no token meets an expert: only zeros are compared"
    telling = torch.isfinite(expected) & (expected != 0)
    if judgement.sigma is not None:
        telling &= expected.abs() > 4 * judgement.sigma
    rows = served & torch.isfinite(expected).all(1) | (given.case.problem.shared_experts > 0)
    share = float(telling[rows].double().mean()) if rows.any() else 0.0
    return None if share >= 0.3 else f"only {share:.0%} of the outputs are large enough to tell right from wrong"
