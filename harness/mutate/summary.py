"""What a run over the mutants came to, in words: survivors first, then what is wrong with entries, then the counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from harness.base.text import cut, number
from harness.mutate.bugs import Bug
from harness.mutate.field_rules import RULES
from harness.mutate.outcomes import BUG_OUTCOMES, ILL_MADE, Outcome, counts
from harness.mutate.protocol import NOTICED, Run
from harness.problem.case import Case

#: What every harness sees, whatever its rule.
SEEN_BY_ALL = ("crashed", "hung", "died")
_REASON = 160  #: characters of a reason in a line


def line(found: Outcome) -> str:
    """One mutant in one line."""
    told = found.reason
    if found.by is not None:
        where = f" on {found.by.backend}" if found.by.backend else ""
        told = f"{found.by.status} in {found.by.case}{where}: {cut(found.by.reason, _REASON)}"
    asked = f"[{number(len(found.runs), 'case')}, {found.seconds:.1f} s]"
    return " ".join(filter(None, [f"{found.outcome:9} {found.mutant:44}", told, asked]))


def told(outcomes: list[Outcome], bugs: dict[str, Bug], whole: bool) -> list[str]:
    """The summary. whole: the runs went on after the first case that noticed."""
    lines = _attention(outcomes, bugs)
    killed, asked = counts(outcomes)
    if asked:
        lines += ["", f"killed {killed} of {number(asked, 'bug')} ({_share(killed, asked)})"]
        how = [found.by.status for found in outcomes if found.outcome == "killed" and found.by]
        lines += ["by     " + ", ".join(f"{how.count(word)} {word}" for word in NOTICED if word in how)] if how else []
        lines += ["", *_by_class(outcomes)]
        lines += ["", *_by_question(outcomes)] if whole else ["", *_by_killer(outcomes)]
    runs = [run for found in outcomes if found.control for run in found.runs]
    if runs:
        wrong = sum(len(found.accusations) for found in outcomes if found.control)
        controls = sum(found.control for found in outcomes)
        lines += [
            "",
            f"controls: {number(controls, 'correct variant')}, {number(len(runs), 'run')}, "
            f"{number(wrong, 'false alarm')} ({_share(wrong, len(runs))})",
        ]
    return lines


def _attention(outcomes: list[Outcome], bugs: dict[str, Bug]) -> list[str]:
    lines = []
    for found in sorted(outcomes, key=lambda found: found.mutant):
        why = bugs[found.mutant].survives if found.mutant in bugs else ""
        if found.outcome == "survived":
            lines.append(f"SURVIVED {line(found)[10:]}")
            lines.append(f"          {why}" if why else f"          unexplained ({found.source})")
        elif found.outcome == "killed" and why:
            lines.append(f"its entry says that it survives, and it does not: {found.mutant}")
    for word in (*ILL_MADE, "accused"):
        lines += [f"{word.upper()} {line(found)[10:]}" for found in outcomes if found.outcome == word]
    return lines


def _by_class(outcomes: list[Outcome]) -> list[str]:
    kinds = sorted({found.kind for found in outcomes if not found.control})
    rows: list[tuple[str, ...]] = [("class", "killed", "of", "")]
    for kind in kinds:
        killed, asked = counts(found for found in outcomes if found.kind == kind)
        rows.append((kind, str(killed), str(asked), _share(killed, asked)))
    return _aligned(rows)


def _by_killer(outcomes: list[Outcome]) -> list[str]:
    killers: dict[str, int] = defaultdict(int)
    for found in outcomes:
        if found.outcome == "killed" and found.by:
            killers[found.by.family] += 1
    most = sorted(killers, key=lambda family: (-killers[family], family))
    return _aligned([("family", "killed first"), *((family or "-", str(killers[family])) for family in most)])


def _by_question(outcomes: list[Outcome]) -> list[str]:
    """Per family, fill and dtype: of the mutants that were asked such a case, how many were noticed by one; and the
    accusations of correct variants."""
    rows: list[tuple[str, ...]] = [("", "", "killed", "of", "", "false alarms", "of")]
    for title, word in _QUESTIONS.items():
        asked: dict[str, set[str]] = defaultdict(set)
        noticed: dict[str, set[str]] = defaultdict(set)
        alarms: dict[str, list[bool]] = defaultdict(list)
        for found in outcomes:
            for run in found.runs:
                if (value := word(run)) and found.control:
                    alarms[value].append(run.noticed)
                elif value and found.outcome in BUG_OUTCOMES:
                    asked[value].add(found.mutant)
                    noticed[value] |= {found.mutant} if run.noticed else set()
        for value in sorted({*asked, *alarms}):
            killed, of = len(noticed[value]), len(asked[value])
            share = _share(killed, of) if of else ""
            rows.append((title, value, str(killed), str(of), share, str(sum(alarms[value])), str(len(alarms[value]))))
    return _aligned(rows)


def _case(run: Run) -> Case | None:
    return Case.parse(run.case) if run.backend else None


_QUESTIONS: dict[str, Callable[[Run], str]] = {
    "family": lambda run: run.family,
    "fill": lambda run: case.fill if (case := _case(run)) else "",
    "dtype": lambda run: case.problem.dtype if (case := _case(run)) else "",
}


# -- our rules and the field's ----------------------------------------------------------------------------------------
def against(outcomes: list[Outcome], names: Iterable[str]) -> list[tuple[str, ...]]:
    """One row a rule, ours first, a heading above: what it accepts, the share of bugs that it notices, of all and of
    those that give a wrong output, and the share of false alarms in the runs of controls that gave an output.

    All rules judge the same calls. What ends a process, or raises, every harness sees.
    """
    bugs = [found for found in outcomes if found.outcome in BUG_OUTCOMES]
    wrong = [found for found in bugs if any(run.status == "failed" for run in found.runs)]
    runs = [run for found in outcomes if found.control for run in found.runs if run.more.get("seen")]
    rows: list[tuple[str, ...]] = [("rule", "accepts", "bugs noticed", "of wrong outputs", "false alarms")]

    def row(name: str, says: str, notices: Callable[[Run], bool]) -> tuple[str, ...]:
        killed = [sum(any(map(notices, found.runs)) for found in asked) for asked in (bugs, wrong)]
        alarms = _of(sum(map(notices, runs)), len(runs))
        return (name, says, _of(killed[0], len(bugs)), _of(killed[1], len(wrong)), alarms)

    rows.append(row("moe-harness", "bit-exact, or within the predicted deviation; every promise", lambda r: r.noticed))
    for name in names:

        def rejected(run: Run, name: str = name) -> bool:
            return run.status in SEEN_BY_ALL or name in run.more.get("rejected", ())

        rows.append(row(RULES[name].source, RULES[name].says, rejected))
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table for the README."""
    head, *body = [" | ".join(row) for row in rows]
    return "\n".join(f"| {text} |" for text in (head, " | ".join("---" for _ in rows[0]), *body)) + "\n"


def plain(rows: list[tuple[str, ...]]) -> list[str]:
    """The same for a terminal."""
    return _aligned(rows)


def _of(part: int, whole: int) -> str:
    return f"{part}/{whole} ({_share(part, whole)})" if whole else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
