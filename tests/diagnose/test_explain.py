"""A failure names its pattern: what a kernel author reads first."""

import pytest
import torch

from harness.device import Device
from harness.problem.case import Case
from harness.run.case import run_case
from tests.session.test_session import Wrapped

CASE = Case.parse("t40-h256-i64-e4-k1-bf16-exact")


def report(spoil, case=CASE):
    def change(call, layer, x, w, ids, out):
        result = call(x, w, ids)
        spoil(result, ids)
        return result

    found = run_case(case, Wrapped(change), Device("cpu"))
    assert found.status == "failed"
    return found.reason, found.report


def last_rows(ids):
    return torch.stack([of_expert(ids, e)[-1] for e in ids.unique()])


def of_expert(ids, e):
    return torch.nonzero((ids == e).any(1)).flatten()


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda out, ids: out.zero_(), "every wrong output is zero"),
        (lambda out, ids: out.mul_(2), "2 times the expected"),
        (lambda out, ids: out[32:].add_(64), "all tokens from 32 on: a tail of the batch"),
        (lambda out, ids: out.index_fill_(0, of_expert(ids, 2), 0.5), "all tokens of expert 2, and only they"),
        (lambda out, ids: out.index_fill_(0, last_rows(ids), 0.5), "the last row of every expert: a tail mask"),
        (lambda out, ids: out[:, 192:].add_(640), "all columns from 192 on: a tail of N"),
        (lambda out, ids: out[:, 64:128].add_(640), "whole column tiles of 64: columns 64 to 127"),
        (lambda out, ids: out[3].fill_(float("nan")), "never written"),
    ],
)
def test_the_pattern_is_named(spoil, said):
    reason, text = report(spoil)
    assert said in text, text


def test_the_report_says_where_and_how_much():
    _, text = report(lambda out, ids: out[7, 5].add_(640))
    assert "wrong         1 of 10240" in text
    assert "tokens        7\n" in text and "columns       5\n" in text
    worst = text.splitlines()[-1].split()
    assert worst[:2] == ["7", "5"]


def test_a_coherent_error_without_a_single_wrong_element_is_explained():
    def half_percent(out, ids):
        out.mul_(1.005)

    reason, text = report(half_percent, Case.parse("t200-h64-i64-e4-k1-fp16-random"))
    assert "rms" in text
