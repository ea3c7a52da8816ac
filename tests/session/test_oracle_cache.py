"""session/oracle_cache.py: an expected result is found again for equal tensors, and for no others."""

from dataclasses import fields, replace

import pytest
import torch

from harness.backend import Layer
from harness.device import Device
from harness.inputs.draw import draw, in_layout
from harness.problem.case import Case
from harness.run.case import run_case
from harness.session import oracle_cache
from harness.session.oracle_cache import OracleCache, fingerprint
from reference.plan import RoundingPlan
from tests.support.emulated import Emulated

CPU = Device("cpu")
PLACE = torch.device("cpu")
CASE = Case.parse("t5-h64-i32-e4-k2-bf16-bias-ep2.1-random")
QUANTIZED = Case.parse("t5-h64-i32-e4-k2-bf16-e4m3.tensor.static-random")


@pytest.fixture
def computed(monkeypatch):
    """The calls of the oracle, one entry each."""
    calls = []
    for name in ("expect", "exact_output"):
        real = getattr(oracle_cache, name)
        monkeypatch.setattr(oracle_cache, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    return calls


def changed(tensor):
    """The tensor with one bit flipped."""
    copy = tensor.clone()
    copy.view(torch.uint8).view(-1)[-1] ^= 1
    return copy


# -- the key ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", [CASE, QUANTIZED], ids=str)
def test_a_flipped_bit_of_any_tensor_is_another_question(case):
    inputs = draw(case)
    question = fingerprint(inputs)
    tensors = {**inputs.arguments(), **inputs.layer.tensors()}
    assert len(tensors) >= 8
    for name, tensor in tensors.items():
        if name in inputs.arguments():
            other = replace(inputs, **{name: changed(tensor)})
        else:
            other = replace(inputs, layer=replace(inputs.layer, **{name: changed(tensor)}))
        assert fingerprint(other) != question, name


def test_every_tensor_of_a_layer_takes_part():
    """A tensor field that Layer.tensors() left out would not be in the key."""
    layer = replace(draw(CASE).layer, w13_scale=torch.ones(1), w2_scale=torch.ones(1), a13_scale=torch.ones(1))
    layer = replace(layer, a2_scale=torch.ones(1))
    unset = {f.name for f in fields(Layer)} - {"problem"} - layer.tensors().keys()
    assert unset == {f.name for f in fields(Layer) if getattr(layer, f.name) is None}


def test_swapped_rows_are_another_question():
    inputs = draw(CASE)
    for name, tensor in inputs.arguments().items():
        assert fingerprint(replace(inputs, **{name: tensor.flip(0)})) != fingerprint(inputs), name
    swapped = replace(inputs.layer, w2=inputs.layer.w2.flip(0))
    assert fingerprint(replace(inputs, layer=swapped)) != fingerprint(inputs)


@pytest.mark.parametrize(
    "change",
    [dict(activation="gelu"), dict(limit=2.0), dict(num_experts=8), dict(dtype="fp16"), dict(shared_experts=1)],
)
def test_what_the_oracle_reads_of_the_problem_takes_part(change):
    inputs = draw(Case.parse("t5-h64-i32-e4-k2-bf16-random"))
    problem = replace(inputs.case.problem, **change)
    for other in (replace(inputs.layer, problem=problem), inputs.layer):
        case = inputs.case if other is not inputs.layer else replace(inputs.case, problem=problem)
        assert fingerprint(replace(inputs, case=case, layer=other)) != fingerprint(inputs), change


def test_strides_layout_and_names_do_not_matter():
    inputs = draw(CASE)
    wide = torch.zeros(5, 80, dtype=torch.bfloat16)
    wide[:, :64] = inputs.hidden_states
    problem = replace(inputs.case.problem, padded=True, layout="kn", routing="one")
    other = replace(
        inputs, case=replace(inputs.case, problem=problem), hidden_states=wide[:, :64],
        backend_layer=in_layout(inputs.layer, "kn"),
    )  # fmt: skip
    assert fingerprint(other) == fingerprint(inputs)


# -- the cache --------------------------------------------------------------------------------------------------------
def test_equal_inputs_are_computed_once_and_changed_ones_again(computed):
    cache, plans = OracleCache(), [RoundingPlan(), RoundingPlan(act="io")]
    inputs = cache.inputs(CASE, CPU)
    first = list(cache.expected(inputs, plans, PLACE))
    again = list(cache.expected(draw(CASE), plans, PLACE))
    assert [a is b for a, b in zip(first, again)] == [True, True] and len(computed) == 2
    doubled = replace(inputs, topk_weights=2 * inputs.topk_weights)
    other = next(cache.expected(doubled, plans, PLACE))
    torch.testing.assert_close(other.out, 2 * first[0].out)
    assert len(computed) == 3  # under the first plan alone: the second was not reached
    cache.exact_output(inputs, PLACE)
    assert computed == ["expect"] * 3 + ["exact_output"]


def test_a_tensor_that_was_written_to_is_computed_again(computed):
    """The mistake that a label set by hand makes possible: new weights judged by the old result."""
    cache, inputs = OracleCache(), draw(CASE.change(fill="exact"))
    before = cache.exact_output(inputs, PLACE)
    inputs.layer.w2.neg_()
    after = cache.exact_output(inputs, PLACE)
    assert len(computed) == 2 and not torch.equal(before, after)
    inputs.layer.w2.neg_()
    assert cache.exact_output(inputs, PLACE) is before


def test_layers_and_inputs_are_shared_until_they_are_forgotten():
    cache = OracleCache()
    first, more = cache.inputs(CASE, CPU), cache.inputs(CASE.change(tokens=9), CPU)
    assert cache.inputs(CASE, CPU) is first
    assert more.layer.w13.data_ptr() == first.layer.w13.data_ptr()
    cache.forget()
    assert cache.inputs(CASE, CPU).layer.w13.data_ptr() != first.layer.w13.data_ptr()


def test_the_number_of_results_is_bounded(computed):
    cache = OracleCache()
    for seed in range(oracle_cache.RESULTS + 1):
        cache.exact_output(draw(CASE.change(seed=seed)), PLACE)
    cache.exact_output(draw(CASE.change(seed=oracle_cache.RESULTS)), PLACE)
    assert len(computed) == oracle_cache.RESULTS + 1
    cache.exact_output(draw(CASE), PLACE)  # the oldest
    assert len(computed) == oracle_cache.RESULTS + 2


def test_another_whole_size_layer_makes_room_and_the_same_one_does_not():
    cache = OracleCache()
    cache.make_room(CASE.problem)
    inputs = cache.inputs(CASE, CPU)
    cache.make_room(replace(CASE.problem, tokens=99, routing="one"))
    assert cache.inputs(CASE, CPU) is inputs
    cache.make_room(replace(CASE.problem, hidden_size=128))
    assert cache.inputs(CASE, CPU) is not inputs


def test_a_second_backend_costs_no_pass_of_the_oracle(computed):
    oracle_cache.ORACLE_CACHE.forget()
    for backend in (Emulated("one"), Emulated("two")):
        for scenario in ("once", "repeat.bits", "swap.w2"):
            assert run_case(replace(CASE, scenario=scenario), backend, CPU).status == "passed"
    assert len(computed) == 2  # the case's own inputs, and those of the new w2
