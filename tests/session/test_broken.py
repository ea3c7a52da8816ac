"""Every deliberately broken backend must be noticed in every family of cases that judges the layer."""

import pytest

from harness.device import Device
from harness.problem.families import rows
from harness.run.case import run_case
from harness.session.applies import why_not
from tests.support.broken import FAULTS, Broken, layer_families
from tests.support.emulated import Emulated

CPU = Device("cpu")


def inner_for(family: str):
    if family not in ("scratch", "errors"):
        return Emulated("emulated")
    from kernels.triton.backend import TritonPermuteMoE  # the one with a scratch object, and argument checks

    return TritonPermuteMoE()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("module", layer_families(), ids=lambda m: m.FAMILY)
def test_a_broken_backend_fails_in_every_family(module, fault):
    inner = inner_for(module.FAMILY)
    asked = [r.case for r in rows(module, on_cpu=True) if why_not(r.case, inner, CPU) is None]
    # Rows that bear on the fault first, the others in strides: one that notices is enough.
    asked.sort(key=lambda case: fault == "bias_missing" and not case.problem.bias)
    for case in asked:
        verdict = run_case(case, Broken(fault, inner), CPU, module.FAMILY)
        if verdict.status in ("failed", "crashed"):
            assert verdict.status == "failed", verdict.report
            assert verdict.report and verdict.reason
            return
    pytest.fail(f"none of {len(asked)} cases of {module.FAMILY} noticed {fault}")
