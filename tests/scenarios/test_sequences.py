"""scenarios/stateful/sequences.py: mistakes that need a sequence of calls are found, shrunk, and listed as steps."""

import re
import subprocess
import sys

import pytest
import torch

from harness.base.minimal import find_minimal, missing, pick
from harness.base.processes import ROOT
from harness.device import Device
from harness.diagnose import failure
from harness.problem.case import Case
from harness.run.case import run_case
from harness.scenarios.stateful import sequences, state, steps
from harness.session import session as session_module
from harness.session.session import Session
from tests.support import stateful
from tests.support.emulated import Emulated

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

CPU = Device("cpu")
LAYER = "t5-h64-i32-e4-k2-bf16"
STEP = re.compile(r"^ +\d+  (.*)$", re.M)


def verdict(backend, layer=f"{LAYER}-exact", seed=0):
    return run_case(Case.parse(f"{layer}-sequence.calls").change(seed=seed), backend, CPU)


def steps_of(found):
    return STEP.findall(found.report.partition("its last step failed\n")[2].partition("\n\n")[0])


# -- mistakes it finds ------------------------------------------------------------------------------------------------
def test_a_stale_instance_is_found_and_shrunk_to_a_call_a_swap_and_a_call():
    found = verdict(stateful.Stale(), seed=1)
    call, swap, last = steps_of(found)
    assert found.status == "failed" and found.reason.startswith("after 3 steps: not bit-exact, ")
    assert ": call with " in call and ": call with " in last
    assert re.search("alone changes|all weights become|the activation becomes", swap)
    assert "  experts  " in found.report  # the failed call is explained as any other


@pytest.mark.parametrize("wrong", [w for w in stateful.WRONG if w is not stateful.Stale], ids=lambda w: w.__name__)
def test_a_mistake_of_a_later_call_is_found_and_shrunk(wrong):
    fill = "random" if wrong is stateful.OldConfiguration else "exact"
    tried = (verdict(wrong(), f"{LAYER}-{fill}", seed) for seed in range(6))
    found = next(v for v in tried if not v.green)
    words = found.report if found.status == "failed" else found.reason
    assert re.search(r"after \d+ steps?: ", words) and 1 <= len(steps_of(found)) <= 4, found.report


class Raises(Emulated):
    """Raises at the first batch of no tokens."""

    def run(self, layer, x, weights, ids, out=None):
        if not len(x):
            raise RuntimeError("nothing to do")
        return super().run(layer, x, weights, ids, out)


def test_an_exception_is_a_crash_that_lists_its_steps():
    found = next(v for v in (verdict(Raises("raises"), seed=s) for s in range(6)) if not v.green)
    assert found.status == "crashed" and found.reason == "Crashed: after 1 step: RuntimeError: nothing to do"
    assert steps_of(found) == ["layer 0: call with 0 tokens, uniform routing, int32 ids"]
    assert 'raise RuntimeError("nothing to do")' in found.report


class Sometimes(Emulated):
    """Wrong in the fifth call of its life, and never again."""

    calls = 0

    def run(self, layer, x, weights, ids, out=None):
        self.calls += 1
        result = super().run(layer, x, weights, ids, out)
        return result + 32 if self.calls == 5 else result


def test_a_failure_that_does_not_happen_again_is_reported_as_such():
    found = verdict(Sometimes("sometimes"), f"{LAYER}-random")
    assert found.status == "failed"
    assert found.reason.startswith("a sequence that failed, and was right when it was played again: after ")


# -- steps it does not draw -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "layer",
    [
        f"{LAYER}-exact", f"{LAYER}-kn-bias-ep2.1-exact", "t3-h64-i32-e16-k2-fp32-gelu-random",
        "t5-h136-i72-e4-k2-bf16-e4m3.block.group-exact", "t5-h64-i32-e4-k2-fp16-e4m3.tensor.static-exact",
        "t5-h64-i32-e4-k2-bf16-e5m2.channel.token-bias-kn-exact", "t5-h64-i32-e4-k1-bf16-e4m3.block.none-win-exact",
        "t5-h64-i32-e4-k2-bf16-swigluoai-limit128-bias-exact", "t5-h64-i32-e4-k2-bf16-relu2-exact",
        "t5-h64-i32-e4-k2-bf16-e4m3.tensor.tensor-limit128-exact", "t5-h64-i32-e4-k2-bf16-shared1-bias-exact",
        "t5-h64-i32-e4-k3-bf16-e4m3.channel.static-limit7-random", "t20-h64-i32-e4-k2-bf16-padded-ids64-exact",
    ],
)  # fmt: skip
def test_a_right_backend_is_not_accused(layer):
    for seed in (0, 1):
        found = verdict(Emulated("emulated"), layer, seed)
        assert found.status == "passed" and found.calls > sequences.EXAMPLES, found.report


class Expecting(Emulated):
    """Looks for invalid ids only where the problem that it was prepared for has them."""

    def run(self, layer, x, weights, ids, out=None):
        return super().run(layer, x, weights, ids if layer.problem.invalid_ids else ids.abs(), out)


def test_the_prepared_problem_says_that_ids_may_be_invalid():
    found = [verdict(Expecting("expecting"), f"{LAYER}-exact", seed) for seed in range(4)]
    assert [v.status for v in found] == ["passed"] * 4, found[0].report


class Modest(Emulated):
    """Follows nothing, promises nothing, and takes neither invalid ids nor the other layout."""

    follows = frozenset()

    def supports(self, problem):
        if problem.invalid_ids:
            return "invalid_ids: none"
        return "layout: nk only" if problem.layout == "kn" else None


def test_steps_that_a_backend_excludes_are_not_drawn():
    s = Session(Case.parse(f"{LAYER}-exact-sequence.calls"), Modest("modest"), CPU)
    found = sequences.options(s)
    assert not {"invalid", "nobody", "remote"} & set(found["routing"])
    assert found["layout"] == ["same"]
    for field in ("swap", "by", "setting", "activation", "fault", "scratch"):
        assert found[field] == [], field
    drawn = set()

    def ask(sequence):
        drawn.update(type(step) for step in sequence)

    find_minimal(sequences.steps(s), ask, seed=0, examples=30, shrinks=0)
    assert drawn == {steps.Call, steps.Prepare, steps.NaN}


def test_every_change_is_drawn_for_a_backend_that_follows_all():
    from kernels.grouped import GroupedMM

    s = Session(Case.parse(f"{LAYER}-bias-ep2.1-exact-sequence.calls"), GroupedMM(), CPU)
    found = sequences.options(s)
    assert set(found["swap"]) == set(sequences.SWAPS) and {"other", "same"} == set(found["layout"])
    assert {name for name, _ in found["setting"]} == {"dtype", "num_experts", "top_k", "activation", "layout"}
    assert set(found["part"]) == {"w2", "w13_bias", "w2_bias", "expert_map"}
    assert {"hidden_size", "bias_shape", "expert_map_length"} <= set(found["fault"])
    assert "scale_missing" not in found["fault"] and 0 in found["tokens"] and 1 in found["tokens"]


def test_each_output_is_judged_once_and_only_the_shortest_sequence_is_explained(monkeypatch):
    judged, explained = [], []
    judge, explain = session_module.judge_exact, failure.failure
    monkeypatch.setattr(session_module, "judge_exact", lambda *a: judged.append(1) or judge(*a))
    monkeypatch.setattr(failure, "failure", lambda *a, **k: explained.append(1) or explain(*a, **k))
    calls = []

    class Counts(stateful.LeftOver):
        def run(self, layer, x, weights, ids, out=None):
            calls.append(len(x))
            return super().run(layer, x, weights, ids, out)

    assert verdict(Counts()).status == "failed"
    assert len(explained) == 1 < len(judged) <= len(calls)


# -- seeds ------------------------------------------------------------------------------------------------------------
def examples(seed):
    seen = []
    find_minimal(pick(range(50)), seen.append, seed=seed, examples=25, shrinks=0)
    return seen


def test_a_seed_draws_the_same_examples_in_any_process():
    text = (
        "from harness.base.minimal import find_minimal, pick\nseen = []\n"
        "find_minimal(pick(range(50)), seen.append, seed=7, examples=25, shrinks=0)\nprint(seen)"
    )
    command = [sys.executable, "-c", text]
    alone = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert str(examples(7)) == alone.strip()
    assert len(examples(7)) > 20 and examples(7) != examples(8)


def test_the_case_s_seed_is_the_sequences_seed():
    reports = {seed: verdict(stateful.LeftOver(), seed=seed).report for seed in (0, 1)}
    assert reports[0] == verdict(stateful.LeftOver(), seed=0).report and reports[0] != reports[1]


def test_without_hypothesis_it_is_unsupported(monkeypatch):
    monkeypatch.setattr("harness.base.minimal.find_spec", lambda name: None)
    found = verdict(Emulated("emulated"))
    assert found.status == "unsupported"
    assert found.reason == "package: the package hypothesis is not installed (pip install hypothesis)"


# -- the search -------------------------------------------------------------------------------------------------------
def test_an_exception_of_the_question_ends_the_search():
    def ask(example):
        raise LookupError("over")

    with pytest.raises(LookupError, match="over"):
        find_minimal(pick(range(50)), ask, seed=0, examples=25, shrinks=10)


def test_an_example_is_asked_once_and_shrinking_has_a_budget():
    asked = []

    def ask(example):
        asked.append(example)
        return "too large" if example >= 300 else None

    smallest, answer = find_minimal(pick(range(1000)), ask, seed=0, examples=100, shrinks=200)
    assert (smallest, answer) == (300, "too large") and len(asked) == len(set(asked))
    asked.clear()
    found, _ = find_minimal(pick(range(1000)), ask, seed=0, examples=100, shrinks=0)
    assert found >= 300 and sum(n >= 300 for n in asked) == 1


def test_parts_change_as_the_fill_allows():
    problem = Case.parse(f"{LAYER}-e4m3.block.none-bias-exact").problem
    assert not state.stays_exact("w2_scale", problem) and state.stays_exact("w2", problem)
    assert torch.equal(state.PARTS["w2"](torch.tensor([1.0, -2.0]), problem), torch.tensor([-1.0, 2.0]))
