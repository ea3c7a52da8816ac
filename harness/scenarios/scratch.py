"""Scenarios of the reusable scratch object: same pointers, same results, no allocation, and errors that name the fault.

For backends with make_scratch(problem, device, **sizes), permute(hidden_states, topk_ids, num_experts, expert_map=,
scratch=) and prepare(problem, layer, scratch=).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import Unsupported
from harness.inputs.draw import Inputs
from harness.scenarios.registry import batch, must_refuse, require_promise, scenario
from harness.session.session import Session
from harness.trace.bits import same_bits
from harness.trace.tracing import Tracing, poison_


def _start(s: Session, capacity: int | None = None, **sizes: Any) -> tuple[Inputs, Callable[..., Tensor], Any]:
    """Draw inputs and prepare their layer with a scratch object for `capacity` tokens (those of the case by default);
    returns (inputs, call, scratch). sizes: further arguments of make_scratch()."""
    if s.backend.make_scratch is None:
        raise Unsupported(f"scenario: {s.backend.name} has no scratch object")
    inputs = s.draw()
    problem = inputs.case.problem
    largest = replace(problem, tokens=max(1, capacity if capacity is not None else problem.tokens))
    scratch = s.backend.make_scratch(largest, s.device.torch, **sizes)
    return inputs, s.prepare(problem, inputs.backend_layer, scratch=scratch), scratch


def buffers(scratch: Any) -> dict[str, Tensor]:
    """The scratch object's tensors."""
    return {name: value for name, value in vars(scratch).items() if isinstance(value, Tensor)}


def _permute(s: Session, inputs: Inputs, scratch: Any) -> Any:
    problem = inputs.case.problem
    assert s.backend.permute is not None, "a backend with make_scratch() has permute()"
    return s.backend.permute(
        inputs.hidden_states,
        inputs.topk_ids,
        problem.num_experts,
        expert_map=inputs.backend_layer.expert_map,
        scratch=scratch,
    )


@scenario("scratch.reuse")
def reuse(s: Session) -> None:
    """Every call uses the same buffers at the same addresses and returns the same results; poisoned between calls."""
    inputs, call, scratch = _start(s)
    before = {name: t.data_ptr() for name, t in buffers(scratch).items()}
    s.require(bool(before), "the scratch object holds no tensors")
    for n in (1, 2, 3):
        s.check(call, inputs, f"use {n}")
        moved = [name for name, t in buffers(scratch).items() if t.data_ptr() != before.get(name)]
        s.require(not moved, f"use {n} replaced the scratch's {', '.join(moved)}")
        for tensor in buffers(scratch).values():
            poison_(tensor)


@scenario("scratch.pointers")
def pointers(s: Session) -> None:
    """permute() returns the scratch's own memory every time, and a permutation of the tokens' rows."""
    inputs, _, scratch = _start(s)
    first = _permute(s, inputs, scratch)
    tensors = {n: t for n, t in vars(first).items() if isinstance(t, Tensor)}
    again = _permute(s, inputs, scratch)
    owned = {t.untyped_storage().data_ptr() for t in buffers(scratch).values()}
    for name, tensor in tensors.items():
        s.require(getattr(again, name).data_ptr() == tensor.data_ptr(), f"permute().{name} moved between two calls")
        s.require(tensor.untyped_storage().data_ptr() in owned, f"permute().{name} is not memory of the scratch")
    rows = int(first.expert_first_token_offset[-1])
    pairs = first.permuted_idx[:rows].long()
    top_k = inputs.case.problem.top_k
    got, wanted = first.hidden_states[:rows], inputs.hidden_states[pairs // top_k]
    s.require(same_bits(got, wanted), "permuted rows are not the tokens'")
    inverse = first.inv_permuted_idx.flatten().long()
    s.require(bool((inverse[pairs] == torch.arange(rows, device=pairs.device)).all()), "inv_permuted_idx is no inverse")
    s.require(int((inverse >= 0).sum()) == rows, "inv_permuted_idx names rows that do not exist")
    numbers = torch.arange(len(first.expert_ids), device=pairs.device)
    owner = torch.searchsorted(first.expert_first_token_offset, numbers, right=True) - 1
    owner = torch.where(numbers < rows, owner, -1)
    s.require(
        bool((first.expert_ids == owner).all()), "expert_ids are not what expert_first_token_offset says, or not -1"
    )
    s.require(bool((first.permuted_idx[rows:] == -1).all()), "permuted_idx names pairs behind the last row")
    s.require(not bool(first.hidden_states[rows:].any()), "rows behind the last pair are not zeros")
    call = s.prepare(inputs.case.problem, inputs.backend_layer, scratch=scratch)
    s.check(call, inputs)


@scenario("scratch.sizes")
def sizes(s: Session) -> None:
    """Batches that grow up to the scratch's capacity and shrink again: no row of a larger batch remains."""
    most = s.case.problem.tokens
    inputs, call, scratch = _start(s, capacity=most)
    before = {name: t.data_ptr() for name, t in buffers(scratch).items()}
    for tokens in (n for n in (most, 1, most // 2, most - 1, 0, 2, most) if 0 <= n <= most):
        s.check(call, batch(s, inputs, tokens=tokens), f"{tokens} of {most} tokens")
        # A captured graph of another batch size goes on using the addresses of its own capture.
        moved = [name for name, t in buffers(scratch).items() if t.data_ptr() != before.get(name)]
        s.require(not moved, f"{tokens} of {most} tokens replaced the scratch's {', '.join(moved)}")


@scenario("scratch.interleaved")
def interleaved(s: Session) -> None:
    """Two layers that share one scratch object, as all layers of a model do, called in turn."""
    inputs, call, scratch = _start(s)
    other = s.draw(seed=s.case.seed + 1)
    other_call = s.prepare(other.case.problem, other.backend_layer, scratch=scratch)
    for n in (1, 2):
        s.check(call, inputs, f"first layer, round {n}")
        s.check(other_call, other, f"second layer, round {n}")


@scenario("scratch.ids")
def ids(s: Session) -> None:
    """int32 and int64 ids in turn with one scratch object."""
    inputs, call, _ = _start(s)
    for bits in (32, 64, 32):
        s.check(call, batch(s, inputs, ids=bits), f"int{bits} ids")


@scenario("scratch.hidden_size")
def hidden_size(s: Session) -> None:
    """A scratch object without buffers for hidden_states serves any hidden size."""
    inputs, call, scratch = _start(s, hidden_size=None, hidden_dtype=None)
    s.check(call, inputs, "scratch without hidden_size")
    other = s.draw(hidden_size=s.case.problem.hidden_size + 64)
    s.check(s.prepare(other.case.problem, other.backend_layer, scratch=scratch), other, "another hidden_size")


@scenario("scratch.steady")
def steady(s: Session) -> None:
    """In steady state permute() allocates nothing, with int32 and with int64 ids."""
    require_promise(s, "steady_scratch")
    inputs, call, scratch = _start(s)
    s.check(call, inputs)
    for bits in (32, 64):
        again = batch(s, inputs, ids=bits)
        with Tracing() as trace:
            _permute(s, again, scratch)
        allocated = [f"{a.op} {a.shape} {a.dtype}" for a in trace.allocations]
        s.require(not allocated, f"permute() with a scratch and int{bits} ids allocated: {'; '.join(allocated)}")


def _refused(s: Session, inputs: Inputs, scratch: Any, words: tuple[str, ...], what: str) -> None:
    """Failed unless permute() raises an error that contains one of the words, and writes nothing to the scratch."""
    for tensor in buffers(scratch).values():
        poison_(tensor)
    must_refuse(s, what, words, lambda: _permute(s, inputs, scratch), buffers(scratch))


@scenario("scratch.refuses")
def refuses(s: Session) -> None:
    """A wrong dtype, top_k or hidden size, too many tokens, non-contiguous buffers: refused, and nothing is written."""
    require_promise(s, "errors")
    inputs, call, scratch = _start(s)
    problem = s.case.problem
    ids, x = inputs.topk_ids, inputs.hidden_states
    other = torch.float32 if x.dtype != torch.float32 else torch.float16
    _refused(s, replace(inputs, hidden_states=x.to(other)), scratch, ("dtype",), "another dtype")
    _refused(
        s, replace(inputs, hidden_states=x[:, :-16].contiguous()), scratch, ("hidden_size",), "another hidden_size"
    )
    _refused(s, replace(inputs, topk_ids=torch.cat([ids, ids[:, :1]], 1)), scratch, ("top_k",), "another top_k")
    more = batch(s, inputs, tokens=problem.tokens + 1)
    _refused(s, more, scratch, ("tokens",), "one token too many")
    _refused(s, replace(inputs, topk_ids=ids.float()), scratch, ("topk_ids",), "floating-point ids")
    for name, tensor in buffers(scratch).items():
        if tensor.numel() > 1:
            buffer = torch.empty(2 * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            strided = buffer.as_strided(tensor.shape, [2 * n for n in tensor.stride()])
            setattr(scratch, name, strided)
            _refused(s, inputs, scratch, ("contiguous",), f"a non-contiguous {name}")
            setattr(scratch, name, tensor)
    s.check(call, inputs, "after the refusals")


@scenario("scratch.device")
def device(s: Session) -> None:
    """Tensors on another device than the scratch object's are refused; "cuda" and "cuda:0" are one device."""
    require_promise(s, "errors")
    inputs, call, scratch = _start(s)
    elsewhere = "meta" if s.device.on_cpu else "cpu"
    away = replace(inputs, hidden_states=inputs.hidden_states.to(elsewhere), topk_ids=inputs.topk_ids.to(elsewhere))
    _refused(s, away, scratch, ("device",), f"tensors on {elsewhere}")
    assert s.backend.make_scratch is not None
    named = s.backend.make_scratch(s.case.problem, torch.device(s.device.torch.type))
    s.check(
        s.prepare(s.case.problem, inputs.backend_layer, scratch=named),
        inputs,
        "scratch made for a device without an index",
    )
    s.check(call, inputs, "after the refusal")
