"""The rounding plan: which roundings a backend performs between hidden_states and its output.

A backend declares its plan as plain data (a dict with the field names below); the oracle follows it. Every field
left out takes the finest value, so an empty plan is a kernel that keeps everything in float32 until the final store.
"io" always stands for the dtype of hidden_states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

_VALID: dict[str, tuple[Any, ...]] = {
    "gate_up": ("fp32", "io"),
    "act_chain": (False, True),
    "act": ("fp32", "io"),
    "slot": ("fp32", "io"),
    "weight": ("before_store", "after_store", "rounded"),
    "router_weight": ("fp32", "io"),
    "combine": ("fp32", "io"),
    "weighted_input": ("accumulator", "io", "product"),
    "quantizes_activations": (True, False),
    "tf32": (False, True, "truncated"),
    "weights": ("exact", "io"),
}


@dataclass(frozen=True)
class Accumulator:
    """How a matrix unit adds up products.

    bits: fraction bits kept when products are aligned to the largest one and truncated; None rounds to nearest in fp32.
    depth: products added per instruction. promote: products after which the sum moves to a float32 register (0: never).
    """

    bits: int | None = None
    depth: int = 1
    promote: int = 0


@dataclass(frozen=True)
class RoundingPlan:
    """One admissible way to round. Hashable, so that expected results can be cached by it."""

    gate_up: str = "fp32"  #: storage of GEMM 1's output
    act_chain: bool = False  #: act(gate) is rounded to io before it is multiplied by up
    act: str = "fp32"  #: storage of the activation's output, before any quantization
    slot: str = "fp32"  #: storage of GEMM 2's output, one row per (token, slot)
    weight: str = (
        "before_store"  #: the router weight meets the slot before its store, after it, or after with a rounding
    )
    router_weight: str = "fp32"  #: dtype the router weight is cast to first
    combine: str = "fp32"  #: dtype of the running sum over top_k
    #: router weight on input: exact before x is quantized or cut, x*w rounded to io, or on GEMM 1's product of plain x
    weighted_input: str = "accumulator"
    quantizes_activations: bool = True  #: W8A8; False is W8A16, whatever the problem's activation scheme says
    tf32: bool | str = False  #: float32 operands are rounded to tf32 before each product, or cut to it ("truncated")
    weights: str = "exact"  #: fp8 weights times their scales: exact, as in an accumulator, or stored in io
    accumulator: Accumulator = Accumulator()

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(changed) or "float32 throughout"


def parse_plan(declared: Mapping[str, Any] | RoundingPlan) -> RoundingPlan:
    """A plan from a backend's plain dict; ValueError names the field, the value and what would be valid."""
    if isinstance(declared, RoundingPlan):
        return declared
    for name, value in declared.items():
        if name == "accumulator" and isinstance(value, Accumulator):
            continue
        if name not in _VALID:
            raise ValueError(f"rounding plan: unknown field {name!r}; valid fields: {', '.join(_VALID)}, accumulator")
        if value not in _VALID[name]:
            raise ValueError(f"rounding plan: {name}={value!r}; valid: {', '.join(map(repr, _VALID[name]))}")
    return RoundingPlan(**declared)


def undeclared_plans() -> Iterator[RoundingPlan]:
    """What is tried for a backend that declares nothing: from the finest plan to the coarsest that real kernels use."""
    for chain, gate_up, slot, combine in product((False, True), ("fp32", "io"), ("fp32", "io"), ("fp32", "io")):
        weight = "before_store" if combine == "fp32" else "rounded"
        yield RoundingPlan(
            gate_up=gate_up, act_chain=chain, act="io", slot=slot, combine=combine, weight=weight,
            router_weight="io" if combine == "io" else "fp32",
        )  # fmt: skip
