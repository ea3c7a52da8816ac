"""Scenarios: which calls a case makes, in which order. `run_scenario(session)` runs the case's own, `scenarios()` lists
all of them, `check_scenario(case)` refuses a case whose scenario there is not; registry.py says how to write one.

Every module of this room must be in the list below: its scenarios are registered by the import.
"""

from harness.base.suggest import did_you_mean
from harness.problem.case import Case, DescriptorError
from harness.scenarios import (  # noqa: F401 - each registers its scenarios
    alignment,
    arguments,
    bad_input,
    basic,
    configurations,
    memory,
    relations,
    router,
    scratch,
    weight_swap,
)
from harness.scenarios.registry import SCENARIOS, Scenario
from harness.scenarios.stateful import sequences  # noqa: F401
from harness.session.session import Session

__all__ = ["SCENARIOS", "check_scenario", "run_scenario", "scenarios"]


def scenarios() -> dict[str, Scenario]:
    """Every scenario by its name, in the order of the list above."""
    return SCENARIOS


def check_scenario(case: Case) -> Case:
    """The case itself. DescriptorError names the scenarios there are, or the one that is meant."""
    name = case.scenario
    if name not in SCENARIOS:
        same = [known for known in SCENARIOS if known.partition(".")[0] == name.partition(".")[0]]
        some = same or sorted({f"{known.partition('.')[0]}.*" for known in SCENARIOS})
        words = did_you_mean(name, SCENARIOS) or f"; valid: {', '.join(some)}"
        raise DescriptorError(f"{case}: no scenario {name!r}{words}")
    return case


def run_scenario(session: Session) -> None:
    """Run the case's scenario. DescriptorError: there is none of its name."""
    SCENARIOS[check_scenario(session.case).scenario](session)
