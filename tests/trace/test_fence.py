"""Fences: NaN beyond every tensor that a call is given, and the canaries in it."""

import pytest
import torch

from harness.device import Device
from harness.diagnose import failure
from harness.diagnose.failure import Failed
from harness.diagnose.report import Report
from harness.inputs.draw import draw
from harness.problem.case import Case
from harness.run.case import run_case
from harness.session.session import Session
from harness.trace import fence
from harness.trace.tracing import Trace
from tests.support.emulated import Emulated

CPU = Device("cpu")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def unexplained(monkeypatch):
    """That an answer is wrong is enough here; to say why takes longer than to find out."""
    plain = lambda backend, plans, judgement, inputs, what, *rest: Failed(Report("wrong", details=[f"wrong {what}"]))  # noqa: E731
    monkeypatch.setattr(failure, "failure", plain)


def beyond(t, n=1):
    """The n elements behind the tensor's end, and the n before its beginning."""
    before, behind = fence.fences(t)
    return torch.cat([before[-n:], behind[:n]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fences_of_floats_are_nan(dtype):
    assert beyond(fence.empty(3, 5, dtype=dtype, device=torch.device("cpu")), fence.FENCE).double().isnan().all()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_fences_of_integers_are_large(dtype):
    largest = torch.iinfo(dtype).max
    assert (beyond(fence.empty(3, 5, dtype=dtype, device=torch.device("cpu"))) > largest * 0.99).all()


@pytest.mark.parametrize("dtype", (*FLOATS, *INTEGERS, torch.bool), ids=str)
@pytest.mark.parametrize("place", (-1, 15))
def test_any_write_is_seen(dtype, place):
    tensor = fence.empty(3, 5, dtype=dtype, device=torch.device("cpu"))
    trace = Trace()
    trace.watch(tensor, "this one")
    assert trace.overrun() == ""
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + place).zero_()
    assert trace.overrun() == "this one"


def test_strides_and_alignment_are_those_of_the_tensor():
    rows = torch.arange(24.0).reshape(3, 8)[:, :5]
    kept = fence.keep(rows)
    assert kept.stride() == (8, 1) and torch.equal(kept, rows)
    assert kept.as_strided((21,), (1,))[5:8].isnan().all()  # between the rows
    assert kept.data_ptr() % 64 == torch.empty(9).data_ptr() % 64
    assert fence.fences(rows) is None and fence.fences(kept) is not None
    assert fence.fences(kept[:2]) is None  # a part of a tensor ends where the tensor goes on


@pytest.mark.parametrize("text", ("t7-h72-i40-e4-k2-bf16-bias-ep2.1-padded-random", "t0-h64-i64-e4-k2-fp32-random",
                                  "t7-h136-i72-e4-k2-fp16-e4m3.tensor.static-kn-ids64-exact"))  # fmt: skip
def test_every_tensor_of_a_case_is_fenced(text):
    case = Case.parse(text)
    for inputs in (draw(case), Session(case.change(scenario="repeat.bits"), Emulated(), CPU).draw()):
        for name, tensor in {**inputs.arguments(), **inputs.backend_layer.tensors()}.items():
            assert fence.fences(tensor) is not None, name


class Reads(Emulated):
    """A correct backend, but for a value that it takes from beyond the end of one of the call's tensors."""

    def __init__(self, name):
        super().__init__()
        self.tensor = name

    def run(self, layer, hidden_states, topk_weights, topk_ids, out=None):
        known = {"hidden_states": hidden_states, "topk_weights": topk_weights, "topk_ids": topk_ids, **layer.tensors()}
        tensor = known[self.tensor]
        end = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
        strange = torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + end)
        result = super().run(layer, hidden_states, topk_weights, topk_ids, out)
        return result.add_(strange.double().mul(1e-30).to(result.dtype))  # 0, if it is anything but NaN or huge


@pytest.mark.parametrize("name", ("hidden_states", "topk_weights", "w13", "w2", "w13_scale", "w2_scale", "w13_bias"))
def test_reading_beyond_a_tensor_changes_the_answer(name):
    case = Case.parse("t5-h32-i16-e2-k1-bf16-e4m3.block.group-bias-random")
    assert run_case(case, Emulated(), CPU).status == "passed"
    assert run_case(case, Reads(name), CPU).status == "failed"


def test_writing_beyond_an_input_fails():
    class Writes(Emulated):
        def run(self, layer, hidden_states, *rest, **keywords):
            torch.as_strided(hidden_states, (1,), (1,), hidden_states.storage_offset() - 1).zero_()
            return super().run(layer, hidden_states, *rest, **keywords)

    case = Case.parse("t5-h32-i16-e2-k1-bf16-random")
    found = run_case(case, Writes(), CPU)
    assert found.status == "failed" and "outside of hidden_states" in found.reason
    assert run_case(case, Emulated(), CPU).status == "passed"  # and the next backend does not inherit it


def test_extreme_rows_have_nan_at_both_ends_of_neighbouring_rows():
    x = draw(Case.parse("t16-h64-i64-e4-k2-bf16-extreme")).hidden_states.float()
    first, last = x[:, 0].isnan(), x[:, -1].isnan()
    assert first.any() and last.any() and not (first & last).any()
    assert not x[torch.nonzero(first).flatten() - 1].isnan().any()  # the row before could only get it by reading on
