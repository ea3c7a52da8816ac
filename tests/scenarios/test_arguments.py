"""The scenarios of arguments in other memory: each notices the fault that it is there for, and no other."""

import pytest
import torch

from harness.device import Device, DeviceLost
from harness.problem.case import Case
from harness.run.case import run_case
from tests.support.emulated import Emulated

CPU = Device("cpu")
SCENARIOS = ("own_output", "strided_out", "neighbours", "strided_routing", "strided_layer")


def verdict(backend, scenario, text="t5-h32-i16-e4-k2-bf16-bias-exact"):
    return run_case(Case.parse(f"{text}-arguments.{scenario}"), backend, CPU)


def flat(t):
    """The elements from the first on, whatever the strides, in t's shape."""
    return t.as_strided(t.shape, torch.empty(t.shape, device="meta").stride())


class Faulty(Emulated):
    """A correct backend but for one fault."""

    def __init__(self, fault):
        super().__init__("faulty")
        self.fault, self.workspace = fault, torch.empty(0)

    def run(self, layer, x, weights, ids, out=None):
        if self.fault == "refuses strides" and not (weights.is_contiguous() and ids.is_contiguous()):
            raise ValueError(f"topk_weights: stride {weights.stride()}; valid: contiguous")
        if self.fault == "refuses without a reason" and not weights.is_contiguous():
            raise ValueError("no")
        if self.fault == "neighbours are strangers" and out is not None:
            ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (x, out)]
            if ranges[0][1] == ranges[1][0] or ranges[1][1] == ranges[0][0]:
                raise ValueError("out overlaps hidden_states")
        if self.fault == "weights assumed dense":
            weights = flat(weights)
        if self.fault == "ids assumed dense":
            ids = flat(ids)
        result = super().run(layer, x, weights, ids)
        if out is None and self.fault == "one workspace":
            if len(self.workspace) < len(x):
                self.workspace = torch.empty(len(x) + 9, x.shape[1], dtype=x.dtype)
            return self.workspace[: len(x)].copy_(result)
        if out is None and self.fault == "in place":
            return x.copy_(result)
        if out is not None and self.fault == "out assumed dense":
            flat(out).copy_(result)
            return out
        return result if out is None else out.copy_(result)


class Raises(Emulated):
    """A correct backend that raises this where the router's weights have strides."""

    def __init__(self, error):
        super().__init__("raises")
        self.error = error

    def run(self, layer, x, weights, ids, out=None):
        if not weights.is_contiguous():
            raise self.error
        return super().run(layer, x, weights, ids, out)


@pytest.mark.parametrize(
    "error, status",
    [
        (RuntimeError("topk_weights must be contiguous"), "unsupported"),
        (AssertionError("stride of the last dimension must be 1"), "unsupported"),
        (RuntimeError("out of range"), "crashed"),
        (AssertionError(), "crashed"),
        (ValueError("no"), "failed"),
    ],
)
def test_what_a_compiled_operator_raises_is_a_refusal_if_it_names_strides_and_a_crash_if_not(error, status):
    assert verdict(Raises(error), "strided_routing").status == status


def test_a_lost_device_is_nobody_s_refusal(monkeypatch):
    def synchronize(self):
        raise DeviceLost("a contiguous copy never came back")

    monkeypatch.setattr(Device, "synchronize", synchronize)
    with pytest.raises(DeviceLost):
        verdict(Faulty("none"), "strided_routing")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_correct_backend(scenario):
    assert verdict(Faulty("none"), scenario).status == "passed"
    assert verdict(Faulty("none"), scenario, "t1-h32-i16-e4-k1-bf16-exact").status == "passed"


@pytest.mark.parametrize(
    "fault, scenario",
    (
        ("one workspace", "own_output"), ("in place", "own_output"), ("out assumed dense", "strided_out"),
        ("neighbours are strangers", "neighbours"),
        ("weights assumed dense", "strided_routing"), ("ids assumed dense", "strided_routing"),
    ),
)  # fmt: skip
def test_a_fault_is_noticed_where_it_is_asked_about(fault, scenario):
    assert verdict(Faulty(fault), scenario).status == "failed"
    others = [other for other in SCENARIOS if other != scenario]
    assert [verdict(Faulty(fault), other).status for other in others] == ["passed"] * len(others)


def test_a_refusal_names_what_it_refuses():
    found = verdict(Faulty("refuses strides"), "strided_routing")
    assert found.status == "unsupported" and "stride" in found.reason
    assert verdict(Faulty("refuses without a reason"), "strided_routing").status == "failed"


@pytest.mark.parametrize("scenario", ("strided_out", "neighbours"))
def test_who_takes_no_out_is_not_asked(scenario):
    class NoOut(Emulated):
        def prepare(self, problem, layer):
            return lambda x, weights, ids: self.run(layer, x, weights, ids)

    found = verdict(NoOut("no-out"), scenario)
    assert found.status == "unsupported" and found.reason == "scenario: no-out takes no out"
