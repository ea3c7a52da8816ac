"""Follow one case from its descriptor to its verdict and print the values of every step: python3 docs/walk.py

docs/architecture.md contains the output, which tests/test_docs.py compares with a run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import Tensor  # noqa: E402 - the checkout must be importable first

from harness.backend import load  # noqa: E402
from harness.device import ready  # noqa: E402
from harness.inputs.draw import Inputs, draw  # noqa: E402
from harness.oracle.deviation import expect  # noqa: E402
from harness.oracle.judge import Judgement  # noqa: E402
from harness.problem.case import Case  # noqa: E402
from harness.problem.families import rows, untimed  # noqa: E402
from harness.run.case import run_case  # noqa: E402
from reference.moe import local_experts  # noqa: E402
from reference.plan import parse_plan  # noqa: E402

DESCRIPTOR = "t9-h192-i96-e4-k2-bf16-e4m3.block.none-kn-random"
BACKEND, DEVICE = "triton", "cpu"
TOKEN, COLUMN = 1, 7  #: the element of the output that the walk follows


def tensor_lines(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Describe tensors: name, shape, dtype and the first three values."""
    for name, tensor in tensors.items():
        values = " ".join(f"{float(v):.4g}" for v in tensor.flatten()[:3].double())
        shape = "x".join(map(str, tensor.shape))
        yield f"{name:<13} {shape:<9} {str(tensor.dtype).removeprefix('torch.'):<13}  {values} ..."


def walk_lines() -> Iterator[str]:
    """Return the walk, line by line. Runs the case once."""
    device, backend = ready(DEVICE), load(BACKEND)
    judged: list[tuple[Tensor, Inputs, Judgement]] = []

    yield "1  cases/: the row"
    case = Case.parse(DESCRIPTOR)
    (module, row) = next((m, r) for m in untimed() for r in rows(m, on_cpu=True) if r.case == case)
    yield f"   family {row.family}: {row.why}"

    yield "2  problem/case.py: the descriptor is parsed"
    problem = case.problem
    changed = [f for f in fields(problem) if getattr(problem, f.name) != f.default]
    yield "   Problem: " + ", ".join(f"{f.name}={getattr(problem, f.name)}" for f in changed)
    yield f"   Case: fill={case.fill}, seed={case.seed}, scenario={case.scenario}"

    yield "3  inputs/draw.py: the tensors are drawn, for the oracle in layout nk"
    inputs = draw(case)
    for line in tensor_lines({**inputs.arguments(), **inputs.layer.tensors()}):
        yield f"   {line}"

    yield f"4  inputs/draw.py: the layer in the layout of the backend, {problem.layout}"
    for line in tensor_lines(inputs.backend_layer.tensors()):
        yield f"   {line}"

    yield f"5  {backend.prepare.__module__.replace('.', '/')}.py: the backend declares its rounding plans"
    plans = [parse_plan(plan) for plan in backend.plans(problem)]
    for plan in plans:
        yield f"   {plan}"

    yield f"6  oracle/deviation.py: the expected output, followed at token {TOKEN}, column {COLUMN}"
    expected = expect(inputs, plans[0])
    experts = local_experts(inputs.topk_ids, problem.num_experts, inputs.layer.expert_map)[TOKEN]
    sigma = float(expected.variance[TOKEN, COLUMN].sqrt())
    yield f"   experts {experts.tolist()}, router weights {[round(float(w), 4) for w in inputs.topk_weights[TOKEN]]}"
    yield f"   expected {float(expected.out[TOKEN, COLUMN]):.5f}, predicted deviation {sigma:.5f}"

    yield "7  run/case.py, session/session.py: prepare, then one call into poisoned memory between fences"
    verdict = run_case(case, backend, device, row.family, observers=[lambda *call: judged.append(call)])
    ((out, _, judgement),) = judged
    actual = float(out[TOKEN, COLUMN])
    difference = actual - float(expected.out[TOKEN, COLUMN])
    yield f"   launched: {', '.join(verdict.trace['launches'])}"
    yield f"   output {actual:.5f}, difference {difference:+.5f}: {abs(difference) / sigma:.2f} deviations"

    yield "8  oracle/judge.py: the statistics, as shares of their budgets (above 1 fails)"
    yield "   " + ", ".join(f"{name} {used:.2f}" for name, used in judgement.budgets.items())

    yield "9  results/verdict.py: the record of the verdict"
    record = verdict.record()
    for name in ("status", "budget", "statistic", "calls", "plan"):
        value = record[name]
        yield f"   {name}: {f'{value:.2f}' if isinstance(value, float) else value}"

    yield "10 plugin/: the pytest id; results/verdict.py: the line that runs the case again"
    yield f"   {module.__name__.replace('.', '/')}.py::test_{row.family}[{case}:{backend.name}:{device.name}]"
    yield f"   {verdict.reproduce}"


if __name__ == "__main__":
    for line in walk_lines():
        print(fill(line, 118, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False), flush=True)
