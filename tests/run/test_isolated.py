"""run/isolated.py: a worker that ends, hangs or loses its device is a verdict, and is replaced."""

import os

import pytest

from harness.device import Device, DeviceLost
from harness.problem.case import Case
from harness.run.isolated import IsolatedRunner, RunnerError
from tests.support.emulated import Emulated

CPU = Device("cpu")
CASE = Case.parse("t4-h64-i32-e4-k2-bf16-exact")


class Faulty(Emulated):
    """Batches of one size raise, lose the device, or end the process; others fail with the process id as reason."""

    def run(self, layer, x, weights, ids, out=None):
        if len(x) == 1:
            raise NameError("no such kernel")
        if len(x) == 2:
            LOST.append(True)
        if len(x) == 3:
            os._exit(3)
        if len(x) == 4:
            raise ValueError(f"process {os.getpid()}")
        return super().run(layer, x, weights, ids, out)


SPEC = f"{__name__}:Faulty"
LOST: list[bool] = []  #: not empty in a worker whose device is lost


def batch(tokens):
    return CASE.change(tokens=tokens)


@pytest.fixture
def runner(monkeypatch):
    def synchronize(self):
        if LOST:
            raise DeviceLost("cuda does not answer any more")

    monkeypatch.setattr(Device, "synchronize", synchronize)
    with IsolatedRunner(SPEC, CPU) as runner:
        yield runner


def test_an_exception_is_a_verdict_with_its_class_and_the_worker_goes_on(runner):
    process = runner.run(CASE).reason
    found = runner.run(batch(1))
    assert (found.status, found.error_type, found.device_lost) == ("crashed", "NameError", False)
    assert (found.reason, found.spec, found.backend) == ("NameError: no such kernel", SPEC, "emulated")
    assert runner.run(CASE).reason == process


def test_a_lost_device_is_a_verdict_and_the_worker_is_replaced(runner):
    process = runner.run(CASE).reason
    found = runner.run(batch(2))
    assert (found.status, found.error_type, found.device_lost) == ("crashed", "DeviceLost", True)
    assert found.reason == "device lost: cuda does not answer any more" and "in synchronize" in found.report
    assert runner.run(CASE).reason != process and runner.run(batch(5)).status == "passed"


def test_a_worker_that_ends_is_a_verdict_and_is_replaced(runner):
    found = runner.run(batch(3))
    assert (found.status, found.reason) == ("crashed", "the process ended with exit code 3")
    assert (found.spec, found.error_type, found.device_lost) == (SPEC, "", False)
    assert runner.run(batch(5)).status == "passed"


def test_a_fresh_run_is_in_a_new_worker(runner):
    assert runner.run(CASE).reason != runner.run_fresh(CASE).reason


def test_an_error_of_the_harness_is_raised():
    with IsolatedRunner("nobody", CPU) as runner, pytest.raises(RunnerError, match="no such backend"):
        runner.run(CASE)
