"""Descriptors in words, for a reader who does not know the grammar of problem/case.py.

`in_words` describes a case for a terminal, `meanings` the tokens of descriptors for the report, `glossary` every token
for `moe-harness list --grammar`. All three read the tables below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from harness.base.table import labelled
from harness.problem.case import DEFAULTS, GRAMMAR, OF_CASES, Case, ExpertParallel, Quant, TokenRule

#: Names of fields, where the name in the code says too little.
NAMES = {
    "quant": "quantization", "ep": "expert parallelism", "ids": "topk_ids", "limit": "clamp", "padded": "padding",
}  # fmt: skip
#: The meaning of a value, by field. E: experts, I: intermediate_size, K: hidden_size, g: gate, u: up projection.
MEANINGS: dict[str, dict[Any, str]] = {
    "quant": {None: "unquantized"},
    "activation": {
        "silu": "silu(g) * u",
        "gelu": "gelu(g) * u",
        "gelu_tanh": "gelu(g) * u, tanh approximation",
        "swigluoai": "g * sigmoid(1.702 g) * (u + 1), clamped at 7 by default, g and u interleaved",
        "relu2": "relu(h)^2, no gate",
    },
    "limit": {None: "none"},
    "ids": {32: "int32", 64: "int64"},
    "bias": {False: "none", True: "both GEMMs have a bias"},
    "router_weight_on_input": {False: "no, on output", True: "applied on input"},
    "layout": {"nk": "w13 [E, 2I, K], w2 [E, K, I]", "kn": "w13 [E, K, 2I], w2 [E, I, K]"},
    "ep": {None: "none"},
    "padded": {False: "none", True: "rows of hidden_states are padded"},
    "routing": {
        "uniform": "all experts alike",
        "balanced": "experts dealt out in turn",
        "skewed": "expert j is drawn as 1/j",
        "one": "all tokens choose the same experts",
        "half": "the first half of the experts gets no token",
        "duplicate": "every other token names one expert in all its slots",
        "invalid": "some slots, and whole tokens, have the id -1",
        "beyond": "some slots have ids that are no expert's, on either side of the range",
        "nobody": "every id is -1",
        "remote": "all experts are another rank's",
    },
    "fill": {
        "exact": "every correct kernel gives the same bits",
        "random": "judged against the predicted deviation",
        "extreme": "with values at the edge of the formats",
    },
    "scenario": {"once": "one call"},
}
#: Fields that are described only if they differ from their default.
OPTIONS = ("router_weight_on_input", "bias", "ep", "shared_experts", "padded")
#: Fields whose default the report shows for descriptors that do not name them.
SHOWN_DEFAULTS = (
    "quant", "ep", "router_weight_on_input", "activation", "layout", "ids", "routing", "seed", "scenario",
)  # fmt: skip
#: The meaning of tokens that stand for many values, for the glossary.
PATTERNS = {
    "tokens": "rows of hidden_states: 16",
    "hidden_size": "K: 16",
    "intermediate_size": "I: 16",
    "num_experts": "experts of the layer, on all ranks: 16",
    "top_k": "experts of a token: 16",
    "quant": "<format of the weights>.<granularity of their scales>.<granularity of the activations' scales, or none>",
    "limit": "clamps g to at most 7, and u to [-7, 7]",
    "ep": "rank 1 of 4, contiguous experts; ep4.1s: experts dealt out in turn",
    "shared_experts": "experts that every token meets besides: 16",
    "seed": "the seed of all random numbers: 16",
    "scenario": "a sequence of calls of harness/scenarios/; without it: one call",
}


def in_words(case: Case) -> list[str]:
    """Describe a case, line by line."""
    p = case.problem
    w13 = (p.w13_rows, p.hidden_size) if p.layout == "nk" else (p.hidden_size, p.w13_rows)

    def words(field: str) -> str:
        return _words(field, getattr(case if field in OF_CASES else p, field))

    experts = f"{p.num_experts} experts of {p.intermediate_size}"
    clamp = f"; clamp {words('limit')}" if p.limit is not None else ""
    options = [f"{_name(field)}: {words(field)}" for field in OPTIONS if getattr(p, field) != DEFAULTS[field]]
    return labelled(
        [
            ("sizes", f"{p.tokens} tokens of {p.hidden_size}, top {p.top_k} of {experts}"),
            ("dtype", f"{p.dtype}, {words('quant')}"),
            ("layout", f"{words('layout')}; w13 is {p.local_experts}x{w13[0]}x{w13[1]}"),
            ("activation", words("activation") + clamp),
            ("topk_ids", f"{words('ids')}, {words('routing')}"),
            *(("options", option) for option in options),
            ("fill", f"{words('fill')}; seed {case.seed}"),
            ("scenario", words("scenario")),
        ]
    )


def meanings(tokens: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{token: (name of the field, meaning)}; an unknown token is ("unknown", token)."""
    return {token: _meaning(token) for token in tokens}


@cache
def _meaning(token: str) -> tuple[str, str]:
    for rule in GRAMMAR:
        if re.fullmatch(rule.pattern, token):
            return _name(rule.field), _words(rule.field, rule.parse(token))
    return "unknown", token


def defaults() -> dict[str, str]:
    """{name of the field: meaning} of the fields that a descriptor may leave out."""
    return {_name(field): _words(field, DEFAULTS[field]) for field in SHOWN_DEFAULTS}


def glossary() -> list[tuple[str, str, str]]:
    """(token, name of the field, meaning) of every token of the grammar, in the order of a descriptor."""
    return [row for rule in GRAMMAR for row in _entries(rule)]


def _entries(rule: TokenRule) -> list[tuple[str, str, str]]:
    if rule.field in PATTERNS:
        return [(rule.example, _name(rule.field), PATTERNS[rule.field])]
    default = DEFAULTS[rule.field]
    return [
        (token, _name(rule.field), _meaning_of(rule.field, value) + " (default)" * (value == default))
        for token in rule.example.split("|")
        for value in [rule.parse(token)]
    ]


def _name(field: str) -> str:
    return NAMES.get(field, field.replace("_", " "))


def _words(field: str, value: Any) -> str:
    """A value of a field in words."""
    if isinstance(value, Quant):
        activations = value.activations
        quantized = f"{activations.codes.name} per {value.activation}" if activations else "not quantized"
        return f"{value.weight_format} weights scaled per {value.weight}, activations {quantized}"
    if isinstance(value, ExpertParallel):
        return f"rank {value.rank} of {value.size}{', experts dealt out in turn' if value.strided else ''}"
    meaning = _meaning_of(field, value)
    return f"{value}: {meaning}" if isinstance(value, str) and meaning != value else meaning


def _meaning_of(field: str, value: Any) -> str:
    plain = f"{value:g}" if isinstance(value, float) else str(value)
    return MEANINGS.get(field, {}).get(value, plain)
