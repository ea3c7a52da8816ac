"""Scenarios: which calls a case makes, in which order. `run_scenario(session)` runs the case's own, `scenarios()` lists
all of them; registry.py says how to write one.

Every module of this room must be in the list below: its scenarios are registered by the import.
"""

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

__all__ = ["SCENARIOS", "run_scenario", "scenarios"]


def scenarios() -> dict[str, Scenario]:
    """Every scenario by its name, in the order of the list above."""
    return SCENARIOS


def run_scenario(session: Session) -> None:
    """Run the case's scenario. ValueError names the scenarios there are."""
    name = session.case.scenario
    if name not in SCENARIOS:
        raise ValueError(f"scenario={name}: one of {', '.join(sorted(SCENARIOS))}")
    SCENARIOS[name](session)
