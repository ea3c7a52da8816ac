"""The memory that a layer and a batch take, in bytes."""

from __future__ import annotations

from harness.inputs.draw import TORCH_DTYPE
from harness.problem.case import Problem


def weight_bytes(problem: Problem) -> int:
    size = 1 if problem.quant else TORCH_DTYPE[problem.dtype].itemsize
    rows = problem.w13_rows + problem.intermediate_size
    return (problem.local_experts + problem.shared_experts) * rows * problem.hidden_size * size


def batch_bytes(problem: Problem) -> int:
    """What a call's batch takes: its inputs and output with their copies, and the stages of its pairs."""
    pairs, stages = problem.tokens * problem.top_k, problem.w13_rows + 2 * problem.intermediate_size
    elements = 4 * problem.tokens * problem.hidden_size + pairs * (3 * problem.hidden_size + stages)
    return elements * TORCH_DTYPE[problem.dtype].itemsize
