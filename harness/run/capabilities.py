"""What a backend declares against what it does: each corner of a layer alone, and pairs that real kernels got wrong.

    corner -> case -> supports(), declares() -> the verdicts of exact and random inputs -> one word

    right      accepted, and the output is the oracle's
    ignored    accepted, and the output is that of a layer without the flag
    doubled    accepted, and the flag was applied twice
    wrong      accepted, and the output is wrong in another way
    crashed    accepted, and the call raised, hung, or took its process with it
    refused    declared as unsupported, so it was not run

supports() is what the backend says to the harness; declares(), if it has it, what the package that it adapts says of
itself (None or its reason), such as vLLM's is_supported_config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from harness import backend as backends
from harness.device import Device
from harness.problem.case import GRAMMAR, Case
from harness.problem.families import expand
from harness.results.verdict import GREEN, Verdict

#: What every corner starts from: the first of these that the backend supports.
BASES = tuple(
    f"t16-h256-i128-e8-{k}-{dtype}{layout}"
    for layout in ("", "-kn")
    for k in ("k2", "k1")
    for dtype in ("bf16", "fp16", "fp32")
)
WORDS = ("right", "ignored", "doubled", "wrong", "crashed", "refused")
DOUBLED = r"twice|squared|as well as"

#: Tokens that replace the base's, and the mistakes (harness/bank) that mean that the flag went unheeded.
CORNERS: dict[str, str] = {
    "": "", "bf16": "", "fp16": "", "fp32": "",
    "gelu": "activation (silu|gelu_tanh)", "gelu_tanh": "activation (silu|gelu)$",
    "swigluoai": "activation silu|up \\+ 1",
    "relu2": "relu not squared",
    "limit1": "clamp missing|whatever the layer says", "gelu-limit1": "clamp missing|whatever the layer says",
    "swigluoai-limit3": "clamp missing|whatever the layer says",
    "bias": "bias(es)? missing", "swigluoai-bias": "bias(es)? missing",
    "k1-win": "on output instead of input", "k1-win-bias": "on output instead of input",
    "k1-win-ep2.1": "on output instead of input|expert_map ignored",
    "k1": "", "k3": "", "k4": "", "k5": "", "k6": "", "k8": "",
    "nk": "", "kn": "", "padded": "row stride", "ids64": "int64 ids", "t0": "", "t1": "", "t257": "",
    "h96-i96": "", "h136-i72": "", "e7": "",
    "ep2.1": "expert_map ignored", "ep2.1s": "expert_map ignored", "ep2.1-remote": "expert_map ignored",
    "ep2.1-bias": "expert_map ignored|bias(es)? missing", "ep2.1-invalid": "expert_map ignored|invalid ids",
    "ep2.1-e4m3.tensor.tensor": "expert_map ignored",
    "invalid": "invalid ids", "nobody": "invalid ids", "beyond": "invalid ids", "duplicate": "counted once",
    "shared1": "shared experts missing", "shared1-ep2.1": "shared experts missing|expert_map ignored",
    **{
        f"{weights}.{given}": "activations not quantized|quantized though|activations quantized per|scales? missing"
        for weights in ("e4m3.tensor", "e4m3.channel", "e4m3.block", "e5m2.tensor")
        for given in ("none", "static", "tensor", "token", "group")
    },
    "e4m3.block.group-kn": "read as if transposed", "e4m3.tensor.none-bias": "bias(es)? missing",
    "e4m3.block.group-k1-win": "on output instead of input",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One corner of one backend."""

    corner: str
    case: str  #: the descriptor that shows it; of what failed, if anything did
    word: str
    refusal: str = ""  #: what supports() says against it
    declared: str | None = None  #: what the package says of itself: "" accepts; None: it says nothing
    detail: str = ""
    budget: float = 0.0

    @property
    def disagrees(self) -> bool:
        """Whether the package accepts by its own word what its backend here refuses, or the other way round."""
        return self.declared is not None and bool(self.declared) != (self.word == "refused")


def base(backend: Any, device: Device) -> str | None:
    """The descriptor of the first plain layer that the backend supports."""
    return next((b for b in BASES if backends.unsupported(backend, Case.parse(b).problem, device) is None), None)


def corner_of(descriptor: str, tokens: str) -> str:
    """The descriptor with these tokens in the place of its own for the same fields."""
    chosen = {}
    for token in (*descriptor.split("-"), *filter(None, tokens.split("-"))):
        rule = next(rule for rule in GRAMMAR if re.fullmatch(rule.pattern, token))
        chosen[rule.field] = token
    return "-".join(chosen.values())


def findings(
    backend: Any, device: Device, judge: Callable[[Case], Verdict], corners: Iterable[str] = CORNERS
) -> Iterator[Finding]:
    """What comes of every corner; `judge` runs one case. Nothing if the backend supports none of BASES."""
    backend = backends.as_backend(backend)
    start = base(backend, device)
    if start is None:
        return
    for corner in corners:
        cases = expand(corner_of(start, corner))
        problem = cases[0].problem
        refusal = backends.unsupported(backend, problem, device)
        declared = (backend.declares(problem) or "") if backend.declares else None
        if refusal:
            yield Finding(corner, str(cases[0]), "refused", refusal, declared, refusal)
            continue
        verdicts = [judge(case) for case in cases]
        worst = next((v for v in verdicts if not v.green), None) or max(verdicts, key=lambda v: v.budget)
        word, detail = told(worst, CORNERS.get(corner, ""))
        yield Finding(corner, worst.case, word, "", declared, detail, worst.budget)


def told(verdict: Verdict, unheeded: str) -> tuple[str, str]:
    """A verdict's word, and more of it: `unheeded` matches the mistakes that mean that the flag went unheeded."""
    if verdict.status == "unsupported":
        return "refused", verdict.reason
    if verdict.status in GREEN:
        return "right", "" if verdict.status == "passed" else f"{verdict.status}: {verdict.reason}"
    if verdict.status != "failed":
        return "crashed", verdict.reason
    if unheeded and re.search(unheeded, verdict.cause):
        return "ignored", verdict.cause
    if re.search(DOUBLED, verdict.cause):
        return "doubled", verdict.cause
    return "wrong", verdict.cause or verdict.reason
