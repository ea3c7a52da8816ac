"""Count what one call of a prepared backend does: exact numbers without a clock, the same on any machine.

A call after a warm-up is counted: launches, operators, allocations, copies, waits and Python functions. A case with a
wrong output is not measured. perf/count/compiled.py compiles `CallCounts.launches`.
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
from harness.problem.case import Case
from harness.results.verdict import Verdict
from harness.run.case import run_case
from harness.session.session import Session
from harness.trace import host_calls
from harness.trace.tracing import Allocation, Tracing
from harness.trace.transfers import transfers


class NotCorrect(Exception):
    """The case failed or crashed, so that its counts mean nothing. `verdict` says how."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(f"{verdict.status}: {verdict.reason}")
        self.verdict = verdict


class NotMeasured(Exception):
    """The case does not run here, or has no steady state. The message is the reason in one line."""


@dataclass
class CallCounts:
    """The counts of one call of a case on a backend."""

    #: By name: those of metrics.STRUCTURE and, once compiled, of metrics.COMPILED.
    metrics: dict[str, int] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)  #: "name[grid]", in launch order
    operators: dict[str, int] = field(default_factory=dict)  #: dispatches, by operator
    functions: dict[str, int] = field(default_factory=dict)  #: calls, by "module.function"
    allocations: list[str] = field(default_factory=list)  #: "operator dtype shape", in order
    copies: dict[str, int] = field(default_factory=dict)  #: by "to the device: operator" or "to the host: operator"
    waits: dict[str, int] = field(default_factory=dict)  #: by operator, or "synchronize"
    launches: list[dict[str, Any]] = field(default_factory=list)  #: Launch.spec() of each launch, ready for JSON
    compiled: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  #: configuration -> target -> numbers

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> CallCounts:
        """The inverse of `record`."""
        return cls(**record)


def measure(case: Case, backend: Any, device: Device, verdict: Verdict | None = None) -> CallCounts:
    """Judge a case, then count one of its steady-state calls.

    verdict: of this case, if this process has judged it already. Raises NotCorrect if the output is wrong, and
    NotMeasured if the case cannot run here or if two calls in a row differ.
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
    counts = CallCounts(
        kernels=[str(launch) for launch in trace.launched],
        operators=_counted(trace.ops),
        functions=_counted(host.functions),
        allocations=[_allocation_text(a) for a in trace.allocations],
        copies=_counted([f"to the device: {op}" for op in moved.h2d] + [f"to the host: {op}" for op in moved.d2h]),
        waits=_counted(moved.waits + ["synchronize"] * host.synchronizes),
        launches=[launch.spec() for launch in trace.launched],
    )
    numbers = {
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
    counts.metrics = {name: numbers[name] for name in metrics.STRUCTURE}
    return counts


def compile_for(counts: CallCounts, targets: Iterable[str], path: list[str] | None = None) -> CallCounts:
    """The counts, with the kernels compiled for these targets. path: as of compile_launches."""
    compiled = compile_launches(counts.launches, targets, path)
    return replace(counts, compiled=compiled, metrics=counts.metrics | totals(compiled))


def steady_call(case: Case, backend: Any, device: Device) -> Callable[[], Any]:
    """The case's call, with all its arguments bound, on a prepared backend that was called once before.

    The scenario only determines how the backend is prepared: the scratch.* scenarios prepare with a scratch object.
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
    # A partial object is no Python function, and is not counted.
    call = partial(prepared, x, inputs.topk_weights, inputs.topk_ids, **keywords)
    call()
    device.synchronize()
    return call


def _steady_host(call: Callable[[], Any]) -> host_calls.HostCalls:
    first, second = host_calls.count(call), host_calls.count(call)
    if first != second:
        differing = (first.functions - second.functions) + (second.functions - first.functions)
        names = ", ".join(sorted(differing))
        raise NotMeasured(f"no steady state: two calls in a row ran other Python functions: {names}")
    return first


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _allocation_text(allocation: Allocation) -> str:
    """ "empty.memory_format bf16 (8, 256)"."""
    return f"{allocation.op} {SHORT.get(allocation.dtype, allocation.dtype)} {allocation.shape}"
