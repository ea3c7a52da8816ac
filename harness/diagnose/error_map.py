"""A coarse picture of a failure that fits into a record: the error by token and column, and by expert.

Each cell is the worst element of a block of tokens and columns, as one digit of a doubling scale: it shows a wrong row,
column or tile. At most 4 KB of JSON, whatever the size of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.inputs.draw import Inputs
from harness.oracle.judge import Judgement
from reference.moe import local_experts

ROWS, COLUMNS = 32, 64  #: of the map, at most
EXPERTS = 48  #: listed at most, the worst first
#: The least error of the digits 1 to 8, in units of the map; below the first (exact fill: equal) it is 0. 9 is for NaN
#: and infinity where the oracle has none, or the other way round.
STEPS_SIGMA = tuple(float(2**n) for n in range(2, 10))
STEPS_EXACT = (0.0, *(float(2.0**n) for n in range(-6, 1)))
UNITS = {"sigma": "predicted standard deviations of the element", "rms": "root mean square of the expected output"}


def error_map_of(judgement: Judgement, inputs: Inputs) -> dict[str, Any]:
    """The map of one judged call; {} if the output has no element."""
    assert judgement.wrong is not None and judgement.got is not None and judgement.expected is not None
    tensors = (judgement.got, judgement.expected, judgement.wrong, judgement.sigma, inputs.layer.expert_map)
    got, expected, wrong, sigma, experts = (None if t is None else t.cpu() for t in tensors)
    assert got is not None and expected is not None and wrong is not None
    return error_map(
        got, expected, wrong, sigma, local_experts(inputs.topk_ids.cpu(), inputs.case.problem.num_experts, experts)
    )


def error_map(got: Tensor, expected: Tensor, wrong: Tensor, sigma: Tensor | None, experts: Tensor) -> dict[str, Any]:
    """got, expected, sigma [T, K] float64, wrong [T, K] bool, experts [T, k] local expert of a slot or -1.

    Returns, JSON-ready: tokens and columns (T, K); token_step and column_step, elements of a block; map, one string of
    digits for a block of tokens; unit and steps, the scale; experts [[expert, tokens, wrong tokens, wrong outputs, rms
    error in units], ...], the worst first, and experts_left_out.
    """
    tokens, columns = got.shape
    if not got.numel():
        return {}
    finite = torch.isfinite(got) & torch.isfinite(expected)
    alike = (got == expected) | (got.isnan() & expected.isnan())
    diff = torch.where(finite, (got - expected).abs(), 0.0)
    if sigma is None:
        power = float((torch.where(finite, expected, 0.0) ** 2).mean()) ** 0.5
        unit, steps, error = "rms", STEPS_EXACT, diff / (power or 1.0)
    else:
        # Where nothing may differ, any difference is infinitely many sigma.
        unit, steps, error = "sigma", STEPS_SIGMA, torch.where(diff == 0, 0.0, diff / sigma.clamp(min=1e-300))
    digits = torch.bucketize(error, torch.tensor(steps, dtype=error.dtype), right=True)
    digits = torch.where(finite, torch.where(alike, 0, digits), torch.where(alike, 0, 9))
    row_step, column_step = -(-tokens // ROWS), -(-columns // COLUMNS)
    worst = _blocks(_blocks(digits, row_step).T, column_step).T
    squares, counts = (error.clamp(max=1e150) ** 2).mean(1), wrong.sum(1)
    served = experts[experts >= 0].unique().tolist()
    by_expert = [_expert_row(e, (experts == e).any(1), squares, counts) for e in served]
    by_expert.sort(key=lambda row: (-row[3], -row[4], row[0]))
    return {
        "tokens": tokens,
        "columns": columns,
        "token_step": row_step,
        "column_step": column_step,
        "unit": unit,
        "steps": list(steps),
        "map": ["".join(map(str, row)) for row in worst.tolist()],
        "experts": by_expert[:EXPERTS],
        "experts_left_out": max(0, len(by_expert) - EXPERTS),
    }


def _blocks(digits: Tensor, step: int) -> Tensor:
    """The largest of every `step` rows."""
    short = -digits.shape[0] % step
    padded = torch.cat([digits, digits.new_zeros(short, digits.shape[1])])
    return padded.unflatten(0, (-1, step)).amax(1)


def _expert_row(expert: int, mine: Tensor, squares: Tensor, wrong: Tensor) -> list[float]:
    """[expert, tokens, wrong tokens, wrong outputs, rms error]; mine [T] bool: its tokens; squares, wrong [T]: the mean
    squared error and the number of wrong outputs of every token."""
    rms = float(squares[mine].mean().sqrt())
    return [expert, int(mine.sum()), int((wrong[mine] > 0).sum()), int(wrong[mine].sum()), float(f"{rms:.3g}")]
