"""A descriptor in words, token by token: what problem/case.py's grammar says, for a reader who does not know it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from functools import cache

from harness.problem.case import GRAMMAR, Case, ExpertParallel, Problem, Quant


def in_words(case: Case) -> list[str]:
    """The case for a reader, line by line."""
    p: Problem = case.problem
    scheme = "unquantized"
    if p.quant:
        taken = f"activations quantized per {p.quant.activation}" if p.quant.activation else "activations not quantized"
        scheme = f"{p.quant.weight_format} weights scaled per {p.quant.weight}, {taken}"
    shape = "x".join(map(str, (p.local_experts, p.w13_rows, p.hidden_size)))
    more = [
        f"activation {p.activation}" + (f" clamped at {p.limit:g}" if p.limit is not None else ""),
        "biases" if p.bias else "",
        "router weight on input" if p.router_weight_on_input else "",
        f"rank {p.ep.rank} of {p.ep.size}{' (strided)' if p.ep.strided else ''}" if p.ep else "",
        f"{p.shared_experts} shared experts" if p.shared_experts else "",
        "rows of hidden_states padded" if p.padded else "",
    ]
    return [
        f"  {p.tokens} tokens of {p.hidden_size}, top {p.top_k} of {p.num_experts} experts of {p.intermediate_size}",
        f"  {p.dtype}, {scheme}",
        f"  w13 {shape}, layout {p.layout}; topk_ids int{p.ids}, routing {p.routing}",
        f"  {', '.join(filter(None, more))}",
        f"  fill {case.fill}, seed {case.seed}, scenario {case.scenario}",
    ]


NAMES = {"quant": "quantization", "ep": "expert parallelism", "ids": "topk_ids", "limit": "clamp"}
FLAGS = {
    "bias": "both GEMMs have a bias",
    "router_weight_on_input": "applied on input",
    "padded": "rows of hidden_states are padded",
}
SPOKEN = {
    "layout": {"nk": "nk: w13 [E, 2I, K], w2 [E, K, I]", "kn": "kn: w13 [E, K, 2I], w2 [E, I, K]"},
    "routing": {
        "uniform": "uniform: all experts alike",
        "balanced": "balanced: experts dealt out in turn",
        "skewed": "skewed: expert j is drawn as 1/j",
        "one": "one: all tokens choose the same experts",
        "half": "half: the first half of the experts gets no token",
        "duplicate": "duplicate: every other token names one expert in all its slots",
        "invalid": "invalid: some slots, and whole tokens, have the id -1",
        "beyond": "beyond: some slots have ids that are no expert's, on either side of the range",
        "nobody": "nobody: every id is -1",
        "remote": "remote: all experts are another rank's",
    },
    "fill": {
        "exact": "exact: every correct kernel gives the same bits",
        "random": "random: judged against the predicted deviation",
        "extreme": "extreme: with values at the edge of the formats",
    },
}


def spoken(tokens: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{token: (field, what it says)} of tokens of descriptors; one that the grammar does not know speaks for itself."""
    return {token: _spoken(token) for token in tokens}


@cache
def _spoken(token: str) -> tuple[str, str]:
    for rule in GRAMMAR:
        if re.fullmatch(rule.pattern, token):
            return NAMES.get(rule.field, rule.field.replace("_", " ")), _value(rule.field, rule.parse(token))
    return "unknown", token


def _value(field: str, value: object) -> str:
    if isinstance(value, Quant):
        taken = f"activations e4m3 per {value.activation}" if value.activation else "activations not quantized"
        return f"{value.weight_format} weights scaled per {value.weight}, {taken}"
    if isinstance(value, ExpertParallel):
        return f"rank {value.rank} of {value.size}{', experts dealt out in turn' if value.strided else ''}"
    if field == "ids":
        return f"int{value}"
    if value is True:
        return FLAGS[field]
    return SPOKEN.get(field, {}).get(str(value), f"{value:g}" if isinstance(value, float) else str(value))


def defaults() -> dict[str, str]:
    """What a descriptor means that does not name the field."""
    found = {"quantization": "none", "expert parallelism": "none", "router weight on input": "no, on output"}
    for owner in (Problem, Case):
        for f in fields(owner):
            if f.name in ("activation", "layout", "ids", "routing", "seed", "scenario"):
                found[NAMES.get(f.name, f.name)] = _value(f.name, f.default)
    return found
