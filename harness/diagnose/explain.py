"""Builds the Report of a wrong output: the number of wrong outputs, their places, patterns, and the worst elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.diagnose.error_map import error_map_of
from harness.diagnose.match import Match
from harness.diagnose.patterns import Places, count, patterns, runs
from harness.diagnose.report import Report
from harness.inputs.draw import Inputs
from harness.oracle.judge import Judgement
from harness.results.verdict import STATISTICS
from reference.moe import local_experts

SHOWN = 6  #: notes, and worst elements, at most
SHOWN_EXPERTS = 8


def explain(
    judgement: Judgement, inputs: Inputs, what: str = "", match: Match | None = None, stage: str = "", replay: str = ""
) -> Report:
    """The report of a judgement that failed.

    what: the call, for the summary; match: the faults that the output resembles; stage, replay: from localise.
    """
    assert judgement.wrong is not None and judgement.got is not None and judgement.expected is not None
    wrong = judgement.wrong.cpu()
    experts = local_experts(inputs.topk_ids.cpu(), inputs.case.problem.num_experts, _cpu(inputs.layer.expert_map))
    places = Places(wrong, wrong.any(1), wrong.any(0), experts)
    common = list(patterns(judgement, places))
    return Report(
        summary=_summary(judgement, wrong, what, match, common),
        fields=[*_budgets(judgement), *_counts(judgement, places)],
        cause=match.cause if match else "",
        matches=_matches(match) if match else [],
        stage=stage,
        replay=replay,
        patterns=common,
        places=_places(places) if places.rows.any() else [],
        worst=_worst(judgement, places) if places.rows.any() else [],
        error_map=error_map_of(judgement, inputs),
    )


def _summary(judgement: Judgement, wrong: Tensor, what: str, match: Match | None, common: list[str]) -> str:
    if judgement.worst == "equal":
        summary = f"not bit-exact, {count(wrong)} outputs differ"
    elif judgement.worst == "class":
        summary = f"{count(wrong)} outputs are NaN or infinite where the oracle's are not, or the other way round"
    else:
        used = _share(judgement.budgets[judgement.worst])
        summary = f"{judgement.worst} ({STATISTICS[judgement.worst]}) is {used} its budget"
    reason = str(match) if match and match.cause else common[0] if common else ""
    return ": ".join(filter(None, (what, summary, reason)))


def _budgets(judgement: Judgement) -> list[tuple[str, str]]:
    if judgement.worst in ("equal", "class"):
        return []
    used = {name: f"{name} {_share(share)}" for name, share in judgement.budgets.items()}
    over = [used[name] for name, share in judgement.budgets.items() if not share <= 1]
    return [("over budget", ", ".join(over)), ("all budgets", ", ".join(used.values()))]


def _counts(judgement: Judgement, places: Places) -> list[tuple[str, str]]:
    wrong = f"{count(places.wrong)}; {count(places.rows)} tokens; {count(places.columns)} columns"
    notes = [("note", note) for note in judgement.notes[:SHOWN]]
    return [("plan", judgement.plan), ("wrong", wrong), *notes]


def _matches(match: Match) -> list[tuple[str, str]]:
    label = "hint" if match.hint else "cause"
    return [(label, str(match)), *((label, f"or {text}") for text in match.alternatives)]


def _places(places: Places) -> list[tuple[str, str]]:
    return [("tokens", runs(places.rows)), ("columns", runs(places.columns)), ("experts", _by_expert(places))]


def _by_expert(places: Places) -> str:
    parts = []
    for e in places.expert[places.expert >= 0].unique().tolist():
        mine = (places.expert == e).any(1)
        if (mine & places.rows).any():
            parts.append(f"{e}: {int((mine & places.rows).sum())} of {int(mine.sum())} tokens wrong")
    return "; ".join(parts[:SHOWN_EXPERTS]) + ("; ..." if len(parts) > SHOWN_EXPERTS else "")


def _worst(judgement: Judgement, places: Places) -> list[Sequence[str]]:
    """The elements that are off the most, in predicted standard deviations where there are any; the cells of WORST."""
    got, expected = judgement.got, judgement.expected
    assert got is not None and expected is not None
    got, expected = got.cpu(), expected.cpu()
    sigma = None if judgement.sigma is None else judgement.sigma.cpu()
    error = torch.where(places.wrong, (got - expected).abs().nan_to_num(nan=float("inf")), -1.0)
    if sigma is not None:
        error = torch.where(places.wrong, error / sigma.clamp(min=1e-300), -1.0)
    rows: list[Sequence[str]] = []
    for place in error.flatten().argsort(descending=True)[:SHOWN].tolist():
        token, column = divmod(place, got.shape[1])
        if not places.wrong[token, column]:
            break
        e, g = float(expected[token, column]), float(got[token, column])
        off = f"{g - e:.3g}" if sigma is None else f"{abs(g - e) / max(float(sigma[token, column]), 1e-300):.1f} sigma"
        rows.append((str(token), str(column), f"{e:.6g}", f"{g:.6g}", off, str(places.expert[token].tolist())))
    return rows


def _share(used: float) -> str:
    return "infinitely much" if used == float("inf") else f"{used:.2f}x" if used >= 1 else f"{used:.0%}"


def _cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()
