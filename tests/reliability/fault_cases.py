"""The family of cases of these runs: the rows of the run's folder. Its name keeps it out of `pytest tests`."""

from tests.reliability.backend import ROWS as AT

FAMILY = "faults"
ROWS = {descriptor: name or "a case without a fault" for descriptor, name in AT.items()}


def test_faults(check):
    check()
