"""Session and run_case: failures other than wrong numbers: memory, inputs, crashes, vacuous matches, reasons."""

import pytest
import torch

from harness.backend import BackendError, load
from harness.device import Device
from harness.problem.case import Case
from harness.run.case import run_case
from tests.support.emulated import Emulated

CPU = Device("cpu")
CASE = Case.parse("t9-h64-i64-e4-k2-bf16-random")


class Wrapped:
    """A correct backend whose call is `change(call, layer, x, weights, ids, out)`."""

    name, devices = "wrapped", {"cpu"}

    def __init__(self, change):
        self.change, self.inner = change, Emulated()

    def plans(self, problem):
        return self.inner.plans(problem)

    def prepare(self, problem, layer):
        call = self.inner.prepare(problem, layer)
        return lambda x, weights, ids, out=None: self.change(call, layer, x, weights, ids, out)


def verdict(change, case=CASE):
    return run_case(case, Wrapped(change), CPU)


def test_a_correct_backend_passes_and_says_its_budget():
    found = verdict(lambda call, layer, x, w, ids, out: call(x, w, ids, out=out))
    assert (found.status, found.calls) == ("passed", 1)
    assert 0.3 < found.budget < 1 and found.statistic == "rms" and found.plan == "act=io"
    assert found.trace["operators"] > 0


def test_out_may_be_ignored():
    assert verdict(lambda call, layer, x, w, ids, out: call(x, w, ids)).status == "passed"


def overrun(call, layer, x, w, ids, out):
    torch.as_strided(out, (out.numel() + 1,), (1,), out.storage_offset())[-1] = 3
    return call(x, w, ids, out=out)


def workspace_overrun(call, layer, x, w, ids, out):
    space = torch.empty(3, 5)
    torch.as_strided(space, (16,), (1,), space.storage_offset()).zero_()  # one element too many
    return call(x, w, ids, out=out)


def unwritten(call, layer, x, w, ids, out):
    out[:-1] = call(x, w, ids)[:-1]
    return out


def uninitialised(call, layer, x, w, ids, out):
    return call(x, w, ids, out=out) + 0 * torch.empty_like(x)  # reads memory that was never written


def set_input(call, layer, x, w, ids, out):
    result = call(x, w, ids)
    x[0, 0] += 1
    return result


def set_weights(call, layer, x, w, ids, out):
    result = call(x, w, ids)
    layer.w2[0, 0, 0] += 1
    return result


@pytest.mark.parametrize(
    "change, words",
    [
        (overrun, "canary"),
        (workspace_overrun, "outside of a workspace of its own: empty.memory_format (3, 5)"),
        (unwritten, "never written"),
        (uninitialised, "NaN"),
        (set_input, "hidden_states was changed"),
        (set_weights, "w2 was changed"),
        (lambda call, layer, x, w, ids, out: call(x, w, ids).float(), "returned"),
        (lambda call, layer, x, w, ids, out: call(x, w, ids)[:-1], "returned"),
        (lambda call, layer, x, w, ids, out: None, "NoneType"),
    ],
)
def test_failures_other_than_wrong_numbers(change, words):
    found = verdict(change)
    assert found.status == "failed" and words in found.reason + found.report
    # The tensors are shared: the next backend must not inherit the damage.
    assert verdict(lambda call, layer, x, w, ids, out: call(x, w, ids)).status == "passed"


def test_an_exception_is_a_crash_with_its_traceback():
    found = verdict(lambda call, layer, x, w, ids, out: 1 / 0)
    assert found.status == "crashed" and found.reason.startswith("ZeroDivisionError")
    assert "test_session.py" in found.report
    assert (found.error_type, found.device_lost) == ("ZeroDivisionError", False)
    assert verdict(lambda call, layer, x, w, ids, out: call(x, w, ids)).error_type == ""


def test_the_spec_of_the_backend_is_in_the_reproduction():
    assert "--backend wrapped " in run_case(CASE, Picky("dtype: only fp64"), CPU).reproduce.replace("picky", "wrapped")
    found = run_case(CASE, Emulated(), CPU, "layers", "tests.support.emulated:Emulated")
    assert (found.family, found.spec) == ("layers", "tests.support.emulated:Emulated")
    assert f"{CASE} --backend tests.support.emulated:Emulated --device cpu" in found.reproduce


@pytest.mark.parametrize("routing", ("nobody", "uniform"))
def test_a_match_that_proves_little_is_mistrusted(routing):
    case = CASE.change(routing=routing, tokens=0 if routing == "uniform" else 9)
    assert verdict(lambda call, layer, x, w, ids, out: call(x, w, ids), case).status == "mistrusted"


class Picky(Emulated):
    def __init__(self, answer):
        super().__init__("picky")
        self.answer = answer

    def supports(self, problem):
        return self.answer


def test_unsupported_needs_an_enumerated_reason():
    assert run_case(CASE, Picky("dtype: only fp64"), CPU).status == "unsupported"
    found = run_case(CASE, Picky("no time"), CPU)
    assert found.status == "crashed" and "begins with one of" in found.reason


@pytest.mark.parametrize(
    "spec, said",
    [
        ("nobody", "no such backend; known: .*triton"),
        ("no.such.module:X", "cannot import no.such.module: ModuleNotFoundError"),
        ("tests.support.emulated:Missing", "has no 'Missing'"),
        ("tests.support.emulated:CONTROLS", "has no attribute 'name'"),
    ],
)
def test_a_backend_that_cannot_be_loaded_says_why(spec, said):
    with pytest.raises(BackendError, match=said):
        load(spec)


def test_an_undeclared_plan_is_found():
    class Undeclared(Emulated):
        plans = property()  # hasattr() is False: as if never written

    found = run_case(CASE, Undeclared("undeclared", gate_up="io", slot="io"), CPU)
    assert found.status == "passed" and found.plan
