"""diagnose/match.py: faults are distinguishable, and a backend's mistake is named, and nothing else."""

import re
from dataclasses import replace

import pytest
import torch

from harness.device import Device
from harness.diagnose import failure
from harness.diagnose.faults import FAULTS, Fault, fault, with_text
from harness.diagnose.faults.leftovers import LEFTOVERS, MOST_CALLS, leftover_text, leftovers
from harness.diagnose.match import CLOSEST, EQUAL, WHERE_WRONG, WITHIN, affordable, fault_id, match
from harness.inputs.draw import draw
from harness.oracle.stages import Oracle
from harness.problem.case import GRAMMAR, Case
from harness.run.case import run_case
from harness.session.session import Session
from reference.formats import fmt
from reference.plan import RoundingPlan
from tests.support.emulated import CONTROLS, Emulated

CPU = Device("cpu")
STORES = RoundingPlan(gate_up="io", act="io", slot="io")
W8A16 = replace(STORES, quantizes_activations=False)


@pytest.fixture(autouse=True)
def every_failure_is_diagnosed(monkeypatch):
    monkeypatch.setattr(failure, "DIAGNOSES", failure.Diagnoses(limit=10_000))


# -- the bank ---------------------------------------------------------------------------------------------------------
#: Cases that show the faults: tails of every tile, every scheme of scales, both places of the router weight.
SHOWN_BY = {
    "t33-h96-i40-e4-k2-bf16-bias-exact": "router weights, slots, biases",
    "t13-h504-i184-e2-k1-bf16-bias-exact": "tails of K and N by every tile, in both GEMMs",
    "t13-h184-i376-e2-k1-bf16-exact": "and with other ends of I",
    "t9-h72-i44-e2-k1-bf16-exact": "an output of GEMM 1 that ends within a tile of 16",
    "t254-h32-i16-e2-k1-bf16-exact-s1": "tails of the batch by every tile",
    "t30-h32-i16-e3-k1-bf16-exact": "and with fewer tokens than experts end on",
    "t12-h40-i24-e5-k3-fp32-ids64-padded-invalid-bias-random": "ids, strides, narrower formats",
    "t9-h72-i72-e3-k1-bf16-swigluoai-limit2-bias-win-random": "square weights, weighted input, clamps",
    "t9-h64-i48-e8-k2-bf16-swigluoai-ep2.1-bias-invalid-random": "expert maps",
    "t9-h64-i40-e8-k2-bf16-relu2-ep2.1s-duplicate-random": "no gate",
    "t9-h64-i32-e4-k2-bf16-gelu-shared1-random": "shared experts",
    "t9-h64-i32-e4-k2-bf16-gelu_tanh-limit2-random": "activations that are nearly alike",
    "t9-h64-i32-e4-k2-bf16-swigluoai-limit128-bias-exact": "a clamp that no smaller one replaces",
    "t9-h64-i32-e4-k2-fp32-swigluoai-random": "factors that are nearly alike",
    "t9-h272-i272-e2-k1-bf16-e4m3.block.group-random": "blocks and groups",
    "t9-h128-i64-e3-k2-bf16-e4m3.tensor.static-bias-random": "static scales",
    "t9-h64-i32-e3-k2-bf16-e4m3.tensor.static-bias-exact": "and where no scale is so small that nothing is left",
    "t9-h192-i136-e3-k2-bf16-e4m3.channel.tensor-bias-random": "a scale for the batch",
    "t9-h64-i32-e4-k1-fp16-e4m3.tensor.tensor-ep2.1-random": "and of a rank",
    "t9-h128-i64-e3-k1-bf16-e4m3.channel.token-win-bias-exact": "a scale for a token, from a weighted input",
}


def answers(text, plan):
    """The oracle, and the output of every fault that is possible here."""
    case = Case.parse(text)
    o = Oracle(draw(case), None if case.fill == "exact" else plan)
    found = {id_: f(o) for id_, f in FAULTS.items()}
    exact = case.fill == "exact"
    return o, {n: o.stored(a) if exact else a.stages.out for n, a in found.items() if a is not None}


def apart(o, outs):
    """[n, n] bool: whether two outputs differ; for random ones by more than half a step of the output's format."""
    flat = torch.stack([out.nan_to_num(1e9).flatten() for out in outs])
    if o.inputs.case.fill == "exact":
        return (flat[:, None, :32768] != flat[None, :, :32768]).any(2)
    power = o.right.stages.out.nan_to_num().norm()
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distance > 2.0 ** -fmt(o.problem.dtype).precision / 2 * power


def test_every_fault_can_be_told_from_every_other():
    names = list(FAULTS)
    place = {n: i for i, n in enumerate(names)}
    told_apart = torch.zeros(len(names), len(names), dtype=torch.bool)
    asked = [(text, STORES) for text in SHOWN_BY] + [("t9-h128-i64-e3-k2-bf16-e4m3.block.group-random", W8A16)]
    for text, plan in asked:
        o, outs = answers(text, plan)
        right = o.stored(o.right) if o.inputs.case.fill == "exact" else o.right.stages.out
        here = torch.tensor([place[n] for n in outs])
        differ = apart(o, [*outs.values(), right])
        seen = here[differ[:-1, -1]]
        # Two faults also differ where one of them can be made and the other cannot.
        others = torch.ones(len(seen), len(names), dtype=torch.bool)
        others[:, here] = differ[:-1, :-1][differ[:-1, -1]]
        told_apart[seen] |= others
    never = [n for i, n in enumerate(names) if not told_apart[i].any()]
    assert never == []
    told_apart.fill_diagonal_(True)
    assert [(names[i], names[j]) for i, j in torch.nonzero(~told_apart).tolist()] == []


def test_an_id_and_a_text_are_unique():
    with pytest.raises(ValueError, match="'router_weight.missing': the bank has one with that id"):
        fault("router_weight.missing", "another text")(lambda o: o.right)
    with pytest.raises(ValueError, match="the bank has one with the text 'router weight missing'"):
        fault("router_weight.gone", "router weight missing")(lambda o: o.right)


def test_every_id_is_of_dotted_lower_case_words_and_every_flag_a_field_of_a_descriptor():
    assert [f.id for f in FAULTS.values() if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", f.id)] == []
    assert {f.flag for f in FAULTS.values()} <= {"", *(rule.field for rule in GRAMMAR)}
    for wrong in ({"effect": "ignored"}, {"flag": "bias"}, {"effect": "halved", "flag": "bias"}):
        with pytest.raises(ValueError, match="fault 'a.b': flag="):
            Fault("a.b", "text", lambda o: None, **wrong)


def test_a_fault_is_looked_up_by_its_text_and_leftovers_of_earlier_calls_as_well():
    assert all(with_text(f.text) is f and fault_id(f.text) == f.id for f in FAULTS.values())
    assert fault_id("w13 of the previous call") == "leftover.w13.1"
    assert fault_id("all the layer's tensors of 3 calls ago") == "leftover.all_the_layers_tensors.3"
    assert fault_id("w13 of the next call") is None and with_text("w13 of the previous call") is None
    texts = [leftover_text(what, n) for what in LEFTOVERS for n in range(1, MOST_CALLS + 1)]
    assert len({*map(fault_id, texts)} | set(FAULTS)) == len(texts) + len(FAULTS)


@pytest.mark.parametrize(
    "text",
    [
        "t0-h64-i32-e4-k2-bf16-exact",
        "t1-h32-i8-e1-k1-bf16-exact",
        "t9-h64-i32-e4-k2-bf16-nobody-bias-exact",
        "t9-h64-i32-e4-k2-bf16-ep4.1-remote-random",
        "t14-h64-i32-e4-k2-bf16-extreme",
        "t14-h136-i72-e4-k1-fp16-e4m3.block.group-win-bias-extreme",
        "t9-h64-i32-e4-k2-bf16-e5m2.tensor.tensor-kn-invalid-shared2-random",
        "t9-h64-i32-e4-k1-fp32-win-shared1-bias-random",
        "t3-h64-i32-e16-k16-bf16-swigluoai-random",
    ],
)
@pytest.mark.parametrize("value", (float("nan"), 6e4))
def test_no_output_is_too_wrong_to_be_asked_about(text, value):
    case = Case.parse(text)
    session = Session(case, Emulated(), CPU)
    inputs = session.draw()
    judgement = session.judged(torch.full_like(inputs.hidden_states, value), inputs)
    found = match(judgement, inputs, [STORES], [(inputs, torch.zeros(3, case.problem.hidden_size).double())])
    assert found is None or (found.faults and str(found))


def test_layers_that_are_too_large_are_not_asked_about():
    small = draw(Case.parse("t16-h64-i32-e4-k2-bf16-random"))
    assert affordable(small)
    for change in ({"num_experts": 5000}, {"tokens": 300_000}):
        case = small.case.change(**change)
        assert not affordable(replace(small, case=case))


# -- backends that make a mistake -------------------------------------------------------------------------------------
class Mistaken(Emulated):
    """A correct backend whose run(layer, x, weights, ids) is given something else."""

    def __init__(self, mistake):
        super().__init__("mistaken", gate_up="io", slot="io")
        self.mistake = mistake

    def run(self, layer, hidden_states, topk_weights, topk_ids, out=None):
        return self.mistake(super().run, layer, hidden_states, topk_weights, topk_ids)


def of(layer, **changes):
    return replace(layer, **changes)


def swapped(t):
    return torch.cat(t.chunk(2, 1)[::-1], 1)


MISTAKES = {
    "router weight applied twice": lambda run, own, x, w, i: run(own, x, w * w, i),
    "router weight missing": lambda run, own, x, w, i: run(own, x, torch.ones_like(w), i),
    "router weight of the first slot for every slot": lambda run, own, x, w, i: run(own, x, w[:, :1].expand_as(w), i),
    "last slot dropped": lambda run, own, x, w, i: run(
        own, x, w, torch.cat([i[:, :-1], -torch.ones_like(i[:, :1])], 1)
    ),
    "the next expert's weights": lambda run, own, x, w, i: run(own, x, w, torch.where(i >= 0, (i + 1) % 4, i)),
    "gate and up swapped": lambda run, own, x, w, i: run(
        of(own, w13=swapped(own.w13), w13_bias=swapped(own.w13_bias)), x, w, i
    ),
    "w2 of the next expert": lambda run, own, x, w, i: run(of(own, w2=own.w2.roll(-1, 0)), x, w, i),
    "the last 32 of K dropped in GEMM 1": lambda run, own, x, w, i: run(
        own, torch.where(torch.arange(96) < 64, x, 0), w, i
    ),
    "w13_bias missing": lambda run, own, x, w, i: run(of(own, w13_bias=torch.zeros_like(own.w13_bias)), x, w, i),
    "w2_bias added twice": lambda run, own, x, w, i: run(of(own, w2_bias=2 * own.w2_bias), x, w, i),
    "hidden_states of the previous token": lambda run, own, x, w, i: run(own, x.roll(1, 0), w, i),
    "an output of zeros": lambda run, own, x, w, i: torch.zeros_like(x),
}


@pytest.mark.parametrize("fill", ("exact", "random"))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_backend_that_makes_a_mistake_is_told_which(mistake, fill):
    case = Case.parse(f"t24-h96-i40-e4-k3-bf16-bias-{fill}")
    found = run_case(case, Mistaken(MISTAKES[mistake]), CPU)
    assert (found.status, found.cause) == ("failed", mistake), found.report
    how = EQUAL if fill == "exact" else WITHIN
    # Not every mistake leaves an exact fill exact: then its judgement decides as well.
    assert found.reason.endswith((f"{how}: {mistake}", f"{WITHIN}: {mistake}"))
    assert f"cause         {how}" in found.report or f"cause         {WITHIN}" in found.report


def scaled(name, change):
    return lambda run, own, x, w, i: run(of(own, **{name: change(getattr(own, name))}), x, w, i)


@pytest.mark.parametrize(
    "text, mistake, made",
    [
        ("e4m3.block.group", "w13_scale of the next block of K", scaled("w13_scale", lambda s: s.roll(-1, 2))),
        (
            "e4m3.block.none",
            "w2_scale of the first block for all blocks",
            scaled("w2_scale", lambda s: 0 * s + s[:, :1, :1]),
        ),
        ("e4m3.channel.token", "w13_scale of expert 0 for every expert", scaled("w13_scale", lambda s: s[:1] + 0 * s)),
        ("e4m3.tensor.static", "w2_scale missing", scaled("w2_scale", torch.ones_like)),
    ],
)
@pytest.mark.parametrize("fill", ("exact", "random"))
def test_a_wrong_scale_is_told_from_another(text, mistake, made, fill):
    found = run_case(Case.parse(f"t16-h264-i136-e3-k2-bf16-{text}-{fill}"), Mistaken(made), CPU)
    assert (found.status, found.cause) == ("failed", mistake), found.report


def test_a_mistake_that_is_made_for_some_tokens_only():
    def first_five(run, own, x, w, i):
        return torch.cat([run(own, x, w * w, i)[:5], run(own, x, w, i)[5:]])

    for fill, said in (("exact", WHERE_WRONG), ("random", "within rounding, in 5 of 24 rows, of")):
        found = run_case(Case.parse(f"t24-h96-i40-e4-k3-bf16-bias-{fill}"), Mistaken(first_five), CPU)
        assert found.cause == "router weight applied twice" and f"{said}: " in found.reason, found.report


def test_what_a_mistake_cannot_be_told_from_is_listed():
    case = Case.parse("t24-h96-i40-e4-k2-bf16-exact")
    found = run_case(case, Mistaken(MISTAKES["last slot dropped"]), CPU)
    assert found.cause == "last slot dropped" and "\n                or first slot only\n" in found.report


def test_a_hint_is_no_name():
    def nearly(run, own, x, w, i):
        return run(own, x, w * w, i) * 1.05

    found = run_case(Case.parse("t24-h96-i40-e4-k3-bf16-random"), Mistaken(nearly), CPU)
    hint = f"hint          {CLOSEST}: router weight applied twice, which explains 9"
    assert found.cause == "" and hint in found.report
    assert CLOSEST not in found.reason


# -- what a session knows ---------------------------------------------------------------------------------------------
class Keeps(Emulated):
    """A backend that keeps something of its first call."""

    def __init__(self, keeps):
        super().__init__("keeps", gate_up="io", slot="io")
        self.keeps = keeps

    def prepare(self, problem, layer):
        first = {}

        def call(x, w, i, out=None):
            if not first:
                first.update(layer={n: t.clone() for n, t in layer.tensors().items()}, out=self.run(layer, x, w, i))
            return self.keeps(self.run, first, layer, x, w, i)

        return call


@pytest.mark.parametrize(
    "scenario, keeps, cause",
    [
        (
            "swap.copy_",
            lambda run, f, own, x, w, i: run(of(own, **f["layer"]), x, w, i),
            "all the layer's tensors",
        ),
        ("swap.copy_", lambda run, f, own, x, w, i: run(of(own, w2=f["layer"]["w2"]), x, w, i), "w2"),
        (
            "swap.bias",
            lambda run, f, own, x, w, i: run(of(own, w13_bias=f["layer"]["w13_bias"]), x, w, i),
            "w13_bias",
        ),
        ("batch.routings", lambda run, f, own, x, w, i: f["out"], "the output"),
    ],
)
def test_what_is_left_of_the_call_before_is_recognized(scenario, keeps, cause):
    found = run_case(Case.parse(f"t24-h96-i40-e4-k2-bf16-bias-exact-{scenario}"), Keeps(keeps), CPU)
    assert (found.status, found.cause) == ("failed", f"{cause} of the previous call"), found.report


def test_rows_that_a_larger_batch_left_behind_are_recognized():
    inputs = draw(Case.parse("t24-h96-i40-e4-k2-bf16-exact"))
    shorter = draw(Case.parse("t16-h96-i40-e4-k2-bf16-exact"))
    left = torch.randn(24, 96).bfloat16().double()
    got = Oracle(shorter).right.stages.out.clone()
    got[12:] = left[12:16]
    session = Session(shorter.case, Emulated(), CPU)
    found = match(session.judged(got.float(), shorter), shorter, [STORES], [(inputs, left)])
    assert found is not None and (found.how, found.cause) == (WHERE_WRONG, "the output of the previous call")


def test_a_session_lets_go_of_what_it_handed_out():
    case = Case.parse("t9-h64-i32-e4-k2-bf16-random-swap.released")
    assert run_case(case, Emulated(), CPU).status == "passed"
    session = Session(case, Emulated(), CPU)
    inputs = session.draw()
    for _ in range(5):
        session.check(session.prepare(case.problem, inputs.backend_layer), inputs)
    assert len(session.past) == MOST_CALLS
    assert all(past.backend_layer is past.layer for past, _ in session.past)
    assert {f.text: f.calls_ago for f in leftovers(session.past).values()}["ids of 2 calls ago"] == 2
    assert set(leftovers(session.past)) >= {"leftover.w13.1", "leftover.ids.2"}


# -- right backends, and noise ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c.name)
def test_right_variants_are_given_no_cause(control):
    for text in ("t24-h96-i40-e4-k2-bf16-bias-random", "t9-h128-i64-e4-k2-bf16-e4m3.block.group-exact"):
        found = run_case(Case.parse(text), control, CPU)
        assert (found.status, found.cause, found.stage) == ("passed", "", "")


@pytest.mark.parametrize("text", ("t24-h96-i40-e4-k2-bf16-bias-random", "t24-h96-i40-e4-k2-bf16-bias-exact"))
def test_noise_has_no_name(text):
    def noisy(run, own, x, w, i):
        out, rng = run(own, x, w, i), torch.Generator().manual_seed(3)
        return out + 0.3 * out.float().std() * torch.randn(out.shape, generator=rng).to(out)

    found = run_case(Case.parse(text), Mistaken(noisy), CPU)
    assert (found.status, found.cause) == ("failed", "") and "cause  " not in found.report


def test_where_everything_is_red_the_first_few_are_diagnosed(monkeypatch):
    monkeypatch.setattr(failure, "DIAGNOSES", failure.Diagnoses(limit=1))
    zeros = Mistaken(MISTAKES["an output of zeros"])
    case = Case.parse("t9-h64-i32-e4-k2-bf16-random")
    assert [run_case(case, zeros, CPU).cause for _ in range(2)] == ["an output of zeros", ""]


def test_the_bank_is_one():
    assert len(FAULTS) > 300
