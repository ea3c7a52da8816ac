"""pytest-benchmark over this harness's clock, for `pytest cases -m "cuda and perf"`.

pytest-benchmark reads a timer before and after a function. Here its timer is `device_clock`, which only advances by the
device time that a stopwatch measures. All numbers in the JSON file of pytest-benchmark are therefore device times.
"""

from __future__ import annotations

import traceback
from statistics import median
from typing import Any

from harness import device as devices
from harness.device import Device, DeviceLost
from harness.perf.timing.clock import NotTimed, Stopwatch
from harness.perf.timing.compile_time import compiling
from harness.perf.timing.roofline import ceilings, mean, operand, work
from harness.problem.case import Case
from harness.results.verdict import Verdict
from harness.run.case import run_case

ROUNDS = 20  #: samples of a benchmark
_elapsed = 0.0


def device_clock() -> float:
    """Seconds of device time measured in this process so far: the timer for pytest-benchmark."""
    return _elapsed


def run_timed(item: Any, fixture: Any) -> Verdict:
    """Run an item (case, backend, device, family), and time it if it passes.

    Returns the verdict, with `perf` if the case was timed. fixture: pytest-benchmark's.
    """
    with compiling() as compiled:
        verdict = run_case(item.case, item.backend, item.device, item.family, item.spec)
        if not verdict.green or verdict.status == "unsupported":
            return verdict
        try:
            verdict.perf = time_case(item.case, item.backend, item.device, fixture)
            verdict.perf |= {"compile_seconds": compiled.seconds, "kernels_compiled": compiled.kernels}
        except NotTimed as reason:
            verdict.status, verdict.reason = "unsupported", str(reason)
        except DeviceLost:
            raise
        except Exception as error:  # the case passed, and then raised
            verdict.status, verdict.reason = "crashed", f"when timed: {type(error).__name__}: {error}"
            verdict.report, verdict.error_type = traceback.format_exc(), type(error).__name__
    return verdict


def time_case(case: Case, backend: Any, device: Device, fixture: Any) -> dict[str, Any]:
    """Time a case that has just passed, through pytest-benchmark's fixture. Returns Verdict.perf.

    Times are in microseconds, rates in bytes/s and FLOP/s. Raises NotTimed, as Stopwatch does.
    """
    stopwatch = Stopwatch(case, backend, device)
    samples: list[float] = []

    def sample() -> None:
        global _elapsed
        samples.extend(stopwatch.sample("device_us", 1))
        _elapsed += samples[-1] / 1e6

    fixture.group = str(case)
    fixture.pedantic(sample, rounds=ROUNDS)
    device_us = median(samples)
    problem = case.problem
    roof = ceilings(device, operand(problem))
    needed = mean([work(problem, s.topk_ids, stopwatch.expert_map) for s in stopwatch.sets])
    perf = {
        "device_us": device_us,
        "samples_us": [round(us, 3) for us in samples],
        "method": stopwatch.method,
        "bytes": needed.bytes,
        "flops": needed.flops,
        "bytes_per_s": needed.bytes / device_us * 1e6,
        "flops_per_s": needed.flops / device_us * 1e6,
        "operand": operand(problem),
        "floor_us": roof.floor_us(problem, needed),
        "ceilings": {"copy_bytes_per_s": roof.copy_bytes_per_s, "flops_per_s": roof.flops_per_s},
        "clocks": device.driver(),
        "configurations": stopwatch.configurations(),
    }
    if not device.on_cpu:
        perf["host_us"] = median(stopwatch.sample("host_us", 5))
    fixture.extra_info.update(perf, case=str(case), backend=backend.name, environment=devices.environment(device))
    return perf
