"""How often the mistake that a mutant makes is the first that is named, from stored outcomes (mutate/outcomes.py).

Asked of the mutants that were noticed by a wrong output: the others return nothing that could be compared. An entry's
`cause` is the suspect of harness/bank that makes the same mistake; without it the bank has none, and any name is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from harness.diagnose.faults import FAULTS
from harness.diagnose.match import LEFTOVERS
from harness.mutate.bugs import Bug, BugError
from harness.mutate.outcomes import Outcome

Named = tuple[str, str, str]  #: mutant, its mistake ("": not in the bank), what was named ("": nothing)


@dataclass
class Score:
    """What was named, by whether it was right."""

    right: list[Named] = field(default_factory=list)
    wrong: list[Named] = field(default_factory=list)
    silent: list[Named] = field(default_factory=list)  #: nothing was named, though the bank has the mistake
    foreign: list[Named] = field(default_factory=list)  #: nothing was named, and the bank does not have it

    def lines(self) -> list[str]:
        """The score in words, and each name that was wrong or missing."""
        known = len(self.right) + len(self.silent) + sum(bool(mistake) for _, mistake, _ in self.wrong)
        asked = known + len(self.foreign) + sum(not mistake for _, mistake, _ in self.wrong)
        share = f" ({len(self.right) / known:.0%})" if known else ""
        return [
            f"of {asked} mutants that return a wrong output the bank has the mistake of {known}: named first for "
            f"{len(self.right)}{share}, not named for {len(self.silent)}; a wrong name for {len(self.wrong)} of all",
            *(
                f"  {mutant}: {said!r} for {mistake or 'a mistake that the bank has not'!r}"
                for mutant, mistake, said in self.wrong
            ),
            *(f"  {mutant}: nothing for {mistake!r}" for mutant, mistake, _ in self.silent),
        ]


def score(outcomes: Iterable[Outcome], bugs: Mapping[str, Bug]) -> Score:
    """The score of these outcomes. BugError for an entry whose cause is no suspect's name."""
    found = Score()
    for outcome in outcomes:
        bug = bugs.get(outcome.mutant)
        if bug is None or bug.control or outcome.by is None or outcome.by.status != "failed":
            continue
        if bug.cause and not known(bug.cause):
            raise BugError(
                f"{bug.kind}.toml: {bug.name}: cause={bug.cause!r}: no suspect of harness/bank has that name"
            )
        named = (bug.name, bug.cause, str(outcome.by.more.get("cause", "")))
        if named[2]:
            (found.right if named[1] == named[2] else found.wrong).append(named)
        else:
            (found.silent if bug.cause else found.foreign).append(named)
    return found


def known(cause: str) -> bool:
    """Whether a suspect has that name, those included that a session makes of the calls before."""
    what, _, when = cause.rpartition(" of ")
    return cause in FAULTS or (when.endswith("call before") or when.endswith("calls before")) and what in LEFTOVERS
