"""`pytest cases -m "cuda and perf"`: pytest-benchmark's statistics, storage and comparison over this harness's clock.

pytest-benchmark times what a function takes by asking a timer before and after it. Its timer here is `device_clock`,
which moves on only when a stopwatch has read device time: whatever reads that plugin's JSON reads device time.
"""

from __future__ import annotations

import traceback
from statistics import median
from typing import Any

from harness import device as devices
from harness.backend import BackendError
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
    """Seconds of device time that were read in this process so far: a timer for pytest-benchmark."""
    return _elapsed


def judged(asked: Any, fixture: Any) -> Verdict:
    """The verdict on asked.case, on its backend and device; if it has passed, with what it takes."""
    with compiling() as compiled:
        verdict = run_case(asked.case, asked.backend, asked.device, family=asked.family)
        if not verdict.green or verdict.status == "unsupported":
            return verdict
        try:
            verdict.perf = run(asked.case, asked.backend, asked.device, fixture)
            verdict.perf |= {"compile_seconds": compiled.seconds, "kernels_compiled": compiled.kernels}
        except NotTimed as reason:
            verdict.status, verdict.reason = "unsupported", str(reason)
        except (DeviceLost, BackendError):
            raise
        except Exception as error:  # right when it was judged, and now this: the verdict, with the whole traceback
            verdict.status, verdict.reason = "crashed", f"when timed: {type(error).__name__}: {error}"
            verdict.report = traceback.format_exc()
    return verdict


def run(case: Case, backend: Any, device: Device, fixture: Any) -> dict[str, Any]:
    """Time a case that has just passed, through the fixture `benchmark`; what the verdict's record says of it.

    Times in microseconds, rates in bytes/s and FLOP/s. NotTimed as for Stopwatch.
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
    found = {
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
        found["host_us"] = median(stopwatch.sample("host_us", 5))
    fixture.extra_info.update(found, case=str(case), backend=backend.name, environment=devices.environment(device))
    return found
