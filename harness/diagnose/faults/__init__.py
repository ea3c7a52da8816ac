"""The bank of wrong oracles: each computes the layer with one mistake that real kernels have made (registry.py).

Of several that give the same answer the one that stands first is named first. A module of this room must be in the list
below, or its wrong oracles are unknown (a test holds that).
"""

from harness.diagnose.faults import routing, rows, layer, scales  # noqa: F401, I001 - the order is that of naming
from harness.diagnose.faults.registry import FAULTS, Fault, fault

__all__ = ["FAULTS", "Fault", "fault"]
