"""A failure in words: what is wrong, where (tokens, experts, columns), its pattern, and the worst elements."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.diagnose.match import Match
from harness.diagnose.patterns import Where, count, patterns, runs
from harness.inputs.draw import Inputs
from harness.oracle.judge import Judgement
from harness.results.verdict import STATISTICS
from reference.moe import local_experts

SHOWN = 6


def explain(
    judgement: Judgement, inputs: Inputs, what: str = "", naming: Match | None = None, stage: str = ""
) -> tuple[str, str]:
    """(one line, the whole report). naming: what the output is like; stage: what is said of the stages."""
    assert judgement.wrong is not None and judgement.got is not None and judgement.expected is not None
    wrong = judgement.wrong.cpu()
    problem = inputs.case.problem
    experts = local_experts(inputs.topk_ids.cpu(), problem.num_experts, _cpu(inputs.layer.expert_map))
    where = Where(wrong, wrong.any(1), wrong.any(0), experts)
    found_patterns = list(patterns(judgement, where))
    over = [f"{name} {_share(used)}" for name, used in judgement.budgets.items() if not used <= 1]
    if judgement.worst == "equal":
        summary = f"not bit-exact, {count(wrong)} outputs differ"
    elif judgement.worst == "class":
        summary = f"{count(wrong)} outputs are NaN or infinite where the oracle's are not, or the other way round"
    else:
        used = _share(judgement.budgets[judgement.worst])
        summary = f"{judgement.worst} ({STATISTICS[judgement.worst]}) is {used} its budget"
    if naming and naming.cause:
        summary += f": {naming}"
    elif found_patterns:
        summary += f": {found_patterns[0]}"
    if what:
        summary = f"{what}: {summary}"
    lines = [summary]
    if judgement.worst not in ("equal", "class"):
        lines += [
            f"  over budget   {', '.join(over)}",
            f"  all budgets   {', '.join(f'{n} {_share(u)}' for n, u in judgement.budgets.items())}",
        ]
    lines += [
        f"  plan          {judgement.plan}",
        f"  wrong         {count(wrong)}; {count(where.rows)} tokens; {count(where.columns)} columns",
    ]
    lines += [f"  note          {note}" for note in judgement.notes[:SHOWN]]
    lines += naming.lines() if naming else []
    lines += [f"  stage         {stage}"] if stage else []
    lines += [f"  pattern       {pattern}" for pattern in found_patterns]
    if where.rows.any():
        lines.append(f"  tokens        {runs(where.rows)}")
        lines.append(f"  columns       {runs(where.columns)}")
        lines.append(f"  experts       {_by_expert(where)}")
        lines += _worst(judgement, where)
    return summary, "\n".join(lines)


def _cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()


def _share(used: float) -> str:
    return "infinitely much" if used == float("inf") else f"{used:.2f}x" if used >= 1 else f"{used:.0%}"


def _by_expert(where: Where) -> str:
    parts = []
    for e in where.expert[where.expert >= 0].unique().tolist():
        mine = (where.expert == e).any(1)
        if (mine & where.rows).any():
            parts.append(f"{e}: {int((mine & where.rows).sum())} of {int(mine.sum())} tokens wrong")
    return "; ".join(parts[:8]) + ("; ..." if len(parts) > 8 else "")


def _worst(judgement: Judgement, where: Where) -> list[str]:
    got, expected = judgement.got, judgement.expected
    assert got is not None and expected is not None
    got, expected = got.cpu(), expected.cpu()
    sigma = None if judgement.sigma is None else judgement.sigma.cpu()
    error = torch.where(where.wrong, (got - expected).abs().nan_to_num(nan=float("inf")), -1.0)
    if sigma is not None:
        error = torch.where(where.wrong, error / sigma.clamp(min=1e-300), -1.0)
    lines = [
        f"  {'worst':<13} {'token':>6} {'column':>7} {'expected':>14} {'got':>14} {'off by':>12}  experts of the token"
    ]
    for place in error.flatten().argsort(descending=True)[:SHOWN].tolist():
        token, column = divmod(place, got.shape[1])
        if not where.wrong[token, column]:
            break
        e, g = float(expected[token, column]), float(got[token, column])
        off = f"{g - e:.3g}" if sigma is None else f"{abs(g - e) / max(float(sigma[token, column]), 1e-300):.1f} sigma"
        lines.append(
            f"  {'':<13} {token:>6} {column:>7} {e:>14.6g} {g:>14.6g} {off:>12}  {where.expert[token].tolist()}"
        )
    return lines
