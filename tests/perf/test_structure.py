"""Structural metrics: each against a call whose count is known by construction."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from harness.device import Device
from harness.perf.count.structure import CallCounts, NotCorrect, NotMeasured, measure
from harness.perf.metrics import STRUCTURE
from harness.problem.case import Case
from tests.support import interpreted  # noqa: F401  skips where kernels are not interpreted
from tests.support.emulated import Emulated
from tests.support.tiny_kernels import copy_kernel

CPU = Device("cpu")
CASE = Case.parse("t4-h64-i32-e4-k2-bf16-random")


class Extra:
    """A correct backend that also does `extra(x, ids)` in every call."""

    name, devices = "extra", {"cpu"}

    def __init__(self, extra=None, scale=1.0):
        self.extra, self.scale, self.inner = extra, scale, Emulated()

    def plans(self, problem):
        return self.inner.plans(problem)

    def prepare(self, problem, layer):
        inner, extra, scale = self.inner.prepare(problem, layer), self.extra, self.scale

        def call(x, weights, ids, out=None):
            if extra is not None:
                extra(x, ids)
            return inner(x, weights, ids, out=out).mul_(scale)

        return call


PLAIN: list = []


def plain() -> CallCounts:
    PLAIN[:] = PLAIN or [measure(CASE, Extra(), CPU)]
    return PLAIN[0]


def more(extra) -> Counter:
    """What metrics `extra` raises, and by how much."""
    found = measure(CASE, Extra(extra), CPU).metrics
    return {name: found[name] - plain().metrics[name] for name in STRUCTURE if found[name] != plain().metrics[name]}


def write_number(x, ids):
    x.view(-1)[0:0] = 1.0


NUMBERS = torch.tensor([0, 1])
MASK = torch.tensor([True, False, True, False])
#: What a call does besides, and what that adds; one more function is called in each.
EXTRAS = {
    "contiguous": (lambda x, ids: x.t().contiguous(), dict(operators=2, allocations=1, allocated_bytes=4 * 64 * 2)),
    "clone": (lambda x, ids: (x.clone(), x.clone()), dict(operators=2, allocations=2, allocated_bytes=2 * 4 * 64 * 2)),
    "in place": (lambda x, ids: ids.mul_(1), dict(operators=1)),
    "a view": (lambda x, ids: x.view(-1), dict(operators=1)),
    "item": (lambda x, ids: NUMBERS[0].item(), dict(operators=2, copies_d2h=1, syncs=1)),
    "float()": (lambda x, ids: float(NUMBERS[0]), dict(operators=2, copies_d2h=1, syncs=1)),
    "if tensor": (lambda x, ids: 1 if MASK.any() else 0,
                  dict(operators=2, allocations=1, allocated_bytes=1, copies_d2h=1, syncs=1)),
    "tolist": (lambda x, ids: NUMBERS.tolist(), dict(copies_d2h=1, syncs=1)),
    "cpu": (lambda x, ids: NUMBERS.cpu(), dict(copies_d2h=1, syncs=1)),
    "numpy": (lambda x, ids: NUMBERS.numpy(), dict(operators=1, copies_d2h=1, syncs=1)),
    "mask as index": (lambda x, ids: x[MASK], dict(operators=1, allocations=1, allocated_bytes=2 * 64 * 2, syncs=1)),
    "positions as index": (lambda x, ids: x[NUMBERS], dict(operators=1, allocations=1, allocated_bytes=2 * 64 * 2)),
    "nonzero": (lambda x, ids: MASK.nonzero(), dict(operators=1, allocations=1, allocated_bytes=2 * 8, syncs=1)),
    "torch.tensor": (lambda x, ids: torch.tensor([1, 2]),
                     dict(operators=1, copies_h2d=1, syncs=1)),
    "a list as index": (lambda x, ids: NUMBERS[[0, 1]],
                        dict(operators=2, allocations=1, allocated_bytes=2 * 8, copies_h2d=1, syncs=1)),
    "synchronize": (lambda x, ids: torch.cpu.synchronize(), dict(syncs=1)),
    "a function": (lambda x, ids: CASE.change(), None),
}  # fmt: skip


@pytest.mark.parametrize("extra, adds", EXTRAS.values(), ids=EXTRAS)
def test_additional_work_of_a_call_is_counted(extra, adds):
    found = more(extra)
    if adds is None:
        assert set(found) == {"python_calls"} and found["python_calls"] > 2
        return
    assert found.pop("python_calls") >= 1
    assert found == adds


def test_writing_one_number_is_no_copy_and_no_wait():
    found = more(write_number)
    assert not {"copies_h2d", "copies_d2h", "syncs"} & set(found)


def test_writing_one_number_where_a_mask_holds_is_no_wait():
    scratch = torch.zeros(4)
    found = more(lambda x, ids: scratch.__setitem__(MASK, 0.0))
    assert not {"copies_h2d", "copies_d2h", "syncs"} & set(found)
    found = more(lambda x, ids: scratch.__setitem__(MASK, torch.zeros_like(scratch[:2])))
    assert found["syncs"] == 1


def test_python_functions_are_counted_and_named():
    def helper(n):
        return n and helper(n - 1)

    one = measure(CASE, Extra(lambda x, ids: helper(0)), CPU)
    five = measure(CASE, Extra(lambda x, ids: helper(4)), CPU)
    assert five.metrics["python_calls"] - one.metrics["python_calls"] == 4
    assert five.functions["tests.perf.test_structure.helper"] == 5


def launch(x, ids, grid, block=16):
    copy_kernel[grid](x, x.view(-1), x.numel(), BLOCK=block, num_warps=2)


@pytest.mark.parametrize("grid", [(2, 3), lambda meta: (2, 3)], ids=["tuple", "function"])
def test_launches_have_a_name_and_a_grid(grid):
    found = measure(CASE, Extra(partial(launch, grid=grid)), CPU)
    assert found.kernels == ["copy_kernel[2,3]"]
    assert (found.metrics["launches"], found.metrics["programs"]) == (1, 6)
    assert found.launches[0]["options"] == {"num_warps": 2}


def test_the_work_of_the_interpreter_is_not_counted():
    small, large = (measure(CASE, Extra(partial(launch, grid=(n,))), CPU).metrics for n in (1, 16))
    assert {n for n in small if small[n] != large[n]} == {"programs"}
    assert small["python_calls"] < plain().metrics["python_calls"] + 5


def test_triton_is_left_as_it_was():
    before = InterpretedFunction.run, triton.runtime.jit.JITFunction.run
    measure(CASE, Extra(partial(launch, grid=(1,))), CPU)
    assert (InterpretedFunction.run, triton.runtime.jit.JITFunction.run) == before


def test_launches_keep_no_tensor():
    found = measure(CASE, Extra(partial(launch, grid=(1,))), CPU)
    assert CallCounts.from_record(json.loads(json.dumps(found.record()))) == found


def test_a_wrong_case_has_no_numbers():
    with pytest.raises(NotCorrect, match="failed") as error:
        measure(CASE, Extra(scale=2.0), CPU)
    assert error.value.verdict.status == "failed"


def test_an_unsupported_case_has_no_numbers():
    backend = Extra()
    backend.supports = lambda problem: "dtype: not this one"
    with pytest.raises(NotMeasured, match="dtype: not this one"):
        measure(CASE, backend, CPU)


def test_a_call_that_is_never_the_same_has_no_numbers():
    calls = []

    def sometimes(x, ids):
        calls.append(1)
        if len(calls) % 2:
            CASE.change()

    with pytest.raises(NotMeasured, match="no steady state.*change"):
        measure(CASE, Extra(sometimes), CPU)


def test_the_numbers_are_the_same_every_time():
    assert len({json.dumps(measure(CASE, Extra(), CPU).record(), sort_keys=True) for _ in range(3)}) == 1
