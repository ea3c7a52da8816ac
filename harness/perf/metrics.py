"""The metrics of a kernel's speed: what each counts, and whether it is exact.

An exact metric is the same number every time, on any machine: one measurement decides. A timed metric is noisy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number about one call of a prepared backend, in the steady state: after a call that is not counted."""

    name: str
    unit: str
    counts: str  #: a description, for help texts
    source: str  #: "structure" (one call, traced), "compiled" (ahead of time, for a target), "time", "verdict"
    higher_is_worse: bool = True

    @property
    def exact(self) -> bool:
        """Whether one measurement decides."""
        return self.source != "time"


_ALL = (
    Metric("correct", "", "1 if the verdict is passed, 0 if failed or crashed", "verdict", higher_is_worse=False),
    Metric("launches", "launches", "Triton kernels launched", "structure"),
    Metric("programs", "programs", "program instances of all grids", "structure"),
    Metric("operators", "operators", "torch operators dispatched", "structure"),
    Metric("allocations", "allocations", "tensors that operators returned in memory of their own", "structure"),
    Metric("allocated_bytes", "bytes", "bytes of those tensors", "structure"),
    Metric("copies_h2d", "copies", "tensors copied from the host, or made from Python data", "structure"),
    Metric("copies_d2h", "copies", "tensors or numbers copied to the host", "structure"),
    Metric("syncs", "waits", "waits for the device: for results that the host must know, for copies", "structure"),
    Metric("python_calls", "calls", "Python functions called outside of kernel launches: host overhead", "structure"),
    Metric("registers", "registers", "registers a thread, of the worst kernel", "compiled"),
    Metric("spills", "bytes", "bytes spilled from registers, all kernels", "compiled"),
    Metric("shared_bytes", "bytes", "shared memory, of the worst kernel", "compiled"),
    Metric("tensor_core", "instructions", "tensor-core instructions, all kernels", "compiled", higher_is_worse=False),
    Metric("load_bytes", "bytes", "narrowest of the kernels' widest global loads", "compiled", higher_is_worse=False),
    Metric("code_bytes", "bytes", "machine code, all kernels", "compiled"),
    Metric("device_us", "us", "time on the device", "time"),
    Metric("host_us", "us", "time until the call returns", "time"),
)  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
STRUCTURE = tuple(m.name for m in _ALL if m.source == "structure")
COMPILED = tuple(m.name for m in _ALL if m.source == "compiled")
TIMED = tuple(m.name for m in _ALL if m.source == "time")
#: The default targets for which kernels are compiled ahead of time.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
