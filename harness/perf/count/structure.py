"""What one call of a prepared backend does, in exact numbers: no clock, no noise, the same on any machine.

Launches, operators, allocations, copies, waits and Python functions are counted in a call that follows a warm-up. A
case that is not answered correctly is not measured. `Structure.launches` is what perf/count/compiled.py compiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from harness.backend import takes_out
from harness.device import Device
from harness.inputs.draw import Inputs
from harness.perf import metrics
from harness.perf.count.compiled import SHORT, compile_launches, totals
from harness.perf.count.differences import differences
from harness.problem.case import Case
from harness.results.verdict import Verdict
from harness.run.case import run_case
from harness.session.session import Session
from harness.trace import host_calls
from harness.trace.tracing import Allocation, Tracing
from harness.trace.transfers import transfers

__all__ = [
    "CallCounts", "NotCorrect", "NotMeasured", "compile_for", "differences", "in_words", "measure", "steady_call",
]  # fmt: skip


class NotCorrect(Exception):
    """The case failed or crashed: its numbers would mean nothing. `verdict` says how."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(f"{verdict.status}: {verdict.reason}")
        self.verdict = verdict


class NotMeasured(Exception):
    """The case does not run here, or has no steady state; the message says why in one line."""


@dataclass
class CallCounts:
    """The numbers of one case on one backend.

    metrics: by name, those of metrics.STRUCTURE, and once compiled those of metrics.COMPILED (compiled.totals).
    kernels: "name[grid]" in launch order. operators: how often each was dispatched. functions: how often each Python
    function was called. allocations, copies and waits: each in words, in order. launches: what each launch was
    specialised for, ready for JSON. compiled: kernel and configuration -> target -> numbers.
    """

    metrics: dict[str, int] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    allocations: list[str] = field(default_factory=list)
    copies: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    launches: list[dict[str, Any]] = field(default_factory=list)
    compiled: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> CallCounts:
        """What `record` was made from."""
        return cls(**record)


def measure(case: Case, backend: Any, device: Device, verdict: Verdict | None = None) -> CallCounts:
    """One steady-state call, counted, of a case that is judged right first.

    NotCorrect if it is not; NotMeasured if it cannot run here, or no two calls are alike. verdict: what this process
    has judged already.
    """
    verdict = verdict or run_case(case, backend, device)
    if verdict.status == "unsupported":
        raise NotMeasured(verdict.reason)
    if not verdict.green:
        raise NotCorrect(verdict)
    call = steady_call(case, backend, device)
    with Tracing() as trace, transfers(intended=device.on_cpu) as moved:
        call()
    device.synchronize()
    host = _steady_host(call)
    structure = CallCounts(
        kernels=[str(launch) for launch in trace.launched],
        operators=_counted(trace.ops),
        functions=_counted(host.functions),
        allocations=[in_words(a) for a in trace.allocations],
        copies=_counted([f"to the device: {op}" for op in moved.h2d] + [f"to the host: {op}" for op in moved.d2h]),
        waits=_counted(moved.waits + ["synchronize"] * host.synchronizes),
        launches=[launch.spec() for launch in trace.launched],
    )
    counts = {
        "launches": len(trace.launched),
        "programs": sum(launch.programs for launch in trace.launched),
        "operators": len(trace.ops),
        "allocations": len(trace.allocations),
        "allocated_bytes": trace.allocated_bytes,
        "copies_h2d": len(moved.h2d),
        "copies_d2h": len(moved.d2h),
        "syncs": len(moved.waits) + host.synchronizes,
        "python_calls": sum(host.functions.values()),
    }
    structure.metrics = {name: counts[name] for name in metrics.STRUCTURE}
    return structure


def compile_for(structure: CallCounts, targets: Iterable[str], path: list[str] | None = None) -> CallCounts:
    """The structure with its kernels compiled for these targets; `path` as for compile_launches."""
    compiled = compile_launches(structure.launches, targets, path)
    return replace(structure, compiled=compiled, metrics=structure.metrics | totals(compiled))


def steady_call(case: Case, backend: Any, device: Device) -> Callable[[], Any]:
    """The case's call with all its arguments, on a prepared backend that has been called before.

    Of a scenario only the way to prepare counts: scratch.* ones prepare with a scratch object.
    """
    session = Session(case, backend, device)
    inputs: Inputs = session.draw()
    problem = inputs.case.problem
    options = {}
    if case.scenario.startswith("scratch."):
        options["scratch"] = backend.make_scratch(problem, device.torch)
    prepared = session.prepare(problem, inputs.backend_layer, **options)
    x = inputs.hidden_states
    keywords = {}
    if takes_out(prepared):
        keywords["out"] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # A partial object is no Python function: it does not count.
    call = partial(prepared, x, inputs.topk_weights, inputs.topk_ids, **keywords)
    call()
    device.synchronize()
    return call


def _steady_host(call: Callable[[], Any]) -> host_calls.HostCalls:
    first, second = host_calls.count(call), host_calls.count(call)
    if first != second:
        apart = (first.functions - second.functions) + (second.functions - first.functions)
        raise NotMeasured(f"no steady state: two calls in a row ran other Python functions: {', '.join(sorted(apart))}")
    return first


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def in_words(allocation: Allocation) -> str:
    """ "empty.memory_format bf16 (8, 256)"."""
    return f"{allocation.op} {SHORT.get(allocation.dtype, allocation.dtype)} {allocation.shape}"
