"""Scenarios of memory and of the host: 32-bit offsets, batches beyond 2^31 elements, padding rows, no synchronization
with the device, and replays of a captured graph.

Accesses beyond a tensor are checked in each call of every scenario (trace/fence.py, trace/sanitizer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Unsupported
from harness.inputs.draw import Inputs
from harness.scenarios.registry import batch, require_promise, scenario, start
from harness.session.session import Session
from harness.trace import fence, host_calls
from harness.trace.tracing import Tracing
from harness.trace.transfers import transfers

#: Elements that no 32-bit offset may reach under memory.offsets32. An offset inside a tile stays below it: 128 rows or
#: columns with a stride of 255 elements. A product with the number of a row, an expert or a tile exceeds it in cases of
#: a few hundred rows, as it exceeds 2^31 in a model of 2^16 times the size.
WIDEST_OFFSET = 2**15
DISTINCT = 64  #: tokens that a batch of copies repeats
ROWS_AT_ONCE = 2**14  #: rows of a large tensor that are copied or compared at once


@scenario("memory.offsets32")
def offsets32(s: Session) -> None:
    """Offsets that grow with the model or the batch are computed in 64 bits; tested on a smaller scale."""
    if not (s.backend.interpreted and s.device.interprets_triton):
        raise Unsupported("scenario: the width of offsets shows only in Triton kernels that are interpreted")
    s.widest_offset = WIDEST_OFFSET
    inputs, call = start(s)
    s.check(call, inputs)


@scenario("memory.copies")
def copies(s: Session) -> None:
    """A large batch made of copies of a small one: every copy has the output of the small batch, so that the oracle
    need not compute so many tokens."""
    if s.case.fill != "exact":
        raise Unsupported("fill: only on the exact fill do batches of any size give the same bits")
    problem = s.case.problem
    few = s.draw(tokens=min(DISTINCT, problem.tokens))
    wanted = s.check(s.prepare(few.case.problem, few.backend_layer), few, "every token once").clone()
    call = s.prepare(problem, few.backend_layer)
    many = few.with_arguments({name: _repeated(t, problem.tokens) for name, t in few.arguments().items()})
    try:
        out, trace = s.call(call, many, f"{problem.tokens} tokens")
    except torch.OutOfMemoryError as error:
        raise Unsupported(f"memory: {problem.tokens} tokens do not fit: {str(error).splitlines()[0]}") from error
    s.traces.append(trace)
    different = _rows_that_differ(out, wanted)
    if len(different):
        row = int(different[0])
        column = int(torch.nonzero(out[row] != wanted[row % len(wanted)])[0])
        got, right = float(out[row, column]), float(wanted[row % len(wanted), column])
        s.require(
            False,
            f"{len(different)} of {problem.tokens} tokens, copies of {len(wanted)}, have another output than the first "
            f"copy: from token {row} to token {int(different[-1])}; token {row}, column {column}: {got} for {right}",
        )


def _repeated(t: Tensor, rows: int) -> Tensor:
    """The rows of t over and over, [rows, ...], fenced."""
    repeated = fence.empty(rows, *t.shape[1:], dtype=t.dtype, device=t.device)
    for first in range(0, rows, ROWS_AT_ONCE):
        part = repeated[first : first + ROWS_AT_ONCE]
        part.copy_(t[torch.arange(first, first + len(part), device=t.device) % len(t)])
    return repeated


def _rows_that_differ(out: Tensor, wanted: Tensor) -> Tensor:
    """The numbers of the rows of `out` that differ from the rows of `wanted`, repeated over and over; [n] int64."""
    differing = []
    for first in range(0, len(out), ROWS_AT_ONCE):
        part = out[first : first + ROWS_AT_ONCE]
        right = wanted[torch.arange(first, first + len(part), device=out.device) % len(wanted)]
        differing.append(first + torch.nonzero((part != right).any(1)).flatten())
    return torch.cat(differing)


@scenario("memory.padding_rows")
def padding_rows(s: Session) -> None:
    """Padding rows reach no other row: NaN or the largest numbers without a valid id, NaN with valid ids and weights
    of zero.

    A dynamic per-tensor scale is the exception by contract (reference/quant.py): it is taken from all rows of
    hidden_states, NaN ignored, whether or not an expert serves them. There the large rows hold a multiple of the
    largest number: 11 times, which moves every code, or 8 times on the exact fill, where scales are powers of two.
    """
    inputs = s.draw()
    problem = inputs.case.problem
    pads = torch.arange(problem.tokens, device=inputs.topk_ids.device) % 3 == 2
    pads[problem.tokens * 3 // 4 :] = True
    largest = float(inputs.hidden_states.abs().nan_to_num().amax())
    per_tensor = problem.quant is not None and problem.quant.over_rows
    times = 8 if s.case.fill == "exact" else 11
    large = times * largest if per_tensor else torch.finfo(inputs.hidden_states.dtype).max
    nan = float("nan")

    with_invalid_ids = replace(problem, routing="invalid")
    if s.backend.nan_safe and s.why_not(with_invalid_ids) is None:
        layer = replace(inputs.backend_layer, problem=with_invalid_ids)
        call = s.prepare(with_invalid_ids, layer)
        for value, what in ((nan, "NaN"), (large, "large")):
            padded = _padded(replace(inputs, backend_layer=layer), pads, value, -1, nan)
            s.check(call, padded, f"rows of {what} without a valid id")
    padded = _padded(inputs, pads, nan, None, 0.0)
    # The output of such a row is unspecified: 0 * NaN, or nothing.
    out, trace = s.call(s.prepare(problem, inputs.backend_layer), padded, "rows of NaN whose weights are 0")
    s.traces.append(trace)
    s.accept(out[~pads], _without(padded, pads), "beside rows of NaN whose weights are 0")


def _padded(inputs: Inputs, pads: Tensor, value: float, ids: int | None, weight: float) -> Inputs:
    """The batch with padding in the rows `pads`, [T] bool: hidden_states of this value, ids (None: as they were) and
    router weights."""
    copies = {name: fence.keep(t) for name, t in inputs.arguments().items()}
    copies["hidden_states"][pads] = value
    copies["topk_weights"][pads] = weight
    if ids is not None:
        copies["topk_ids"][pads] = ids
    return inputs.with_arguments(copies)


def _without(inputs: Inputs, pads: Tensor) -> Inputs:
    """The batch without these rows."""
    rest = {name: t[~pads] for name, t in inputs.arguments().items()}
    case = inputs.case.change(tokens=int((~pads).sum()))
    return inputs.with_arguments(rest, case=case)


@scenario("memory.no_wait")
def no_wait(s: Session) -> None:
    """A steady call reads nothing back from the device and never synchronizes with it."""
    require_promise(s, "no_wait")
    inputs, call = start(s)
    s.check(call, inputs)

    def steady() -> None:
        call(*inputs.arguments().values())

    with Tracing(), transfers(intended=s.device.on_cpu) as moved:
        steady()
    s.device.synchronize()
    waits = moved.waits + ["synchronize"] * host_calls.count(steady).synchronizes
    s.require(not waits, f"the call waits for the device: {', '.join(sorted(set(waits)))}")
    s.require(not moved.d2h, f"the call reads from the device: {', '.join(sorted(set(moved.d2h)))}")


@scenario("memory.stale")
def stale(s: Session) -> None:
    """Uninitialised memory holds finite numbers and small indices, as an earlier call leaves them."""
    inputs, call = start(s)
    with fence.stale():
        s.check(call, inputs, "workspaces full of an earlier call's numbers")


@scenario("memory.graph")
def graph(s: Session) -> None:
    """A captured graph of the call computes with the inputs and weights of its replay, whatever ran since its
    capture."""
    require_promise(s, "graph")
    if not s.device.captures_graphs:
        raise Unsupported("scenario: only CUDA captures graphs here")
    inputs, call = start(s)
    captured = inputs.with_arguments({name: fence.keep(t) for name, t in inputs.arguments().items()})
    s.check(call, captured, "before it is captured")
    replay: Any = s.device.graph_of(lambda: None, [lambda: call(*captured.arguments().values())])
    s.require(replay is not None, "the call cannot be captured in a graph: it waits for the device")

    def check_replay(other: Inputs, what: str, before: Callable[[], Any] = lambda: None) -> None:
        for name, tensor in captured.arguments().items():
            tensor.copy_(getattr(other, name))
        before()
        replay.microseconds()
        s.accept(replay.outputs[0], other, what)

    check_replay(inputs, "replayed")
    for routing in ("one", "duplicate", "half"):
        check_replay(batch(s, inputs, routing=routing), f"replayed with {routing} routing")
    larger = batch(s, inputs, tokens=4 * s.case.problem.tokens + 3)
    check_replay(inputs, "replayed after a larger batch", lambda: s.check(call, larger, "a larger batch"))
    other = s.draw(seed=s.case.seed + 1)
    for name, tensor in inputs.backend_layer.tensors().items():
        tensor.copy_(getattr(other.backend_layer, name))
    check_replay(replace(other, backend_layer=inputs.backend_layer), "replayed after the weights changed in place")
