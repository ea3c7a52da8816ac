"""Time one call of a prepared backend on the device and on the host, without compilation.

    case -> inputs, rotated -> first calls -> graph of [flush L2, start, call, stop] for each input -> samples

Device time is the time between two events inside a captured graph, so that gaps between launches are not counted. A
call that cannot be captured is timed with events around it; the work queued before it keeps the device from waiting for
the host. The inputs rotate (other rows, other experts), and the L2 cache is filled with other data before each call,
because the weights of a layer are cold when a model calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from harness.backend import as_backend
from harness.device import Device
from harness.inputs.draw import Inputs
from harness.perf.count.compiled import configuration
from harness.problem.case import Case
from harness.session.session import Session
from harness.trace.bits import same_bits
from harness.trace.launches import Launch, watching

ROTATED = 4  #: sets of inputs, used in turn
WARM = 0.2  #: seconds of calls before the first sample, in which clocks rise and caches of the allocator fill
HOST_CALLS = 20  #: calls of one sample of host time
CPU_SECONDS = 0.02  #: a CPU sample repeats the calls for at least this long


class NotTimed(Exception):
    """This case cannot be timed on this backend and device. The message is "<keyword>: reason"."""


@dataclass(frozen=True)
class Rotation:
    """One set of call arguments."""

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


def rotations(inputs: Inputs, count: int = ROTATED) -> list[Rotation]:
    """`count` sets of arguments for one layer: the rows rolled, and the expert ids shifted if all experts are alike.

    With an expert_map, or a routing to certain experts, shifted ids would be another case: they are not shifted.
    """
    problem = inputs.case.problem
    alike = problem.ep is None and problem.routing in ("uniform", "balanced", "skewed")
    sets = []
    for turn in range(count):
        ids, shift = inputs.topk_ids, turn * problem.num_experts // count
        if alike:
            ids = (ids + shift) % problem.num_experts
        x = inputs.hidden_states
        if turn:  # a padded batch keeps its strides
            x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.roll(turn, 0))
        sets.append(Rotation(x, inputs.topk_weights, ids))
    return sets


class Clock:
    """A clock for calls that are timed in turn. Errors of the calls propagate.

    deterministic: raise NotTimed if a replayed graph gives other bits than the call. method: "graph", "events" or, on a
    CPU, "wall clock".
    """

    def __init__(self, calls: Sequence[Callable[[], Tensor]], device: Device, deterministic: bool = True) -> None:
        self.device, self._calls = device, calls
        outputs = [one() for one in self._calls]
        device.synchronize()
        self._warm_up()
        self.method = "wall clock"
        self._read: Callable[[], list[float]] = self._wall
        if not device.on_cpu:
            self._use_events(outputs, deterministic)

    def sample(self, metric: str, count: int) -> list[float]:
        """`count` samples of "device_us" or "host_us", in microseconds a call.

        device_us: the mean over the rotated inputs; on the CPU the median wall time of the call.
        host_us: the median time until the call returns, with nothing queued on the device.
        """
        if metric == "device_us":
            # On a CPU the median, because other processes take time in bursts.
            middle = median if self.device.on_cpu else fmean
            return [middle(self._read()) for _ in range(count)]
        if metric != "host_us":
            raise ValueError(f"metric={metric}: one of device_us, host_us")
        if self.device.on_cpu:
            raise NotTimed("device: on a CPU a call returns when its work is done: device_us says it all")
        return [self._host() for _ in range(count)]

    def configurations(self) -> list[str]:
        """The distinct configurations of the Triton kernels that one call launches: tiles, warps, stages, types."""
        seen: list[Launch] = []
        with watching(seen.append):
            self._calls[0]()
        self.device.synchronize()
        return list(dict.fromkeys(configuration(launch.spec()) for launch in seen))

    # -- one sample ---------------------------------------------------------------------------------------------------
    def _wall(self) -> list[float]:
        times: list[float] = []
        started = time.perf_counter()
        while not times or time.perf_counter() - started < CPU_SECONDS:
            for call in self._calls:
                begun = time.perf_counter()
                call()
                times.append((time.perf_counter() - begun) * 1e6)
        return times

    def _host(self) -> float:
        times = []
        for n in range(HOST_CALLS):
            self.device.synchronize()
            begun = time.perf_counter()
            self._calls[n % len(self._calls)]()
            times.append((time.perf_counter() - begun) * 1e6)
        self.device.synchronize()
        return median(times)

    def _use_events(self, outputs: list[Tensor], deterministic: bool) -> None:
        # The flush reads: written cache lines would be written back to memory during the timed call.
        flushed = torch.ones(max(2 * self.device.l2_bytes(), 2**20) // 4, dtype=torch.int32, device=self.device.torch)
        total = torch.empty((), dtype=torch.int64, device=self.device.torch)

        def flush() -> None:
            torch.sum(flushed, 0, dtype=torch.int64, out=total)

        flush()
        replay = self.device.graph_of(flush, self._calls)
        if replay is None:
            self.method = "events"
            self._read = self._spaced(flush)
            return
        self.method = "graph"
        self._read = replay.microseconds
        self._read()
        if deterministic:
            for expected, out in zip(outputs, replay.outputs, strict=True):
                if not same_bits(expected, out):
                    raise NotTimed("scenario: a replayed graph gives other bits than the call it was captured from")

    def _spaced(self, flush: Callable[[], None]) -> Callable[[], list[float]]:
        """Events around each call, after enough flushes that the host has queued the call before they end."""
        start, stop = self.device.event(), self.device.event()
        start.record()
        flush()
        stop.record()
        self.device.synchronize()
        ahead = 1 + int(2 * self._host() / max(start.elapsed_time(stop) * 1e3, 1.0))
        pairs = [(self.device.event(), self.device.event()) for _ in self._calls]

        def read() -> list[float]:
            for (begin, end), call in zip(pairs, self._calls):
                for _ in range(ahead):
                    flush()
                begin.record()
                call()
                end.record()
                self.device.synchronize()
            return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]

        return read

    def _warm_up(self) -> None:
        started = time.perf_counter()
        while time.perf_counter() - started < WARM:
            for call in self._calls:
                call()
            self.device.synchronize()


class Stopwatch(Clock):
    """A clock for a prepared backend. The caller has checked that the case passes.

    Raises NotTimed if a time would mean nothing: interpreted kernels, scenarios of several calls, no tokens.
    """

    def __init__(self, case: Case, backend: Any, device: Device) -> None:
        backend = as_backend(backend)
        if backend.interpreted and device.interprets_triton:
            raise NotTimed(f"device: {backend.name} is interpreted on {device}; its time would be the interpreter's")
        if case.scenario != "once":
            raise NotTimed(f"scenario: {case.scenario} is several calls; one is timed")
        if not case.problem.tokens:
            raise NotTimed("shape: no tokens, nothing to time")
        session = Session(case, backend, device)
        inputs = session.draw()
        self.sets = rotations(inputs)
        self.expert_map = inputs.layer.expert_map
        call = session.prepare(inputs.case.problem, inputs.backend_layer)
        calls = [partial(call, s.hidden_states, s.topk_weights, s.topk_ids) for s in self.sets]
        super().__init__(calls, device, backend.deterministic)
