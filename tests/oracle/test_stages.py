"""The readers of the pipeline: the deviation of every stage, and the oracle resumed from any value."""

import pytest
import torch

from harness.inputs.draw import draw
from harness.oracle import deviation
from harness.oracle.stages import COMPUTED_BY, Oracle
from harness.problem.case import Case
from reference.moe import PIPELINE
from reference.plan import RoundingPlan


def test_every_stage_but_the_assignment_has_a_deviation_and_a_value():
    names = [stage.__name__ for stage in PIPELINE[1:]]
    assert [stage.__name__ for stage in deviation.STAGES] == names == list(COMPUTED_BY.values())


@pytest.mark.parametrize(
    "text", ["t9-h64-i40-e4-k2-bf16-bias-shared1-random", "t9-h136-i72-e4-k2-bf16-e4m3.block.group-random"]
)
@pytest.mark.parametrize("name", COMPUTED_BY)
def test_an_answer_follows_from_every_value_and_changes_with_it(text, name):
    o = Oracle(draw(Case.parse(text)), RoundingPlan(gate_up="io", act="io", slot="io"))
    value = getattr(o.s, name)
    assert torch.equal(o.resume(**{name: value}).stages.out, o.s.out)
    assert not torch.equal(o.resume(**{name: 1.5 * value}).stages.out, o.s.out)
