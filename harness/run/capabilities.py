"""What a backend declares against what it does: each feature of a layer alone, and pairs that real kernels got wrong.

    corner -> case -> supports(), declares() -> the verdicts of exact and random inputs -> one word

    right      accepted, and the output is the oracle's
    ignored    accepted, and the output looks like that of a layer without one of the features
    doubled    accepted, and a feature was applied twice
    wrong      accepted, and the output is wrong in another way
    crashed    accepted, and the call raised, hung, or ended its process
    refused    declared as unsupported, so it was not run

supports() is the backend's own declaration; declares(), which a backend may lack, is that of the package it adapts
(None or a reason), such as vLLM's is_supported_config. Ignored and doubled features are facts of the faults
(diagnose/faults) that an output resembles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from harness import backend as backends
from harness.device import Device
from harness.diagnose.faults import with_text
from harness.problem.case import GRAMMAR, Case
from harness.problem.families import expand
from harness.results.verdict import GREEN, Verdict

#: The layer that every corner changes: the first of these that the backend supports.
BASES = tuple(
    f"t16-h256-i128-e8-{k}-{dtype}{layout}"
    for layout in ("", "-kn")
    for k in ("k2", "k1")
    for dtype in ("bf16", "fp16", "fp32")
)
WORDS = ("right", "ignored", "doubled", "wrong", "crashed", "refused")

#: Tokens of a descriptor that replace those of the base.
CORNERS = (
    "", "bf16", "fp16", "fp32",
    "gelu", "gelu_tanh", "swigluoai", "relu2",
    "limit1", "gelu-limit1", "swigluoai-limit3",
    "bias", "swigluoai-bias",
    "k1-win", "k1-win-bias", "k1-win-ep2.1",
    "k1", "k3", "k4", "k5", "k6", "k8",
    "nk", "kn", "padded", "ids64", "t0", "t1", "t257",
    "h96-i96", "h136-i72", "e7",
    "ep2.1", "ep2.1s", "ep2.1-remote", "ep2.1-bias", "ep2.1-invalid", "ep2.1-e4m3.tensor.tensor",
    "invalid", "nobody", "beyond", "duplicate",
    "shared1", "shared1-ep2.1",
    *(
        f"{weights}.{activations}"
        for weights in ("e4m3.tensor", "e4m3.channel", "e4m3.block", "e5m2.tensor")
        for activations in ("none", "static", "tensor", "token", "group")
    ),
    "e4m3.block.group-kn", "e4m3.tensor.none-bias", "e4m3.block.group-k1-win",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One corner of one backend."""

    corner: str
    case: str  #: the descriptor; if a fill failed, of that one
    word: str
    refusal: str = ""  #: the reason of supports()
    declared: str | None = None  #: by the package: "" accepts, otherwise the reason; None: it declares nothing
    detail: str = ""
    budget: float = 0.0

    @property
    def disagrees(self) -> bool:
        """Whether the package accepts what its backend refuses here, or the other way round."""
        return self.declared is not None and bool(self.declared) != (self.word == "refused")


def base(backend: Any, device: Device) -> str | None:
    """The descriptor of the first plain layer that the backend supports."""
    return next((b for b in BASES if backends.unsupported(backend, Case.parse(b).problem, device) is None), None)


def corner_of(descriptor: str, tokens: str) -> str:
    """The descriptor with these tokens in the place of its own for the same fields."""
    return "-".join((_by_field(descriptor) | _by_field(tokens)).values())


def _by_field(tokens: str) -> dict[str, str]:
    """The tokens of a descriptor by the fields that they set."""
    return {
        next(rule.field for rule in GRAMMAR if re.fullmatch(rule.pattern, token)): token
        for token in filter(None, tokens.split("-"))
    }


def findings(
    backend: Any, device: Device, judge: Callable[[Case], Verdict], corners: Iterable[str] = CORNERS
) -> Iterator[Finding]:
    """The finding of each corner; `judge` runs one case. Nothing if the backend supports none of BASES."""
    start = base(backend, device)
    if start is None:
        return
    for corner in corners:
        cases = expand(corner_of(start, corner))
        problem = cases[0].problem
        refusal = backends.unsupported(backend, problem, device)
        declared = None if backend.declares is None else (backend.declares(problem) or "")
        if refusal:
            yield Finding(corner, str(cases[0]), "refused", refusal, declared, refusal)
            continue
        verdicts = [judge(case) for case in cases]
        worst = next((v for v in verdicts if not v.green), None) or max(verdicts, key=lambda v: v.budget)
        word, detail = _word(worst, corner)
        yield Finding(corner, worst.case, word, "", declared, detail, worst.budget)


def _word(verdict: Verdict, corner: str) -> tuple[str, str]:
    """(one of WORDS, more about it) of a verdict."""
    if verdict.status == "unsupported":
        return "refused", verdict.reason
    if verdict.status in GREEN:
        return "right", "" if verdict.status == "passed" else f"{verdict.status}: {verdict.reason}"
    if verdict.status != "failed":
        return "crashed", verdict.reason
    fault = with_text(verdict.cause)
    if fault and (fault.effect == "doubled" or fault.flag in _by_field(corner)):
        return fault.effect, verdict.cause
    return "wrong", verdict.cause or verdict.reason
