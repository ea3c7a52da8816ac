"""The bank of faults: wrong oracles, each with one mistake that real kernels have made (registry.py).

Of several faults that give the same answer the first one is named first. Every module of this package is in the list
below; otherwise its faults are unknown (a test checks the list).
"""

from harness.diagnose.faults import routing, rows, layer, scales, leftovers  # noqa: F401, I001 - the order of naming
from harness.diagnose.faults.registry import FAULTS, Fault, fault, with_text

__all__ = ["FAULTS", "Fault", "fault", "with_text"]
