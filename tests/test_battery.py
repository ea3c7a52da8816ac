"""Every row of every family is a case, on every device: also those that this machine never collects."""

import pytest

from harness.battery import families, rows
from harness.device import DEVICES, Device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", families(), ids=lambda m: m.FAMILY)
def test_rows_are_cases(module, device):
    for row in rows(module, Device(device)):
        assert row.why, row.case
