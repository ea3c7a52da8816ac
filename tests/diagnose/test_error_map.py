"""diagnose/error_map.py: where an output is off, small enough for a record."""

import json

import pytest
import torch

from harness.device import Device
from harness.diagnose.error_map import error_map
from harness.problem.case import Case
from harness.run.case import run_case
from tests.session.test_session import CASE, Wrapped

CPU = Device("cpu")


def mapped(got, expected, sigma=None, experts=None):
    experts = torch.zeros(len(got), 1, dtype=torch.long) if experts is None else experts
    return error_map(got, expected, got != expected, sigma, experts)


def test_a_cell_is_the_worst_of_its_block():
    expected = torch.ones(40, 256, dtype=torch.float64)
    got = expected.clone()
    got[7, 5] = 1.3  # 0.3 of the root mean square: between 2**-2 and 2**-1
    got[6, 4] = 1.001
    found = mapped(got, expected)
    assert (found["tokens"], found["columns"], found["token_step"], found["column_step"]) == (40, 256, 2, 4)
    assert len(found["map"]) == 20 and {len(row) for row in found["map"]} == {64}
    cells = {(y, x): digit for y, row in enumerate(found["map"]) for x, digit in enumerate(row) if digit != "0"}
    assert cells == {(3, 1): "6"} and found["unit"] == "rms"
    assert found["steps"][5] <= 0.3 < found["steps"][6]


@pytest.mark.parametrize(
    "off, digit",
    [(0.0, "0"), (3.99, "0"), (4.0, "1"), (7.99, "1"), (8.0, "2"), (511.9, "7"), (512.0, "8"), (1e30, "8"),
     (float("nan"), "9"), (float("inf"), "9")],
)  # fmt: skip
def test_digits_double_in_predicted_deviations(off, digit):
    expected, sigma = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64)
    assert mapped(expected + off * sigma, expected, sigma)["map"] == [digit]


def test_where_nothing_may_differ_any_difference_is_the_largest():
    expected = torch.zeros(1, 2, dtype=torch.float64)
    assert mapped(expected + torch.tensor([0, 1e-9]), expected, torch.zeros_like(expected))["map"] == ["08"]


def test_nan_where_it_belongs_is_no_error():
    nan = torch.full((1, 1), float("nan"), dtype=torch.float64)
    assert mapped(nan, nan)["map"] == ["0"] and mapped(torch.zeros_like(nan), nan)["map"] == ["9"]


def test_experts_are_listed_the_worst_first():
    experts = torch.tensor([[0, 1], [1, -1], [2, 0]])
    expected = torch.zeros(3, 4, dtype=torch.float64)
    got = expected.clone()
    got[1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    found = mapped(got, expected, torch.ones_like(expected), experts)
    # expert 1 serves tokens 0 and 1: the root of (9 + 16) / 8 is its error
    assert found["experts"] == [[1, 2, 1, 2, 1.77], [0, 2, 0, 0, 0.0], [2, 1, 0, 0, 0.0]]


def test_an_output_without_elements_has_no_map():
    assert mapped(torch.zeros(0, 64, dtype=torch.float64), torch.zeros(0, 64, dtype=torch.float64)) == {}


def test_the_largest_map_is_small():
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(1000, 7168, dtype=torch.float64)
    got = 1e3 * torch.randn(1000, 7168, dtype=torch.float64, generator=generator)
    experts = torch.randint(0, 256, (1000, 8), generator=generator)
    found = mapped(got, expected, torch.ones_like(expected), experts)
    assert len(json.dumps(found)) <= 4096 and len(found["map"]) == 32 and len(found["map"][0]) == 64
    assert len(found["experts"]) + found["experts_left_out"] == 256


def last_row_wrong(call, layer, x, w, ids, out):
    result = call(x, w, ids)
    result[-1] += 1000
    return result


@pytest.mark.parametrize("fill, unit", [("exact", "rms"), ("random", "sigma")])
def test_a_failed_verdict_has_its_map(fill, unit):
    found = run_case(Case.parse(str(CASE)).change(fill=fill), Wrapped(last_row_wrong), CPU).record()
    stored = json.loads(json.dumps(found))["error_map"]
    assert found["status"] == "failed" and stored["unit"] == unit
    assert [set(row) for row in stored["map"]] == [{"0"}] * 8 + [{"8"}]


@pytest.mark.parametrize("change", (lambda call, layer, x, w, ids, out: call(x, w, ids), lambda *_: 1 / 0))
def test_what_has_not_failed_by_its_values_has_none(change):
    assert run_case(CASE, Wrapped(change), CPU).error_map == {}
