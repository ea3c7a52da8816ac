"""The protocol of a backend: every attribute, with its type, default and meaning, and the words that it may use.

docs/your-kernel.md has `protocol_table`. The public names are harness/backend.py's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from harness import device as devices
from harness.problem.case import Problem
from reference.plan import parse_plan

#: The only reasons for not running a case: every such reason begins with one of these keywords.
UNSUPPORTED = (
    "dtype", "quant", "activation", "bias", "expert_map", "invalid_ids", "router_weight_on_input", "layout", "shape",
    "shared_experts", "scenario", "fill", "device", "package", "memory",
)  # fmt: skip

#: What a backend may promise besides the right output, in `promises`.
PROMISES = {
    "errors": "bad arguments raise an error that names them, and nothing is written",
    "no_extra_tensor": "router weight on input allocates nothing more than router weight on output",
    "steady_scratch": "with a scratch object, permuting allocates nothing",
    "best_first": "route() returns a token's experts best first, and the smaller id first of equal ones",
    "small_sigmoids": "route() computes sigmoids to float32's relative precision, however small they are",
    "ascending": "align() keeps an expert's pairs in ascending order, and writes every element that it returns",
    "no_wait": "a steady-state call copies nothing from the device to the host, and never waits for the device",
    "graph": "a call can be captured in a graph, and replayed after inputs and weights changed in place",
    "one_build": "however many threads race the first call, one instance is built (call.instance.builds == 1)",
}

#: Changes of a layer between calls that a prepared call may notice, in `follows`.
FOLLOWS = {
    "in_place": "new values in the same tensors",
    "rebinding": "another tensor assigned to a field of the layer",
    "config": "another problem assigned to the layer",
}


@dataclass(frozen=True)
class AnswerRule:
    """What a method of the protocol may return."""

    valid: str
    accepts: Callable[[Any], bool]
    #: Whether it only declares something. No caller needs to know the exception that it raises.
    declares: bool = False


@dataclass(frozen=True)
class AttributeRule:
    """What an attribute of the protocol means and may be: for `protocol_table` and for the errors of `as_backend`."""

    meaning: str
    left_out: str  #: what holds for a backend without the attribute
    valid: str
    accepts: Callable[[Any], bool]
    arguments: str = ""  #: of a method: "(problem)"
    required: bool = False
    is_set: bool = False
    answer: AnswerRule | None = None  #: of a method
    words: tuple[str, ...] = ()  #: that a set may contain

    def resembles(self, value: Any) -> bool:
        """Whether a value is of the attribute's kind: a function, a set of words, a bool."""
        if self.arguments:
            return inspect.isroutine(value) or isinstance(value, (staticmethod, classmethod))
        return isinstance(value, (set, frozenset, list, tuple, str) if self.is_set else bool)


def _required(
    valid: str, accepts: Callable[[Any], bool], meaning: str, arguments: str = "", is_set: bool = False,
    answer: AnswerRule | None = None, words: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    rule = AttributeRule(meaning, "required", valid, accepts, arguments, True, is_set, answer, words)
    return field(metadata={"rule": rule})


def _method(arguments: str, meaning: str, left_out: str, answer: AnswerRule | None = None) -> Any:
    rule = AttributeRule(meaning, left_out, "a method", callable, arguments, answer=answer)
    return field(default=None, metadata={"rule": rule})


def _choice(default: Any, values: tuple[Any, ...], meaning: str, left_out: str = "") -> Any:
    def accepts(value: Any) -> bool:
        return any(type(value) is type(v) and value == v for v in values)  # 1 == True

    valid = ", ".join(map(repr, values))
    return field(default=default, metadata={"rule": AttributeRule(meaning, left_out or f"{default}", valid, accepts)})


def _words(default: Iterable[str], words: Iterable[str], meaning: str, left_out: str) -> Any:
    rule = AttributeRule(
        meaning, left_out, f"a set of {', '.join(words)}", _is_set_of(words), is_set=True, words=tuple(words)
    )
    return field(default=frozenset(default), metadata={"rule": rule})


def _is_set_of(words: Iterable[str]) -> Callable[[Any], bool]:
    known = list(words)
    return lambda value: (
        isinstance(value, Collection) and not isinstance(value, str) and all(word in known for word in value)
    )


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.+-]{1,80}", value) is not None


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_reason(value: Any) -> bool:
    return value is None or isinstance(value, str) and value.partition(":")[0] in UNSUPPORTED


def _are_plans(value: Any) -> bool:
    """Whether it is a list of plans; ValueError names a wrong field of a plan."""
    return isinstance(value, (list, tuple)) and bool(value) and all(parse_plan(plan) is not None for plan in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _are_launches(value: Any) -> bool:
    return _is_pair(value) and all(
        isinstance(names, Collection) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
        for names in value
    )


def _are_options(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(options, Mapping) and all(isinstance(key, str) for key in options)
        for name, options in value.items()
    )


def _are_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, torch.Tensor) for each in value.values())


def _is_permutation(value: Any) -> bool:
    return all(isinstance(getattr(value, name, None), torch.Tensor) for name in _PERMUTED)


_PERMUTED = ("hidden_states", "expert_first_token_offset", "permuted_idx", "inv_permuted_idx", "expert_ids")
_KEYWORDS = [word for word in UNSUPPORTED if word not in ("scenario", "fill", "device", "package")]  #: of supports()


@dataclass(eq=False)
class Backend:
    """A kernel author's object with every attribute of the protocol: its own, and defaults for those it leaves out.

    `as_backend` makes it. The attributes are read once. An optional method that is left out is None.
    """

    object: Any  #: as its author wrote it

    name: str = _required(
        "a string of at most 80 letters, digits, and _ . + -", _is_name,
        "its name in options, tables and results",
    )  # fmt: skip
    devices: frozenset[str] = _required(
        f"a set of {', '.join(devices.DEVICES)}", _is_set_of(devices.DEVICES),
        f"the devices it runs on, a set of {_code(devices.DEVICES)}", is_set=True, words=devices.DEVICES,
    )  # fmt: skip
    prepare: Callable[..., Callable[..., torch.Tensor]] = _required(
        "a method", callable,
        "returns what a serving engine keeps for a layer: `call(hidden_states, topk_weights, topk_ids, out=None)`, "
        "which returns the output [T, K]; `out` may be left out of the signature",
        "(problem, layer)", answer=AnswerRule("a callable", callable),
    )  # fmt: skip
    supports: Callable[..., str | None] | None = _method(
        "(problem)",
        f"`None`, or a reason that begins with one of the keywords {', '.join(_KEYWORDS)} and a colon: the case then "
        "counts as unsupported. With a parameter `device` it also gets the device's name",
        "every case is supported",
        AnswerRule(f"None, or text that begins with one of: {', '.join(UNSUPPORTED)}", _is_reason, declares=True),
    )
    declares: Callable[[Problem], str | None] | None = _method(
        "(problem)",
        "the adapted package's own answer to the same question: `None`, or its reason. `moe-harness capabilities` "
        "compares the two",
        "nothing to compare",
        AnswerRule("None, or text", _is_text, declares=True),
    )
    plans: Callable[[Problem], list[dict[str, Any]]] | None = _method(
        "(problem)",
        "the rounding plans that the kernel may follow, a list of dicts (`reference/plan.py`)",
        "the usual plans are tried, finest first, and the one that fits is printed",
        AnswerRule("a list of one or more rounding plans (reference/plan.py)", _are_plans, declares=True),
    )
    promises: frozenset[str] = _words(
        (), PROMISES,
        "guarantees besides the right output, a set of words of the table below",
        "the scenarios that check them are unsupported",
    )  # fmt: skip
    follows: frozenset[str] = _words(
        FOLLOWS, FOLLOWS,
        "the changes of a layer that a prepared call notices, a set of "
        + ", ".join(f"`{word}` ({meaning})" for word, meaning in FOLLOWS.items()),
        "all of them",
    )  # fmt: skip
    expected_launches: Callable[[Problem], tuple[Collection[str], Collection[str]]] | None = _method(
        "(problem)",
        "(required, forbidden): two sets of substrings of kernel names, checked against the trace of a call",
        "not checked",
        AnswerRule("(required, forbidden), two sets of strings", _are_launches, declares=True),
    )
    configurations: Callable[[Problem], dict[str, dict[str, Any]]] | None = _method(
        "(problem)",
        "its tile configurations, a dict from names to keyword options of `prepare()`: all of them are checked, not "
        "only the one it chooses",
        "only its own choice is checked",
        AnswerRule("a dict from names to dicts of keyword options", _are_options, declares=True),
    )
    batch_invariant: bool | str = _choice(
        False, (True, False, "configured"),
        "True: a token's output row has the same bits in every batch; `\"configured\"`: under any one of its "
        "configurations",
        "not checked",
    )  # fmt: skip
    deterministic: bool = _choice(True, (True, False), "False: repeated calls may differ in bits")
    nan_safe: bool = _choice(
        True, (True, False),
        "False: rows that no token needs are multiplied by zero, so NaN in them reaches the output. Such cases are "
        "then unsupported",
    )  # fmt: skip
    stages: Callable[..., dict[str, torch.Tensor]] | None = _method(
        "(call, hidden_states, topk_weights, topk_ids)",
        "one call of what `prepare()` returned, as a dict of the values between its stages "
        "(`harness/diagnose/localise.py` names them): a failure then says which stage is wrong",
        "a failure is localised in the output alone",
        AnswerRule("a dict from names of stages to tensors", _are_tensors),
    )
    route: Callable[..., Any] | None = _method(
        "(logits, top_k, method, **options)",
        "the router, which returns (topk_weights, topk_ids): checked by the family `routing`",
        "not checked",
        AnswerRule("(topk_weights, topk_ids)", _is_pair),
    )
    align: Callable[..., Any] | None = _method(
        "(topk_ids, block_size, num_experts, **options)",
        "the alignment, which sorts pairs (token, slot) by expert: checked by the family `alignment`",
        "not checked",
    )
    make_scratch: Callable[..., Any] | None = _method(
        "(problem, device, **sizes)",
        "an object whose attributes are reusable buffers for a batch of the problem's size: `prepare(problem, layer, "
        "scratch=)` and `permute()` take it. Checked by the scenarios `scratch.*`",
        "those scenarios are unsupported",
        AnswerRule("an object", lambda value: value is not None),
    )
    permute: Callable[..., Any] | None = _method(
        "(hidden_states, topk_ids, num_experts, expert_map=, scratch=)",
        "the permutation of a backend with `make_scratch()`: an object with hidden_states [P, K] sorted by expert, "
        "expert_first_token_offset [E + 1], permuted_idx [P], inv_permuted_idx [T, top_k] and expert_ids [P], "
        "-1 where a row has no pair",
        "needed with `make_scratch()`",
        AnswerRule(f"an object with tensors {', '.join(_PERMUTED)}", _is_permutation),
    )
    interpreted: bool = _choice(
        False, (True, False), "True for Triton kernels: on the CPU they run in Triton's interpreter"
    )
    xpu_contract: bool = _choice(
        False, (True, False),
        "True: without an XPU, `--device xpu` emulates one, and runs the backend's XPU path on CPU tensors",
    )  # fmt: skip
    available: Callable[[], str | None] | None = _method(
        "()", "`None`, or one line that says why it cannot be used here (a package is missing)", "usable",
        AnswerRule("None, or text", _is_text, declares=True),
    )  # fmt: skip


def rules() -> list[tuple[str, AttributeRule]]:
    """(attribute, its rule), in the order of the table."""
    return [(each.name, each.metadata["rule"]) for each in fields(Backend) if each.metadata]


def protocol_table() -> str:
    """The tables of docs/your-kernel.md in Markdown: the attributes of a backend, and what it may promise."""
    lines = ["| attribute | meaning | left out |", "|---|---|---|"]
    lines += [f"| `{name}{rule.arguments}` | {rule.meaning} | {rule.left_out} |" for name, rule in rules()]
    lines += ["", "| promise | meaning |", "|---|---|"]
    lines += [f"| `{word}` | {meaning} |" for word, meaning in PROMISES.items()]
    return "\n".join(lines) + "\n"
