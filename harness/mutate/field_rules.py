"""The rules by which the tests of other projects accept an output, applied to the outputs that the harness judges.

The expected output is the oracle's, rounded to the io dtype. A rule compares the output with it and nothing else: no
trace, no canary, no other promise. It does see the poison of this harness where nothing was written, as NaN. Elements
that are expected to be infinite or NaN, and are, count as equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.inputs.draw import Inputs
from harness.oracle.experts import oracle_experts
from reference.moe import local_experts


def naive_in_io_dtype(inputs: Inputs) -> Tensor:
    """Return the layer's output [T, K] in the dtype of hidden_states, as PyTorch computes it in this dtype.

    Expert by expert, every product, sum and activation is rounded to it. This is no call of reference.naive: PyTorch
    rounds silu and gelu once, their formulas in this dtype would round every factor, and the baseline of the rules does
    not quantize activations.
    """
    problem, x = inputs.case.problem, inputs.hidden_states
    experts = oracle_experts(inputs.layer, x.device)
    local = local_experts(inputs.topk_ids, problem.num_experts, experts.expert_map)
    out = torch.zeros_like(x)

    def expert(number: int, rows: Tensor) -> Tensor:
        h = rows @ experts.w13[number].to(x.dtype).T
        if experts.w13_bias is not None:
            h = h + experts.w13_bias[number].to(x.dtype)
        a = _activate(h, problem.activation, problem.limit)
        y = a @ experts.w2[number].to(x.dtype).T
        return y if experts.w2_bias is None else y + experts.w2_bias[number].to(x.dtype)

    for number in local[local >= 0].unique().tolist():
        token, slot = torch.nonzero(local == number, as_tuple=True)
        weight = inputs.topk_weights[token, slot, None].to(x.dtype)
        if problem.router_weight_on_input:
            out.index_add_(0, token, expert(number, x[token] * weight))
        else:
            out.index_add_(0, token, expert(number, x[token]) * weight)
    for number in range(problem.shared_experts):
        out += expert(problem.local_experts + number, x)
    return out


def _activate(h: Tensor, activation: str, limit: float | None) -> Tensor:
    """[P, 2I] -> [P, I], or as many columns for relu2; every operation in the dtype of h."""
    if activation == "relu2":
        return F.relu(h).square()
    interleaved = activation == "swigluoai"
    gate, up = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=1)
    limit = 7.0 if interleaved and limit is None else limit
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if interleaved:
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


@dataclass(frozen=True)
class FieldRule:
    """One rule."""

    name: str
    source: str  #: the project, and the file that holds it
    description: str
    accepts: Callable[[Judged], bool]


@dataclass
class Judged:
    """One output, [T, K] in the io dtype, and the expected output, [T, K]."""

    out: Tensor
    expected: Tensor
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        self.expected = self.expected.to(self.out.dtype)
        nonfinite = ~torch.isfinite(self.expected)
        agreed = nonfinite & ((self.out == self.expected) | (self.out.isnan() & self.expected.isnan()))
        self.out = self.out.masked_fill(agreed, 0)
        self.expected = self.expected.masked_fill(agreed, 0)
        self.agreed = agreed

    @cached_property
    def error(self) -> Tensor:
        """|out - expected|, float32."""
        return (self.out.float() - self.expected.float()).abs()

    @cached_property
    def baseline(self) -> Tensor:
        """The naive layer's output, [T, K] in the io dtype."""
        assert self.inputs is not None
        return naive_in_io_dtype(self.inputs).to(self.out.device).masked_fill(self.agreed, 0)


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
        FieldRule("assert_close", "torch.testing", "rtol and atol by dtype (bf16 1.6e-2, 1e-5)", _assert_close),
        FieldRule(
            "vllm", "vLLM, tests/kernels/moe", "atol 2e-2, rtol 0", lambda j: _assert_close(j, atol=2e-2, rtol=0)
        ),
        FieldRule(
            "triton_kernels", "triton_kernels.testing", "error / max(rms, magnitude): max 2e-2, rms 4e-3",
            _triton_kernels,
        ),
        FieldRule(
            "flash_attention", "FlashAttention, hopper/test_flash_attn.py",
            "max error at most twice that of PyTorch in the io dtype", _flash_attention,
        ),
        FieldRule(
            "flashinfer_bench", "flashinfer-bench", "95 % of the elements within 1e-2, absolutely or relatively",
            _flashinfer_bench,
        ),
        FieldRule("fla", "flash-linear-attention", "rms(error) / rms(expected) below 0.005", _fla),
    )
}  # fmt: skip


class Watcher:
    """An observer of run.case that judges every output by these rules as well.

    It judges at once: a reference that it kept would keep the layer's tensors alive, and swap.dropped would fail.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._rules = [RULES[name] for name in names]
        self._seen = 0
        self._rejecting: set[str] = set()

    def __call__(self, out: Tensor, inputs: Inputs, judgement: Any) -> None:
        if out.numel():
            self._seen += 1
            judged = Judged(out, judgement.expected.to(out.device), inputs)
            self._rejecting |= {rule.name for rule in self._rules if not rule.accepts(judged)}

    def take(self) -> dict[str, Any]:
        """Return the number of outputs since the last `take`, and the rules that reject one of them."""
        record = {"seen": self._seen, "rejected": [r.name for r in self._rules if r.name in self._rejecting]}
        self._seen, self._rejecting = 0, set()
        return record
