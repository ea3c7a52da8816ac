"""How often a failure names the fault of its mutant first, from stored outcomes (mutate/outcomes.py).

Counts the mutants that a wrong output revealed; the others return no output to compare. An entry's `cause` is the text
of the fault (harness/diagnose/faults) that makes the same mistake. An entry without `cause` has no fault in the bank:
any name for it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from harness.diagnose.match import fault_id
from harness.mutate.bugs import Bug, BugError
from harness.mutate.outcomes import Outcome

Named = tuple[str, str, str]  #: mutant, its fault ("": not in the bank), the fault that was named ("": none)


@dataclass
class Score:
    """The mutants by whether the name was right."""

    right: list[Named] = field(default_factory=list)
    wrong: list[Named] = field(default_factory=list)
    silent: list[Named] = field(default_factory=list)  #: no name, although the bank has the fault
    foreign: list[Named] = field(default_factory=list)  #: no name, and the bank does not have the fault

    def lines(self) -> list[str]:
        """The score in words, and each name that was wrong or missing."""
        in_bank = len(self.right) + len(self.silent) + sum(bool(cause) for _, cause, _ in self.wrong)
        total = in_bank + len(self.foreign) + sum(not cause for _, cause, _ in self.wrong)
        share = f" ({len(self.right) / in_bank:.0%})" if in_bank else ""
        return [
            f"of {total} mutants that return a wrong output the bank has the fault of {in_bank}: named first for "
            f"{len(self.right)}{share}, not named for {len(self.silent)}; a wrong name for {len(self.wrong)} of all",
            *(
                f"  {mutant}: {named!r} for {cause or 'a fault that the bank does not have'!r}"
                for mutant, cause, named in self.wrong
            ),
            *(f"  {mutant}: nothing for {cause!r}" for mutant, cause, _ in self.silent),
        ]


def score(outcomes: Iterable[Outcome], bugs: Mapping[str, Bug]) -> Score:
    """The score of the outcomes. BugError for an entry whose `cause` is not the text of a fault."""
    result = Score()
    for outcome in outcomes:
        bug = bugs.get(outcome.mutant)
        if bug is None or bug.control or outcome.by is None or outcome.by.status != "failed":
            continue
        if bug.cause and fault_id(bug.cause) is None:
            raise BugError(f"{bug.kind}.toml: {bug.name}: cause={bug.cause!r}: no fault has that text")
        named = (bug.name, bug.cause, str(outcome.by.more.get("cause", "")))
        if named[2]:
            right = bug.cause and fault_id(bug.cause) == fault_id(named[2])
            (result.right if right else result.wrong).append(named)
        else:
            (result.silent if bug.cause else result.foreign).append(named)
    return result
