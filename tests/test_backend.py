"""The protocol of a backend: every attribute has a default, a wrong value is named, and any object may be wrapped."""

import sys
from dataclasses import fields
from types import ModuleType

import pytest

from harness.backend import (
    BUILTIN,
    FOLLOWS,
    Backend,
    BackendError,
    as_backend,
    forget,
    installed,
    load,
    protocol_table,
    select,
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
        ("name", "", "a string of at most 80 letters, digits, and _ . + -"),
        ("name", 7, "a string of at most 80 letters, digits, and _ . + -"),
        ("name", "mine/../x", "a string of at most 80 letters, digits, and _ . + -"),
        ("name", "a\n::error::", "a string of at most 80 letters, digits, and _ . + -"),
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


def broken(what):
    """A function that raises SystemExit, as no `except Exception` catches it."""

    def raises(*args):
        raise SystemExit(what)

    return raises


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ({"devices": None}, "devices=None (a set of cpu, cuda, xpu)"),
        ({"__init__": lambda self, size: None}, "creating it without arguments raised TypeError: "),
        ({"__init__": broken("no memory")}, "creating it without arguments raised SystemExit: no memory"),
        ({"plans": property(broken("no plans"))}, "reading its attributes raised SystemExit: no plans"),
        ({"devices": [[]]}, "devices=[[]]; valid: a set of cpu, cuda, xpu"),
        ({"promises": {"eror"}}, "; did you mean 'errors'?"),
        ({"follows": ["rebind"]}, "; did you mean 'rebinding'?"),
        (
            {"promise": {"errors"}},
            "attribute 'promise', which is not of the protocol; did you mean 'promises'?",
        ),
        (
            {"suports": broken("")},
            "attribute 'suports', which is not of the protocol; did you mean 'supports'?",
        ),
        ({"plan": broken("")}, "attribute 'plan', which is not of the protocol; did you mean 'plans'?"),
        ({"determinstic": True}, "'determinstic', which is not of the protocol; did you mean 'deterministic'?"),
        (
            {"name": "triton"},
            "name='triton' is that of kernels.triton.backend:TritonMoE; valid: a name that no",
        ),
    ],
)
def test_a_class_that_breaks_the_protocol_is_an_error_in_one_line(module, mine, said):
    module.Mine = type("Mine", (Least,), mine)
    with pytest.raises(BackendError) as raised:
        load("made_up_backends:Mine")
    assert str(raised.value).startswith("--backend made_up_backends:Mine: ") and said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_helpers_of_ones_own_are_not_taken_for_misspelt_attributes(module):
    class Mine(Least):
        plan, _plans, router, interpreter = {"slot": "io"}, [], object(), "ipython"

        def permute_rows(self): ...

        def device(self): ...

    module.Mine = Mine
    assert load("made_up_backends:Mine").name == "least"


def test_an_attribute_that_is_nearly_a_required_one_is_suggested(module):
    module.Mine = type("Mine", (), {"names": "mine", "devices": {"cpu"}, "prepare": Least.prepare})
    with pytest.raises(BackendError, match="it has no attribute 'name'; did you mean 'names'?"):
        load("made_up_backends:Mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit(3)", "cannot import hostile_module: SystemExit: 3"),
        ("raise KeyboardInterrupt", "cannot import hostile_module: KeyboardInterrupt"),
        ("import os\nos.no_such_thing", "cannot import hostile_module: AttributeError: module 'os' has no attribute"),
        ("class Mein: ...", "module hostile_module has no 'Mine'; did you mean 'Mein'?"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch, text, said):
    (tmp_path / "hostile_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_module", raising=False)
    with pytest.raises(BackendError) as raised:
        load("hostile_module:Mine")
    assert str(raised.value).startswith(f"--backend hostile_module:Mine: {said}")
    sys.modules.pop("hostile_module", None)


def test_two_backends_of_one_name_cannot_run_together(module):
    module.Mine, module.Other = Least, type("Other", (Least,), {})
    with pytest.raises(BackendError, match="--backend made_up_backends:Other: name='least' is that of made_up_back"):
        select(["made_up_backends:Mine", "made_up_backends:Other"])
    assert len(select(["made_up_backends:Mine", "made_up_backends:Mine"])) == 1


def test_the_names_of_the_built_in_backends_are_their_own():
    assert [backend.name for backend in installed()][: len(BUILTIN)] == list(BUILTIN)


class Odd:
    """No text can be made of it."""

    def __repr__(self):
        raise SystemExit


@pytest.mark.parametrize(
    ("method", "answer", "valid"),
    [
        ("supports", 7, "None, or text that begins with one of: dtype, quant, "),
        ("supports", True, "None, or text that begins with one of: dtype, quant, "),
        ("supports", "no keyword", "None, or text that begins with one of: dtype, quant, "),
        ("available", 7, "None, or text"),
        ("declares", [], "None, or text"),
        ("plans", None, "a list of one or more rounding plans"),
        ("plans", [], "a list of one or more rounding plans"),
        ("plans", "x", "a list of one or more rounding plans"),
        ("expected_launches", {"kernel"}, "(required, forbidden), two sets of strings"),
        ("expected_launches", ("kernel", "other"), "(required, forbidden), two sets of strings"),
        ("configurations", {"small": 7}, "a dict from names to dicts of keyword options"),
        ("prepare", None, "a callable"),
        ("route", 7, "(topk_weights, topk_ids)"),
        ("stages", 7, "a dict from names of stages to tensors"),
        ("make_scratch", None, "an object"),
        ("permute", 7, "an object with tensors hidden_states, expert_first_token_offset, "),
    ],
)
def test_a_wrong_answer_is_named_with_what_is_valid(method, answer, valid):
    backend = as_backend(type("Mine", (Least,), {method: lambda self, *args: answer})())
    with pytest.raises(BackendError) as raised:
        getattr(backend, method)(PROBLEM)
    assert str(raised.value).startswith(f"least.{method}() answered {answer!r}; valid: {valid}")


def test_a_wrong_plan_and_an_answer_without_a_text_are_named():
    backend = as_backend(type("Mine", (Least,), {"plans": lambda self, problem: [{"bad": 1}]})())
    with pytest.raises(BackendError, match="unknown field 'bad'; valid fields: gate_up"):
        backend.plans(PROBLEM)
    backend = as_backend(type("Mine", (Least,), {"supports": lambda self, problem: Odd()})())
    with pytest.raises(BackendError, match=r"answered <Odd: repr\(\) raised SystemExit>; valid: None, or text"):
        unsupported(backend, PROBLEM, CPU)


@pytest.mark.parametrize(
    "method", ["supports", "available", "declares", "plans", "expected_launches", "configurations"]
)
def test_a_declaration_that_raises_is_an_error_that_names_it(method):
    backend = as_backend(type("Mine", (Least,), {method: broken("no time")})())
    with pytest.raises(BackendError, match=rf"^least\.{method}\(\) raised SystemExit: no time$"):
        getattr(backend, method)(PROBLEM)


def test_what_a_computation_raises_stays_as_it_is():
    def route(self, logits):
        raise ValueError("top_k is 0")

    with pytest.raises(ValueError, match="^top_k is 0$"):
        as_backend(type("Mine", (Least,), {"route": route})()).route(None)


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
