"""The protocol of a backend: every attribute has a default, a wrong value is named, and any object may be wrapped."""

import sys
from dataclasses import fields
from types import ModuleType

import pytest

from harness.backend import (
    FOLLOWS,
    Backend,
    BackendError,
    as_backend,
    forget,
    installed,
    load,
    protocol_table,
    unavailable,
    unsupported,
)
from harness.device import Device
from harness.problem.case import Case

CPU = Device("cpu")
PROBLEM = Case.parse("t1-h8-i8-e2-k1-bf16-exact").problem
NOT_METHODS = (
    "name", "devices", "promises", "follows", "batch_invariant", "deterministic", "nan_safe", "interpreted",
    "xpu_contract",
)  # fmt: skip


class Least:
    """The three attributes that are required."""

    name, devices = "least", {"cpu"}

    def prepare(self, problem, layer):
        return lambda hidden_states, topk_weights, topk_ids: hidden_states


@pytest.fixture
def module(monkeypatch):
    """An importable module; `load` finds what a test assigns to it."""
    made = ModuleType("made_up_backends")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_defaults_of_what_a_backend_leaves_out():
    backend = as_backend(Least())
    flags = {name: getattr(backend, name) for name in NOT_METHODS}
    assert flags == {
        "name": "least", "devices": {"cpu"}, "promises": frozenset(), "follows": set(FOLLOWS), "batch_invariant": False,
        "deterministic": True, "nan_safe": True, "interpreted": False, "xpu_contract": False,
    }  # fmt: skip
    optional = {f.name for f in fields(Backend)} - {*NOT_METHODS, "object", "prepare"}
    assert {name for name in optional if getattr(backend, name) is not None} == set()
    assert unavailable(backend, CPU) is None and unsupported(backend, PROBLEM, CPU) is None


def test_its_own_attributes_win():
    class Full(Least):
        promises, follows, deterministic, batch_invariant = ["errors"], ("config",), False, "configured"

        def supports(self, problem, device):
            return f"shape: not on {device}"

        def available(self):
            return "its package is missing"

    backend = as_backend(Full())
    assert backend.promises == {"errors"} and backend.follows == {"config"}
    assert backend.deterministic is False and backend.batch_invariant == "configured"
    assert unsupported(backend, PROBLEM, CPU) == "shape: not on cpu"
    assert unavailable(backend, CPU) == "package: its package is missing"


def test_wrapping_twice_changes_nothing():
    mine = Least()
    backend = as_backend(mine)
    assert as_backend(backend) is backend and backend.object is mine


def test_none_is_the_same_as_left_out():
    class Optional(Least):
        supports = stages = follows = None

    backend = as_backend(Optional())
    assert backend.supports is None and backend.stages is None and backend.follows == set(FOLLOWS)


@pytest.mark.parametrize(
    ("attribute", "value", "valid"),
    [
        ("name", "", "a string that is not empty"),
        ("name", 7, "a string that is not empty"),
        ("devices", {"tpu"}, "a set of cpu, cuda, xpu"),
        ("devices", "cpu", "a set of cpu, cuda, xpu"),
        ("prepare", "me", "a method"),
        ("supports", True, "a method"),
        ("promises", {"speed"}, "a set of errors, no_extra_tensor, "),
        ("promises", "errors", "a set of errors, no_extra_tensor, "),
        ("follows", {"in_place", 3}, "a set of in_place, rebinding, config"),
        ("deterministic", 0, "True, False"),
        ("deterministic", "no", "True, False"),
        ("nan_safe", "yes", "True, False"),
        ("interpreted", 1, "True, False"),
        ("xpu_contract", [], "True, False"),
        ("batch_invariant", "sometimes", "True, False, 'configured'"),
        ("configurations", {"small": {}}, "a method"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_valid(module, attribute, value, valid):
    module.Mine = type("Mine", (Least,), {attribute: value})
    with pytest.raises(BackendError) as raised:
        load("made_up_backends:Mine")
    assert str(raised.value).startswith(f"--backend made_up_backends:Mine: {attribute}={value!r}; valid: {valid}")


@pytest.mark.parametrize("attribute", ["name", "devices", "prepare"])
def test_a_missing_attribute_is_named(module, attribute):
    module.mine = type(
        "Mine", (), {k: v for k, v in vars(Least).items() if k in {*NOT_METHODS, "prepare"} - {attribute}}
    )()
    with pytest.raises(BackendError, match=f"made_up_backends:mine: it has no attribute '{attribute}'"):
        load("made_up_backends:mine")


def test_an_object_that_was_not_loaded_is_called_by_its_class():
    class Mine(Least):
        nan_safe = "perhaps"

    with pytest.raises(BackendError, match="^backend Mine: nan_safe='perhaps'"):
        unavailable(Mine(), CPU)


def test_installed_backends_are_loaded_once_until_they_are_forgotten():
    first = installed()
    assert [a is b for a, b in zip(first, installed(), strict=True)] == [True] * len(first)
    forget()
    assert not any(a is b for a, b in zip(first, installed(), strict=True))


def test_every_attribute_is_in_the_table():
    lines = protocol_table().splitlines()
    for each in fields(Backend)[1:]:
        assert sum(line.startswith((f"| `{each.name}`", f"| `{each.name}(")) for line in lines) == 1
