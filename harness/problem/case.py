"""What is computed (Problem), how it is asked (Case), and the one text line that is both: the descriptor.

A descriptor is a list of tokens joined by "-". It is the case id, the pytest id and the line that reproduces a failure:

    t16-h256-i128-e8-k2-bf16-e4m3.block.group-kn-skewed-exact-s3-swap.copy_

The five sizes and the dtype come first; every other token may be left out, and then has its default. `GRAMMAR` below is
the whole language: parsing, printing and the error for a wrong token are all read off it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from harness.base.errors import UserError, bare, shown
from harness.base.suggest import did_you_mean
from reference.scheme import (
    ACTIVATION_GRANULARITIES,
    WEIGHT_GRANULARITIES,
    Scheme,
    activation_scheme,
    code_formats,
    weight_scheme,
)

DTYPES = ("bf16", "fp16", "fp32")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2")
LAYOUTS = ("nk", "kn")
ROUTINGS = ("uniform", "balanced", "skewed", "one", "half", "duplicate", "invalid", "beyond", "nobody", "remote")
FILLS = ("exact", "random", "extreme")
MOST = 2**31 - 1  #: of every size
MOST_SEED = 2**48  #: a generator takes 64 bits, and scenarios derive other seeds
LONGEST = 400  #: characters of a descriptor


class DescriptorError(UserError, ValueError):
    """A descriptor or a Problem that makes no sense; the message names the field, the value and what is valid."""


@dataclass(frozen=True)
class Quant:
    """The quantization of a layer, by the names that reference/scheme.py knows: <format>.<weights>.<activations>.

    weight_format: the format of the weights' codes. weight: their granularity, "tensor" (scale [E]), "channel" ([E, N])
    or "block" ([E, ceil(N/128), ceil(K/128)]). activation: None (weight only), "tensor_static", "tensor" (dynamic, over
    all rows), "token" or "group" (1x128).
    """

    weight_format: str
    weight: str
    activation: str | None

    def __str__(self) -> str:
        return f"{self.weight_format}.{self.weight}.{self._granularity or 'none'}"

    @classmethod
    def parse(cls, text: str) -> Quant:
        fmt, weight, activation = text.split(".")
        return cls(fmt, weight, {"none": None, "static": "tensor_static"}.get(activation, activation))

    @property
    def _granularity(self) -> str | None:
        return "static" if self.activation == "tensor_static" else self.activation

    @property
    def weights(self) -> Scheme:
        """How weights are stored."""
        return weight_scheme(self.weight_format, self.weight)

    @property
    def activations(self) -> Scheme | None:
        """How activations are quantized; None: they are not."""
        return None if self._granularity is None else activation_scheme(self._granularity, self.weight_format)

    @property
    def dynamic(self) -> Scheme | None:
        """The scheme of activations whose scales are computed from them; None: there is no such scale."""
        scheme = self.activations
        return None if scheme is None or scheme.granularity.static else scheme

    @property
    def block(self) -> int:
        """The size of the largest block that shares a scale, in rows or columns; 1 where whole rows do."""
        schemes = [self.weights, *([self.activations] if self.activations else [])]
        return max(size or 1 for scheme in schemes for size in (scheme.granularity.rows, scheme.granularity.columns))

    @property
    def over_rows(self) -> bool:
        """Whether one dynamic scale covers all rows, so that every row depends on every other."""
        return self.dynamic is not None and self.dynamic.granularity.rows is None


@dataclass(frozen=True)
class ExpertParallel:
    """This rank's share of the experts: `rank` of `size`, in contiguous runs or dealt out in turn (`strided`)."""

    size: int
    rank: int
    strided: bool = False

    def __str__(self) -> str:
        return f"ep{self.size}.{self.rank}{'s' if self.strided else ''}"

    @classmethod
    def parse(cls, text: str) -> ExpertParallel:
        size, rank = text[2:].rstrip("s").split(".")
        return cls(int(size), int(rank), text.endswith("s"))


@dataclass(frozen=True)
class Problem:
    """What is computed. Sizes count elements; see `GRAMMAR` for the tokens. Frozen, validated, hashable."""

    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    dtype: str
    quant: Quant | None = None
    activation: str = "silu"
    limit: float | None = None
    bias: bool = False
    router_weight_on_input: bool = False
    layout: str = "nk"
    ep: ExpertParallel | None = None
    shared_experts: int = 0
    ids: int = 32
    padded: bool = False
    routing: str = "uniform"

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, valid: str) -> None:
            if not condition:
                raise DescriptorError(f"{name}={bare(str(getattr(self, name)))}: {valid}")

        for name in ("tokens", "shared_experts"):
            require(0 <= getattr(self, name) <= MOST, name, f"must be 0 or more, at most {MOST}")
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            require(1 <= getattr(self, name) <= MOST, name, f"must be 1 or more, at most {MOST}")
        require(self.top_k <= self.num_experts, "top_k", f"at most num_experts={self.num_experts}")
        require(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}")
        require(self.activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}")
        require(self.layout in LAYOUTS, "layout", f"one of {', '.join(LAYOUTS)}")
        require(self.routing in ROUTINGS, "routing", f"one of {', '.join(ROUTINGS)}")
        written = self.limit is None or 0 < self.limit < 1e5 and float(f"{self.limit:g}") == self.limit
        require(written, "limit", "must be positive, below 100000 and of at most 6 digits")
        require(self.limit is None or self.activation != "relu2", "limit", "relu2 has no gate to clamp")
        one_slot = self.top_k == 1 or not self.router_weight_on_input
        require(one_slot, "router_weight_on_input", f"defined for top_k=1 only, not top_k={self.top_k}")
        if self.quant:
            known = (
                self.quant.weight_format in code_formats()
                and self.quant.weight in WEIGHT_GRANULARITIES
                and self.quant.activation in (None, "tensor_static", *(ACTIVATION_GRANULARITIES.keys() - {"static"}))
            )
            parts: list[Iterable[str]] = [code_formats(), WEIGHT_GRANULARITIES, ["none", *ACTIVATION_GRANULARITIES]]
            words = did_you_mean(str(self.quant), map(".".join, product(*parts)))
            require(known, "quant", ".".join(f"<{'|'.join(names)}>" for names in parts) + words)
            require(self.dtype != "fp32", "quant", "quantized weights go with bf16 or fp16 activations")
        if self.ep:
            fits = self.ep.size >= 1 and self.num_experts % self.ep.size == 0 and 0 <= self.ep.rank < self.ep.size
            require(fits, "ep", f"size must divide num_experts={self.num_experts} and rank lie below size")
        require(self.routing != "remote" or bool(self.ep and self.ep.size > 1), "routing", "remote needs ep")

    @property
    def gated(self) -> bool:
        return self.activation != "relu2"

    @property
    def w13_rows(self) -> int:
        return self.intermediate_size * (2 if self.gated else 1)

    @property
    def local_experts(self) -> int:
        return self.num_experts // (self.ep.size if self.ep else 1)

    @property
    def invalid_ids(self) -> bool:
        """Whether topk_ids holds an id that is no expert's."""
        return self.routing in ("invalid", "beyond", "nobody")

    def weights_key(self) -> Problem:
        """The same layer for any batch: what two Problems share exactly if their weights may be shared."""
        return replace(self, tokens=0, routing="uniform", ids=32, padded=False)


@dataclass(frozen=True)
class Case:
    """A Problem and how it is asked: the fill of its tensors, the seed, and the sequence of calls (scenario)."""

    problem: Problem
    fill: str = "random"
    seed: int = 0
    scenario: str = "once"

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise DescriptorError(f"fill={bare(self.fill)}: one of {', '.join(FILLS)}")
        if not 0 <= self.seed <= MOST_SEED:
            raise DescriptorError(f"seed={shown(self.seed)}: must be 0 or more, at most {MOST_SEED}")

    def __str__(self) -> str:
        return "-".join(token for rule in GRAMMAR if (token := rule.show(self)) is not None)

    def change(self, **changes: Any) -> Case:
        """A Case with other values, given by the names of the fields of Problem or Case."""
        mine = OF_CASES & changes.keys()
        problem = replace(self.problem, **{k: v for k, v in changes.items() if k not in mine})
        return replace(self, problem=problem, **{k: changes[k] for k in mine})

    @classmethod
    def parse(cls, text: str) -> Case:
        """The Case of a descriptor; DescriptorError says which token is wrong and what would be valid there."""
        text, found = text.strip(), dict[str, Any]()
        if len(text) > LONGEST:
            raise DescriptorError(f"{bare(text)}: a descriptor has at most {LONGEST} characters")
        for token in text.split("-"):
            rules = [rule for rule in GRAMMAR if re.fullmatch(rule.pattern, token)]
            if not rules:
                words = did_you_mean(token, (word for rule in GRAMMAR for word in rule.example.split("|")))
                known = ", ".join(rule.example for rule in GRAMMAR)
                raise DescriptorError(f"{text!r}: no field is written {token!r}{words}; tokens look like: {known}")
            if rules[0].field in found:
                raise DescriptorError(f"{text!r}: {token!r} gives {rules[0].field} a second time")
            found[rules[0].field] = rules[0].parse(token)
        missing = [rule.example for rule in GRAMMAR if rule.required and rule.field not in found]
        if missing:
            raise DescriptorError(f"{text!r}: missing {', '.join(missing)}")
        asked = OF_CASES & found.keys()
        problem = Problem(**{k: v for k, v in found.items() if k not in asked})
        return cls(problem, **{k: found[k] for k in asked})


#: The fields that a Case has besides its Problem, and what fields are if nothing is said.
OF_CASES = {f.name for f in fields(Case)}
DEFAULTS = {f.name: f.default for f in (*fields(Problem), *fields(Case))}


@dataclass(frozen=True)
class TokenRule:
    """One field of the descriptor: its token's pattern, how it is read and written."""

    field: str
    pattern: str
    parse: Callable[[str], Any]
    write: Callable[[Any], str]
    example: str
    required: bool = False

    def show(self, case: Case) -> str | None:
        value = getattr(case if self.field in OF_CASES else case.problem, self.field)
        if not self.required and value == DEFAULTS[self.field] and self.field != "fill":
            return None
        return self.write(value)


def _count(letter: str, name: str, required: bool = True) -> TokenRule:
    return TokenRule(
        name, rf"{letter}[0-9]+", lambda s: int(s[len(letter) :]), lambda v: f"{letter}{v}", f"{letter}16", required
    )


def _word(name: str, words: tuple[str, ...], required: bool = False) -> TokenRule:
    return TokenRule(name, "|".join(map(re.escape, words)), str, str, "|".join(words), required)


def _flag(name: str, word: str, value: Any = True) -> TokenRule:
    return TokenRule(name, word, lambda s: value, lambda v: word, word)


#: Any three words: which of them are known is said by the error of Problem.
_QUANT = r"[a-z0-9_]+\.[a-z0-9_]+\.[a-z0-9_]+"

GRAMMAR: tuple[TokenRule, ...] = (
    _count("t", "tokens"),
    _count("h", "hidden_size"),
    _count("i", "intermediate_size"),
    _count("e", "num_experts"),
    _count("k", "top_k"),
    _word("dtype", DTYPES, required=True),
    TokenRule("quant", _QUANT, Quant.parse, str, "e4m3.block.group"),
    _word("activation", ACTIVATIONS),
    TokenRule("limit", r"limit[0-9]+(\.[0-9]+)?", lambda s: float(s[5:]), lambda v: f"limit{v:g}", "limit7"),
    _flag("bias", "bias"),
    _flag("router_weight_on_input", "win"),
    _word("layout", LAYOUTS),
    TokenRule("ep", r"ep[0-9]+\.[0-9]+s?", ExpertParallel.parse, str, "ep4.1"),
    _count("shared", "shared_experts", required=False),
    _flag("ids", "ids64", 64),
    _flag("padded", "padded"),
    _word("routing", ROUTINGS),
    _word("fill", FILLS),
    _count("s", "seed", required=False),
    TokenRule("scenario", r"once|[a-z0-9_]+\.[a-z0-9_]+", str, str, "swap.copy_"),
)  # fmt: skip
