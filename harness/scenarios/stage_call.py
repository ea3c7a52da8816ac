"""One call of a stage, the router or the alignment, in poisoned and fenced memory, as in calls of the whole layer.

A stage's function is the backend's attribute of that name. Its inputs are copied to fenced memory, and must not change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.backend import Unsupported
from harness.diagnose.failure import Failed
from harness.diagnose.report import Report
from harness.oracle.judge import Judgement
from harness.session.session import Session
from harness.trace.bits import same_bits
from harness.trace.tracing import Trace, Tracing

SHOWN = 20  #: complaints that a report lists


def stage(s: Session, name: str) -> Callable[..., Any]:
    """The backend's function for a stage; Unsupported if it has none."""
    function = getattr(s.backend, name)
    if function is None:
        raise Unsupported(f"scenario: {s.backend.name} has no {name}()")
    return function


def require_options(s: Session, function: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    """Unsupported unless the function takes all of these keywords."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    if missing := options.keys() - {p.name for p in parameters}:
        raise Unsupported(f"scenario: {name}() of {s.backend.name} has no {', '.join(sorted(missing))}")


def call_stage(
    s: Session, function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any], what: str = ""
) -> Any:
    """Return function(*tensors, **options), traced; options may hold tensors too. Failed if the function wrote to an
    input or outside of what it allocated."""
    tracing = Tracing()
    named = tensors | {name: value for name, value in options.items() if isinstance(value, Tensor)}
    guarded = {name: _guarded(tracing.trace, tensor, name) for name, tensor in named.items()}
    keywords = {name: guarded.get(name, value) for name, value in options.items()}
    with tracing as trace:
        result = function(*(guarded[name] for name in tensors), **keywords)
    s.device.synchronize()
    s.traces.append(trace)
    where = f" ({what})" if what else ""
    overrun = trace.overrun()
    s.require(not overrun, f"wrote outside of {overrun}: a canary next to it changed{where}")
    for name, tensor in named.items():
        s.require(same_bits(tensor, guarded[name]), f"{name} was changed by the call{where}")
    return result


def require_tensor(
    s: Session, name: str, tensor: Any, shape: tuple[int, ...] | None, dtype: torch.dtype, what: str = ""
) -> None:
    """Failed unless a stage returned a tensor of this shape (None: any) and dtype, on its device."""
    where = f" ({what})" if what else ""
    s.require(isinstance(tensor, Tensor), f"{name} is of type {type(tensor).__name__}, no tensor{where}")
    returned = f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device.type}"
    wanted = f"{name} {tuple(tensor.shape) if shape is None else shape} {dtype} on {s.device.torch.type}"
    s.require(returned == wanted, f"returned {returned}; it must be {wanted}{where}")


def accept(
    s: Session, complaints: list[str], what: str = "", budgets: dict[str, float] | None = None, doubt: str | None = None
) -> None:
    """Count one output of a stage as judged: Failed if there are complaints, each a sentence. budgets: used shares by
    statistic; doubt: why the match proves little."""
    if complaints:
        where = f" ({what})" if what else ""
        shown = complaints[1:SHOWN]
        more = [f"and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
        raise Failed(Report(f"{complaints[0]}{where}", details=[*shown, *more]))
    s.judgements.append(Judgement(budgets or {"contract": 0.0}))
    if doubt:
        s.doubts.append(doubt)


def _guarded(trace: Trace, tensor: Tensor, name: str) -> Tensor:
    """A copy between fences, with the gap behind each of its rows."""
    if tensor.dim() != 2 or not tensor.numel() or tensor.stride(0) <= tensor.shape[1]:
        return trace.fenced(tensor, name).copy_(tensor)
    whole = tensor.as_strided((len(tensor), tensor.stride(0)), (tensor.stride(0), 1))
    return trace.fenced(whole, name).copy_(whole)[:, : tensor.shape[1]]
