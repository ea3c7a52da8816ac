"""Globals that a case changes: restored, and the failure of this case alone."""

import gc
import locale
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from harness.device import Device
from harness.problem.case import Case
from harness.run.case import run_case
from harness.run.globals import GLOBALS, Global
from harness.run.guard import Guard
from tests.support.emulated import Emulated

CPU = Device("cpu")
CASE = Case.parse("t9-h64-i64-e4-k2-bf16-random")


class Changing(Emulated):
    """A right output, and a change before or after it."""

    def __init__(self, change, raises=False):
        super().__init__()
        self.change, self.raises = change, raises

    def run(self, *args, **kwargs):
        out = super().run(*args, **kwargs)
        self.change()
        if self.raises:
            raise ValueError("and raised")
        return out


def verdict(change, raises=False):
    """The verdict on a case that changes a global; a right backend passes after it, in the same process."""
    found = run_case(CASE, Changing(change, raises), CPU)
    after = run_case(CASE, Emulated(), CPU)
    assert (after.status, after.notes) == ("passed", [])
    return found


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise RuntimeError("a mode that was left behind")


class DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def torch_threads():
    torch.set_num_threads(torch.get_num_threads() + 1)


def into_a_deleted_directory():
    os.mkdir("deleted")
    os.chdir("deleted")
    os.rmdir(os.getcwd())


def catch():
    caught = warnings.catch_warnings(record=True)
    caught.__enter__()


def knob():
    import triton

    triton.knobs.compilation.front_end_debugging = True


def handle(number, frame):
    pass


CHANGES = {
    "torch.get_default_dtype()": [lambda: torch.set_default_dtype(torch.float64)],
    "torch.set_default_device()": [lambda: torch.set_default_device("meta")],
    "the stack of TorchFunctionModes": [lambda: Mode().__enter__()],
    "torch.is_grad_enabled()": [lambda: torch.set_grad_enabled(False)],
    "torch.is_inference_mode_enabled()": [lambda: LEFT.append(torch.inference_mode()) or LEFT[-1].__enter__()],
    "torch.autocast": [lambda: torch.autocast("cpu").__enter__(), lambda: torch.set_autocast_dtype("cpu", torch.half)],
    "torch.is_anomaly_enabled()": [lambda: torch.autograd.set_detect_anomaly(True)],
    "torch.get_rng_state()": [lambda: torch.manual_seed(3), lambda: torch.rand(1)],
    "numpy.random.get_state()": [lambda: np.random.seed(3), np.random.rand],
    "random.getstate()": [lambda: random.seed(3), random.random],
    "torch.get_deterministic_debug_mode()": [lambda: torch.use_deterministic_algorithms(True)],
    "torch.backends.cudnn (enabled, benchmark, deterministic)": [
        lambda: setattr(torch.backends.cudnn, "benchmark", True)
    ],
    "torch's float32 precision (matmul, cuBLAS, cuDNN, by backend)": [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    ],
    "torch.get_num_threads()": [torch_threads],
    "torch.set_flush_denormal()": [lambda: torch.set_flush_denormal(True)],
    "torch.set_printoptions()": [lambda: torch.set_printoptions(precision=2)],
    "triton.knobs": [knob],
    "os.getcwd()": [lambda: os.chdir("/"), into_a_deleted_directory],
    "os.environ": [lambda: os.environ.update(A_NEW_VARIABLE="1"), lambda: os.environ.pop("HOME")],
    "os.umask()": [lambda: os.umask(0o007)],
    "signal.getsignal()": [lambda: signal.signal(signal.SIGTERM, handle), lambda: signal.signal(signal.SIGINT, handle)],
    "signal.getitimer()": [lambda: signal.alarm(1000)],
    "warnings.filters": [lambda: warnings.simplefilter("error"), lambda: warnings.filters.clear(), catch],
    "sys.path": [lambda: sys.path.insert(0, "elsewhere"), lambda: sys.path.clear()],
    "sys.stdout, sys.stderr, sys.stdin": [lambda: setattr(sys, "stdout", None)],
    "sys.getrecursionlimit()": [lambda: sys.setrecursionlimit(5000)],
    "sys.getswitchinterval()": [lambda: sys.setswitchinterval(0.5)],
    "sys.gettrace()": [lambda: sys.settrace(lambda *event: None)],
    "sys.getprofile()": [lambda: sys.setprofile(lambda *event: None)],
    "sys.excepthook, sys.unraisablehook, threading.excepthook": [lambda: setattr(sys, "excepthook", handle)],
    "gc.isenabled()": [gc.disable],
    "gc.get_threshold()": [lambda: gc.set_threshold(1)],
    "locale.setlocale()": [lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8" if unlike_c() else "C")],
    "multiprocessing.get_start_method()": [lambda: multiprocessing.set_start_method(other_method(), force=True)],
}
LEFT = []  #: contexts that stay entered
#: These cannot be changed here without an effect on the tests that follow, or need a GPU.
OTHERS = {"the stack of TorchDispatchModes", "torch.cuda.get_rng_state()", "torch.get_num_interop_threads()"}


def unlike_c():
    return locale.setlocale(locale.LC_ALL) == "C"


def other_method():
    return "forkserver" if multiprocessing.get_start_method(allow_none=True) == "spawn" else "spawn"


#: Globals that are changed by a call that then raises, too.
RAISED = ("torch.get_default_dtype()", "torch.is_inference_mode_enabled()", "os.environ", "sys.path")


@pytest.mark.parametrize(
    ("name", "change", "raises"),
    [(name, change, False) for name, changes in CHANGES.items() for change in changes]
    + [(name, CHANGES[name][0], True) for name in RAISED],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_global_is_the_failure_of_its_case_and_restored(name, change, raises, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (rule,) = (each for each in GLOBALS if each.name == name)
    before = rule.read()
    found = verdict(change, raises)
    assert rule.same(before, rule.read())
    if raises:
        assert (found.status, found.reason) == ("crashed", "ValueError: and raised")
    elif found.status != "crashed":  # with another default device or without paths the harness's own part may fail
        assert found.status == "failed" and found.reason.startswith(f"changed {name}: "), found.reason
    assert f"\nchanged {name}: " in f"\n{found.report}"
    assert "could not be restored" not in found.report


def test_every_global_has_a_change_that_is_noticed():
    assert {each.name for each in GLOBALS} == CHANGES.keys() | OTHERS


def test_the_old_and_the_new_value_are_in_the_reason():
    found = verdict(lambda: torch.set_default_dtype(torch.float64))
    assert found.reason == "changed torch.get_default_dtype(): torch.float32 -> torch.float64"
    found = verdict(lambda: os.environ.update(SECRET="hush", OTHER="x"))
    assert found.reason == "changed os.environ: OTHER, SECRET"  # values of the environment may be secret
    found = verdict(lambda: sys.path.append("elsewhere"))
    assert found.reason == "changed sys.path: added ['elsewhere']"
    found = verdict(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    assert found.reason.startswith("changed signal.getsignal(): SIGTERM: ")


def test_several_changes_are_all_named_and_restored():
    def change():
        torch.set_default_dtype(torch.float64)
        os.environ["A_NEW_VARIABLE"] = "1"
        gc.disable()

    found = verdict(change)
    assert [part.partition(":")[0] for part in found.reason.split("; ")] == [
        "changed torch.get_default_dtype()", "changed os.environ", "changed gc.isenabled()",
    ]  # fmt: skip


def test_a_dispatch_mode_that_was_left_behind_is_removed():
    guard = Guard()
    DispatchMode().__enter__()
    (changed,), _ = guard.changes()
    assert changed.startswith("changed the stack of TorchDispatchModes: [] -> [")
    assert Guard().changes() == ([], [])


def test_drawn_random_numbers_are_drawn_again():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    verdict(lambda: (torch.rand(3), np.random.rand(3), random.random()))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_a_change_of_supports_is_its_cases_failure_too():
    class Refuses(Emulated):
        def supports(self, problem):
            os.environ["A_NEW_VARIABLE"] = "1"
            return "dtype: none"

    found = run_case(CASE, Refuses(), CPU)
    assert (found.status, found.reason) == ("failed", "changed os.environ: A_NEW_VARIABLE")


def package(tmp_path, monkeypatch, text):
    """A change: the import of a package, which is new, with this text."""
    (tmp_path / "a_new_package.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_new_package", raising=False)
    return lambda: __import__("a_new_package")


def test_what_an_import_changes_is_a_note_and_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("A_NEW_VARIABLE", "0")
    found = verdict(package(tmp_path, monkeypatch, "import os\nos.environ['A_NEW_VARIABLE'] = '1'"))
    assert found.status == "passed"
    assert found.notes == ["changed os.environ: A_NEW_VARIABLE, as a_new_package was imported"]
    assert os.environ["A_NEW_VARIABLE"] == "1"


def test_an_import_excuses_no_change_of_arithmetic(tmp_path, monkeypatch):
    found = verdict(package(tmp_path, monkeypatch, "import torch\ntorch.set_default_dtype(torch.float64)"))
    assert found.reason == "changed torch.get_default_dtype(): torch.float32 -> torch.float64"
    assert torch.get_default_dtype() == torch.float32


def test_the_import_of_the_standard_library_excuses_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    monkeypatch.delitem(sys.modules, "this", raising=False)

    def change():
        import this  # noqa: F401

        os.environ["A_NEW_VARIABLE"] = "1"

    assert verdict(change).reason == "changed os.environ: A_NEW_VARIABLE"


def test_everything_is_restored_even_if_one_restore_fails():
    values = {"first": 1, "second": 2}

    def refuse(value):
        raise OSError("no")

    guarded = (
        Global("first", lambda: values["first"], refuse),
        Global("second", lambda: values["second"], lambda value: values.update(second=value)),
        Global("third", lambda: values["second"], lambda value: None, same=lambda a, b: a == b),
    )
    guard = Guard(guarded)
    values.update(first=7, second=8)
    assert guard.changes()[0] == [
        "changed first: 1 -> 7 (could not be restored: OSError: no)", "changed second: 2 -> 8"
    ]  # fmt: skip
    assert values == {"first": 7, "second": 2}


def test_a_thread_guards_what_it_can():
    changes = []

    def guarded():
        guard = Guard()
        os.environ["A_NEW_VARIABLE"] = "1"
        changes.extend(guard.changes()[0])

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert changes == ["changed os.environ: A_NEW_VARIABLE"] and "A_NEW_VARIABLE" not in os.environ


def test_a_guard_costs_few_calls():
    calls = []
    guard = Guard()
    guard.changes()
    sys.setprofile(lambda frame, event, function: calls.append(event))
    try:
        Guard().changes()
    finally:
        sys.setprofile(None)
    # Each is far below a microsecond, but for one of a generator, which takes two.
    assert sum(event in ("call", "c_call") for event in calls) < 320
