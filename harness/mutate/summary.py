"""The summary of a run over the mutants: survivors first, then entries that are wrong, then counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from harness.base.table import aligned
from harness.base.text import cut, number
from harness.mutate.bugs import Bug
from harness.mutate.field_rules import RULES
from harness.mutate.outcomes import BUG_OUTCOMES, ILL_MADE, Outcome, count_killed
from harness.mutate.protocol import NOTICED, MutantRun
from harness.problem.case import Case

#: Any harness notices these, whatever its rule.
NOTICED_BY_ALL = ("crashed", "hung", "died")
RULES_HEADER = ("rule", "accepts", "bugs noticed", "of wrong outputs", "false alarms")
_REASON = 160  #: characters of a reason in a line


def outcome_line(outcome: Outcome) -> str:
    """One mutant in one line."""
    text = outcome.reason
    if outcome.by is not None:
        backend = f" on {outcome.by.backend}" if outcome.by.backend else ""
        text = f"{outcome.by.status} in {outcome.by.case}{backend}: {cut(outcome.by.reason, _REASON)}"
    cost = f"[{number(len(outcome.runs), 'case')}, {outcome.seconds:.1f} s]"
    return " ".join(filter(None, [f"{outcome.outcome:9} {outcome.mutant:44}", text, cost]))


def summary_lines(outcomes: list[Outcome], bugs: dict[str, Bug], whole: bool) -> list[str]:
    """The summary. whole: the runs of a bug continued after the first case that noticed it."""
    lines = _attention_lines(outcomes, bugs)
    killed, of = count_killed(outcomes)
    if of:
        lines += ["", f"killed {killed} of {number(of, 'bug')} ({_share(killed, of)})"]
        how = [outcome.by.status for outcome in outcomes if outcome.outcome == "killed" and outcome.by]
        lines += ["by     " + ", ".join(f"{how.count(word)} {word}" for word in NOTICED if word in how)] if how else []
        lines += ["", *_class_lines(outcomes)]
        lines += ["", *_case_kind_lines(outcomes)] if whole else ["", *_first_family_lines(outcomes)]
    runs = [run for outcome in outcomes if outcome.control for run in outcome.runs]
    if runs:
        wrong = sum(len(outcome.accusations) for outcome in outcomes if outcome.control)
        controls = sum(outcome.control for outcome in outcomes)
        lines += [
            "",
            f"controls: {number(controls, 'correct variant')}, {number(len(runs), 'run')}, "
            f"{number(wrong, 'false alarm')} ({_share(wrong, len(runs))})",
        ]
    return lines


def _attention_lines(outcomes: list[Outcome], bugs: dict[str, Bug]) -> list[str]:
    lines = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.mutant):
        why = bugs[outcome.mutant].survives if outcome.mutant in bugs else ""
        if outcome.outcome == "survived":
            lines.append(f"SURVIVED {outcome_line(outcome)[10:]}")
            lines.append(f"          {why}" if why else f"          unexplained ({outcome.source})")
        elif outcome.outcome == "killed" and why:
            lines.append(f"its entry says that it survives, but it was killed: {outcome.mutant}")
    for word in (*ILL_MADE, "accused"):
        lines += [f"{word.upper()} {outcome_line(o)[10:]}" for o in outcomes if o.outcome == word]
    return lines


def _class_lines(outcomes: list[Outcome]) -> list[str]:
    rows: list[tuple[str, ...]] = [("class", "killed", "of", "")]
    for kind in sorted({outcome.kind for outcome in outcomes if not outcome.control}):
        killed, of = count_killed(outcome for outcome in outcomes if outcome.kind == kind)
        rows.append((kind, str(killed), str(of), _share(killed, of)))
    return aligned(rows)


def _first_family_lines(outcomes: list[Outcome]) -> list[str]:
    """Per family: how many bugs one of its cases noticed first."""
    killed: dict[str, int] = defaultdict(int)
    for outcome in outcomes:
        if outcome.outcome == "killed" and outcome.by:
            killed[outcome.by.family] += 1
    most = sorted(killed, key=lambda family: (-killed[family], family))
    return aligned([("family", "killed first"), *((family or "-", str(killed[family])) for family in most)])


def _case_kind_lines(outcomes: list[Outcome]) -> list[str]:
    """Per family, fill and dtype: the bugs that such a case noticed, of the bugs on which one ran; and the false
    alarms, of the runs of controls."""
    rows: list[tuple[str, ...]] = [("", "", "killed", "of", "", "false alarms", "of")]
    for title, value_of in _CASE_KINDS.items():
        ran: dict[str, set[str]] = defaultdict(set)
        noticed: dict[str, set[str]] = defaultdict(set)
        alarms: dict[str, list[bool]] = defaultdict(list)
        for outcome in outcomes:
            for run in outcome.runs:
                value = value_of(run)
                if value and outcome.control:
                    alarms[value].append(run.noticed)
                elif value and outcome.outcome in BUG_OUTCOMES:
                    ran[value].add(outcome.mutant)
                    noticed[value] |= {outcome.mutant} if run.noticed else set()
        for value in sorted({*ran, *alarms}):
            killed, of = len(noticed[value]), len(ran[value])
            share = _share(killed, of) if of else ""
            rows.append((title, value, str(killed), str(of), share, str(sum(alarms[value])), str(len(alarms[value]))))
    return aligned(rows)


def _case(run: MutantRun) -> Case | None:
    return Case.parse(run.case) if run.backend else None


_CASE_KINDS: dict[str, Callable[[MutantRun], str]] = {
    "family": lambda run: run.family,
    "fill": lambda run: case.fill if (case := _case(run)) else "",
    "dtype": lambda run: case.problem.dtype if (case := _case(run)) else "",
}


# -- this harness and the rules of other projects ----------------------------------------------------------------------
def rule_rows(outcomes: list[Outcome], names: Iterable[str]) -> list[tuple[str, ...]]:
    """One row a rule, this harness first, under RULES_HEADER.

    What the rule accepts; the share of bugs that it notices, of all and of those with a wrong output; the share of
    false alarms in the runs of controls that gave an output. All rules judge the same calls, and are credited with
    each exception and each process that ends.
    """
    bugs = [outcome for outcome in outcomes if outcome.outcome in BUG_OUTCOMES]
    wrong = [outcome for outcome in bugs if any(run.status == "failed" for run in outcome.runs)]
    runs = [run for outcome in outcomes if outcome.control for run in outcome.runs if run.more.get("seen")]

    def row(name: str, accepts: str, notices: Callable[[MutantRun], bool]) -> tuple[str, ...]:
        killed = [sum(any(map(notices, outcome.runs)) for outcome in group) for group in (bugs, wrong)]
        alarms = _count_and_share(sum(map(notices, runs)), len(runs))
        return (
            name, accepts, _count_and_share(killed[0], len(bugs)), _count_and_share(killed[1], len(wrong)), alarms,
        )  # fmt: skip

    rows = [row("moe-harness", "bit-exact, or within the predicted deviation; every promise", lambda r: r.noticed)]
    for name in names:

        def rejected(run: MutantRun, name: str = name) -> bool:
            return run.status in NOTICED_BY_ALL or name in run.more.get("rejected", ())

        rows.append(row(RULES[name].source, RULES[name].description, rejected))
    return rows


def _count_and_share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({_share(part, whole)})" if whole else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
