"""The memory that a layer and a batch take, in bytes."""

from __future__ import annotations

from harness.problem.case import Problem
from reference.scheme import itemsize


def weight_bytes(problem: Problem) -> int:
    """Bytes of the weights of a layer, scales and biases left out."""
    rows = problem.w13_rows + problem.intermediate_size
    elements = (problem.local_experts + problem.shared_experts) * rows * problem.hidden_size
    return problem.quant.weights.code_bytes(elements) if problem.quant else elements * itemsize(problem.dtype)


def batch_bytes(problem: Problem) -> int:
    """What a call's batch takes: its inputs and output with their copies, and the stages of its pairs."""
    pairs, stages = problem.tokens * problem.top_k, problem.w13_rows + 2 * problem.intermediate_size
    elements = 4 * problem.tokens * problem.hidden_size + pairs * (3 * problem.hidden_size + stages)
    return elements * itemsize(problem.dtype)
