"""The whole catalogue: FAULTS, filled."""

from __future__ import annotations

from tests.reliability import changes, ends, litter, raises  # noqa: F401  (each adds to FAULTS)
from tests.reliability.faults import FAULTS

__all__ = ["FAULTS"]
