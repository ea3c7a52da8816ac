"""One call that records every value between its stages, to localise the stage that is wrong.

The functions that kernels.triton.fused_moe calls are wrapped for the duration of the call; the call itself is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kernels.checks import SCALE_BLOCK
from kernels.triton import fused_moe
from kernels.triton.gemm import Assignment

WRAPPED = ("moe_permute", "moe_gemm", "activate", "moe_combine", "moe_unpermute")


def record(
    call: Callable[..., torch.Tensor], hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What one call computed on its way, in (token, slot) order: pair p is slot p % k of token p // k.

        expert    [P] int64       the local expert that served the pair, -1 if none did
        permuted  [P, K] io       the row that the pair got, where rows were brought into expert order
        x         [P, K] float64  GEMM 1's operand, dequantized
        h         [P, 2I] io      GEMM 1's output
        a         [P, I] io       the activation's output
        operand   [P, I] float64  GEMM 2's operand, dequantized
        slots     [P, K] io       GEMM 2's output
        out       [T, K] io       the result

    Rows of pairs without an expert hold nothing of meaning.
    """
    parts: list[dict[str, torch.Tensor]] = [{}]
    with _wrapped(parts):
        out = call(hidden_states, topk_weights, topk_ids)
    done = [part for part in parts if "slots" in part]  # a batch that is served in chunks has several
    names = set(done[0]) if done else set()
    return {name: torch.cat([part[name] for part in done]) for name in names} | {"out": out.clone()}


@contextmanager
def _wrapped(parts: list[dict[str, torch.Tensor]]) -> Iterator[None]:
    originals = {name: getattr(fused_moe, name) for name in WRAPPED}
    for name, original in originals.items():
        setattr(fused_moe, name, _noting(original, globals()[f"_{name}"], parts))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(fused_moe, name, original)


def _noting(original: Callable, note: Callable, parts: list[dict[str, torch.Tensor]]) -> Callable:
    signature = inspect.signature(original)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        note(parts, given.arguments, result)
        return result

    return wrapped


def _moe_permute(parts: list[dict], given: dict[str, Any], result: Any) -> None:
    parts[-1]["permuted"] = result.hidden_states.clone()


def _moe_gemm(parts: list[dict], given: dict[str, Any], result: Any) -> None:
    part, assignment = parts[-1], given["assignment"]
    rows = torch.arange(assignment.num_pairs, device=given["a"].device) // given["pairs_per_row"]
    operand = _dequantized(given["a"], given["a_scale"], given["a_granularity"])[rows]
    if "h" not in part:
        part["expert"] = _served(assignment, given["config"].block_m, given["w"].shape[0])
        part["x"], part["h"] = operand, given["out"].clone()
    else:
        part["operand"], part["slots"] = operand, given["out"].clone()


def _activate(parts: list[dict], given: dict[str, Any], result: Any) -> None:
    parts[-1]["a"] = given["out"].clone()


def _moe_combine(parts: list[dict], given: dict[str, Any], result: Any) -> None:
    parts.append({})


def _moe_unpermute(parts: list[dict], given: dict[str, Any], result: Any) -> None:
    row = given["inv_permuted_idx"].flatten().long()
    for name, rows in parts[-1].items():
        parts[-1][name] = rows[row.clamp(0, len(rows) - 1)]
    parts[-1]["expert"] = torch.where((row >= 0) & (row < len(row)), parts[-1]["expert"], -1)
    parts.append({})


def _served(assignment: Assignment, block_m: int, num_experts: int) -> torch.Tensor:
    """[P] int64: the expert of the block that holds a pair, -1 for a pair in no block."""
    expert = assignment.expert_ids.long()
    if assignment.sorted_token_ids is not None and assignment.num_tokens_post_padded is not None:
        pairs = assignment.sorted_token_ids[: int(assignment.num_tokens_post_padded)].long()
        expert = expert.repeat_interleave(block_m)[: len(pairs)]
        there = (pairs >= 0) & (pairs < assignment.num_pairs)
        found = torch.full((assignment.num_pairs,), -1, device=pairs.device)
        expert = found.scatter_(0, pairs[there], expert[there])
    return torch.where((expert >= 0) & (expert < num_experts), expert, -1)


def _dequantized(codes: torch.Tensor, scale: torch.Tensor | None, granularity: str) -> torch.Tensor:
    values = codes.double()
    if scale is None:
        return values
    if granularity == "group":
        return values * scale.double().repeat_interleave(SCALE_BLOCK, 1)[:, : values.shape[1]]
    return values * (scale.double()[:, None] if granularity == "token" else scale.double())
