"""Whether a case runs on a backend and a device."""

from __future__ import annotations

from typing import Any

from harness import backend as backends
from harness.backend import as_backend
from harness.device import Device
from harness.problem.case import Case
from harness.problem.exactness import inexact


def why_not(case: Case, backend: Any, device: Device) -> str | None:
    """None, or the enumerated reason why this case does not run on this backend and device."""
    backend = as_backend(backend)
    reason = backends.unavailable(backend, device) or backends.unsupported(backend, case.problem, device)
    if reason is None and case.fill == "exact":
        reason = inexact(case.problem)
    unserved = case.problem.invalid_ids or case.problem.ep is not None
    if reason is None and case.fill == "extreme" and unserved and not backend.nan_safe:
        reason = f"fill: {backend.name} declares that NaN in rows that no expert serves reaches its output"
    return reason
