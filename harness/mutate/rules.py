"""The rules by which the field's own tests accept an output, for the very outputs that the harness judges.

The expected output is the oracle's, rounded to the io dtype. A rule sees the output and nothing else: no trace, no
canary, no promise. What the poison of this harness leaves behind it does see, as NaN. Where infinities and NaN are due
and are there, they are held against nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.inputs import Inputs


@dataclass(frozen=True)
class Rule:
    """One rule: where it is from, what it says, and whether it accepts."""

    name: str
    source: str
    says: str
    accepts: Callable[[Judged], bool]


@dataclass
class Judged:
    """One output, [T, K] in the io dtype, and what is expected of it."""

    out: Tensor
    expected: Tensor
    given: Inputs | None = None

    def __post_init__(self) -> None:
        self.expected = self.expected.to(self.out.dtype)
        due = ~torch.isfinite(self.expected)
        agreed = due & ((self.out == self.expected) | (self.out.isnan() & self.expected.isnan()))
        self.out = self.out.masked_fill(agreed, 0)
        self.expected = self.expected.masked_fill(agreed, 0)
        self.agreed = agreed

    @cached_property
    def error(self) -> Tensor:
        """|out - expected|, float32."""
        return (self.out.float() - self.expected.float()).abs()

    @cached_property
    def baseline(self) -> Tensor:
        """The naive layer's output in the io dtype."""
        from harness.mutate.naive import naive

        assert self.given is not None
        found = naive(self.given).to(self.out.device)
        return found.masked_fill(self.agreed, 0)


def _assert_close(judged: Judged, rtol: float | None = None, atol: float | None = None) -> bool:
    try:
        torch.testing.assert_close(judged.out, judged.expected, rtol=rtol, atol=atol)
    except AssertionError:
        return False
    return True


def _triton_kernels(judged: Judged) -> bool:
    expected = judged.expected.float()
    tiny = 1e-30
    scale = 1 / (expected.abs().max() + tiny)  # so that squares do not overflow
    expected, error = expected * scale, judged.error * scale
    rms = expected.square().mean().sqrt() + tiny
    relative = error / torch.maximum(rms, expected.abs())
    return bool(relative.max() <= 2e-2) and bool(relative.square().mean().sqrt() <= 4e-3)


def _flash_attention(judged: Judged) -> bool:
    expected = judged.expected
    rounding = (expected + 0.3 - 0.3 - expected).abs().max().float()
    baseline = (judged.baseline.float() - expected.float()).abs().max()
    return bool(judged.error.max() <= 2 * baseline + 2 * rounding)


def _flashinfer_bench(judged: Judged) -> bool:
    if not (torch.isfinite(judged.out) & torch.isfinite(judged.expected)).all():
        return False
    relative = judged.error / (judged.expected.float().abs() + 1e-8)
    return bool(((judged.error > 1e-2) & (relative > 1e-2)).double().mean() <= 1 - 0.95)


def _fla(judged: Judged) -> bool:
    if bool(judged.error.max() <= 1e-6):
        return True
    rms = judged.expected.float().square().mean().sqrt() + 1e-8
    return bool(judged.error.square().mean().sqrt() / rms < 0.005)


RULES = {
    rule.name: rule
    for rule in (
        Rule("assert_close", "torch.testing", "rtol and atol by dtype (bf16 1.6e-2, 1e-5)", _assert_close),
        Rule("vllm", "vLLM, tests/kernels/moe", "atol 2e-2, rtol 0", lambda j: _assert_close(j, atol=2e-2, rtol=0)),
        Rule(
            "triton_kernels", "triton_kernels.testing", "error / max(rms, magnitude): max 2e-2, rms 4e-3",
            _triton_kernels,
        ),
        Rule(
            "flash_attention", "FlashAttention, hopper/test_flash_attn.py",
            "max error at most twice that of PyTorch in the io dtype", _flash_attention,
        ),
        Rule(
            "flashinfer_bench", "flashinfer-bench", "95 % of the elements within 1e-2, absolutely or relatively",
            _flashinfer_bench,
        ),
        Rule("fla", "flash-linear-attention", "rms(error) / rms(expected) below 0.005", _fla),
    )
}  # fmt: skip


class Watcher:
    """Judges every output that the harness judges (harness.check.WATCHERS) by these rules as well, there and then: who
    kept the tensors would be the reason that they outlive their layer (swap.dropped)."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._rules = [RULES[name] for name in names]
        self._seen = 0
        self._rejecting: set[str] = set()

    def __call__(self, out: Tensor, given: Inputs, judgement: Any) -> None:
        if out.numel():
            self._seen += 1
            judged = Judged(out, judgement.expected.to(out.device), given)
            self._rejecting |= {rule.name for rule in self._rules if not rule.accepts(judged)}

    def told(self) -> dict[str, Any]:
        """How many outputs there were since it was last asked, and the rules that reject one of them."""
        found = {"seen": self._seen, "rejected": [r.name for r in self._rules if r.name in self._rejecting]}
        self._seen, self._rejecting = 0, set()
        return found
