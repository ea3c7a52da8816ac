"""run_case: whatever a backend raises or answers is the verdict of its case, but for the user's own Ctrl-C."""

import os
import signal
import sys
import threading
from dataclasses import replace

import pytest

from harness.backend import BackendError, Unsupported
from harness.device import Device, DeviceLost
from harness.diagnose.failure import Failed
from harness.diagnose.report import Report
from harness.problem.case import Case, DescriptorError
from harness.run.case import run_case
from tests.support.emulated import Emulated

CPU = Device("cpu")
CASE = Case.parse("t9-h64-i64-e4-k2-bf16-random")


class Mute(Exception):
    def __str__(self):
        raise SystemExit

    __repr__ = __str__


class Hostile(BaseException):
    """Nothing that a traceback reads of it can be read."""

    __cause__ = __context__ = __notes__ = property(lambda self: 1 / 0)


class Base(BaseException):
    pass


def chained():
    error = ValueError("second")
    error.__cause__ = error.__context__ = Mute()
    return error


def endless():
    return endless()


def nested():
    error = ValueError("the innermost")
    for _ in range(3000):
        error = ExceptionGroup("a group", [error])  # noqa: F821 - Python 3.11
    return error


def raising(make):
    class Raising(Emulated):
        def run(self, *args, **kwargs):
            raise make()

    return Raising()


def verdict(backend, case=CASE):
    found = run_case(case, backend, CPU)
    assert run_case(case, Emulated(), CPU).status == "passed"  # nothing is left of it
    return found


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (SystemExit, "SystemExit"),
        (lambda: SystemExit(0), "SystemExit: 0"),
        (KeyboardInterrupt, "KeyboardInterrupt"),
        (GeneratorExit, "GeneratorExit"),
        (StopIteration, "StopIteration"),
        (lambda: Base("mine"), "Base: mine"),
        (MemoryError, "MemoryError"),
        (endless, "RecursionError: maximum recursion depth exceeded"),
        (Mute, "Mute: <str() raised SystemExit>"),
        (Hostile, "Hostile"),
        (chained, "ValueError: second"),
        (lambda: ValueError("x" * 10_000_000), "ValueError: " + "x" * 200 + "..."),
        (lambda: ValueError("\n\nfirst\nsecond"), "ValueError: first"),
        (lambda: pytest.skip.Exception("why"), "Skipped: why (a backend may not decide its own verdict)"),
        (lambda: pytest.fail.Exception("why"), "Failed: why (a backend may not decide its own verdict)"),
        (lambda: pytest.xfail.Exception("why"), "XFailed: why (a backend may not decide its own verdict)"),
        (lambda: pytest.exit.Exception("why"), "Exit: why (a backend may not decide its own verdict)"),
        (lambda: Unsupported("dtype: mine"), "Unsupported: dtype: mine (a backend may not decide its own verdict)"),
        (lambda: Failed(Report("mine")), "Failed: mine (a backend may not decide its own verdict)"),
        (lambda: DeviceLost("mine"), "DeviceLost: mine (a backend may not decide its own verdict)"),
        (lambda: BackendError("mine"), "mine"),
    ],
)
def test_whatever_a_call_raises_is_the_verdict_of_its_case(make, reason):
    found = verdict(raising(make))
    assert (found.status, found.reason[:200]) == ("crashed", reason[:200])
    assert "test_case.py" in found.report and len(found.report) < 300_000


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no exception groups")
def test_a_group_in_a_group_in_a_group_has_a_report():
    found = verdict(raising(nested))
    assert (found.status, found.reason) == ("crashed", "ExceptionGroup: a group (1 sub-exception)")
    assert "test_case.py" in found.report


@pytest.mark.parametrize("method", ["prepare", "supports", "plans", "available"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ValueError])
def test_a_method_that_raises_is_the_verdict_of_the_case(method, error):
    def raises(self, *args):
        raise error("no time")

    found = verdict(type("Mine", (Emulated,), {method: raises})())
    prefix = "" if method == "prepare" else f"emulated.{method}() raised "
    assert (found.status, found.error_type) == ("crashed", error.__name__)
    assert found.reason == f"{prefix}{error.__name__}: no time"


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("supports", True), ("supports", 7), ("supports", "no keyword"), ("available", 7), ("prepare", None),
        ("plans", None), ("plans", []), ("plans", "x"), ("plans", [{"bad": 1}]),
    ],
)  # fmt: skip
def test_a_method_that_answers_something_else_is_the_verdict_of_the_case(method, answer):
    found = verdict(type("Mine", (Emulated,), {method: lambda self, *args: answer})())
    assert found.status == "crashed"
    assert found.reason.startswith(f"emulated.{method}() answered {answer!r}; valid: ")


@pytest.mark.parametrize(
    ("scenario", "method", "answer"),
    [
        ("path.launches", "expected_launches", {"kernel"}),
        ("config.all", "configurations", 7),
        ("scratch.reuse", "make_scratch", None),
    ],
)
def test_a_scenario_names_the_method_that_answers_something_else(scenario, method, answer):
    mine = type("Mine", (Emulated,), {method: lambda self, *args: answer})()
    found = run_case(CASE.change(scenario=scenario), mine, CPU)
    assert found.status == "crashed"
    assert found.reason.startswith(f"emulated.{method}() answered {answer!r}; valid: ")


def test_a_sequence_names_its_steps_whatever_the_call_raises():
    pytest.importorskip("hypothesis")
    found = verdict(raising(SystemExit), Case.parse("t3-h32-i32-e4-k2-bf16-exact-sequence.calls"))
    assert found.status == "crashed" and found.reason == "Crashed: after 1 step: SystemExit"


def test_a_thread_of_a_race_that_exits_is_noticed():
    class Exits(Emulated):
        def run(self, *args, **kwargs):
            if threading.current_thread() is not threading.main_thread():
                raise SystemExit
            return super().run(*args, **kwargs)

    found = verdict(Exits(), CASE.change(scenario="swap.threads"))
    assert (found.status, found.reason) == ("crashed", "SystemExit")


def test_stages_that_raise_leave_the_failure_as_it_is():
    class Wrong(Emulated):
        def run(self, *args, **kwargs):
            return super().run(*args, **kwargs) * 2

        def stages(self, *args):
            raise SystemExit

    found = verdict(Wrong())
    assert found.status == "failed" and "not localised: the replay raised SystemExit" in found.report


@pytest.mark.parametrize("swallows", [False, True])
def test_ctrl_c_of_the_user_ends_the_run_even_if_the_backend_catches_it(swallows):
    class Interrupted(Emulated):
        def run(self, *args, **kwargs):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                if not swallows:
                    raise
            return super().run(*args, **kwargs)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            run_case(CASE, Interrupted(), CPU)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert verdict(raising(KeyboardInterrupt)).status == "crashed"
    finally:
        signal.signal(signal.SIGINT, before)


def test_where_sigint_is_ignored_no_ctrl_c_is_the_users():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert verdict(raising(KeyboardInterrupt)).status == "crashed"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_unknown_scenario_is_an_error_of_the_caller_not_a_crash_of_the_backend():
    with pytest.raises(DescriptorError, match="no scenario 'swap.copi_'; did you mean 'swap.copy_'"):
        run_case(replace(CASE, scenario="swap.copi_"), Emulated(), CPU)
