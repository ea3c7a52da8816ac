"""The descriptor is the Case, and the Case the descriptor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.problem.case import (
    ACTIVATIONS,
    DTYPES,
    FILLS,
    ROUTINGS,
    Case,
    DescriptorError,
    ExpertParallel,
    Problem,
    Quant,
)
from harness.problem.families import expand, families, rows, sweep, untimed
from harness.scenarios import scenarios


@st.composite
def cases(draw) -> Case:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    experts = draw(st.integers(1, 300))
    top_k = draw(st.integers(1, experts))
    dtype = pick(*DTYPES)
    activation = pick(*ACTIVATIONS)
    size = pick(*[n for n in range(1, experts + 1) if experts % n == 0])
    ep = pick(None, ExpertParallel(size, draw(st.integers(0, size - 1)), draw(st.booleans())))
    weight, act = pick("tensor", "channel", "block"), pick(None, "tensor_static", "tensor", "token", "group")
    problem = Problem(
        draw(st.integers(0, 5000)), draw(st.integers(1, 9000)), draw(st.integers(1, 9000)), experts, top_k, dtype,
        quant=pick(None, Quant(pick("e4m3", "e5m2"), weight, act)) if dtype != "fp32" else None,
        activation=activation, limit=None if activation == "relu2" else pick(None, 7.0, 2.5, 128.0),
        bias=draw(st.booleans()), router_weight_on_input=top_k == 1 and draw(st.booleans()), layout=pick("nk", "kn"),
        ep=ep, shared_experts=draw(st.integers(0, 2)), ids=pick(32, 64), padded=draw(st.booleans()),
        routing=pick(*[r for r in ROUTINGS if r != "remote" or (ep and ep.size > 1)]),
    )  # fmt: skip
    return Case(problem, pick(*FILLS), draw(st.integers(0, 99)), pick("once", "swap.copy_", "scratch.reuse"))


@given(cases())
@settings(max_examples=400, deadline=None)
def test_a_descriptor_parses_back_to_the_same_case(case):
    assert Case.parse(str(case)) == case
    assert hash(Case.parse(str(case))) == hash(case)


@pytest.mark.parametrize(
    "text, message",
    [
        ("t16-h256", "missing i16, e16, k16, bf16|fp16|fp32"),
        ("t16-h256-i128-e8-k2-bf16-fp8", "no field is written 'fp8'"),
        ("t16-t8-h256-i128-e8-k2-bf16", "gives tokens a second time"),
        ("t16-h256-i128-e8-k9-bf16", "top_k=9: at most num_experts=8"),
        ("t16-h256-i128-e8-k2-bf16-win", "top_k=1 only"),
        ("t16-h256-i128-e8-k2-bf16-ep3.0", "size must divide num_experts=8"),
        ("t16-h256-i128-e8-k2-bf16-remote", "remote needs ep"),
        ("t16-h256-i128-e8-k2-fp32-e4m3.block.group", "quantized weights go with bf16 or fp16"),
        ("t16-h256-i128-e8-k2-bf16-relu2-limit7", "no gate to clamp"),
        ("t16-h0-i128-e8-k2-bf16", "hidden_size=0: must be 1 or more"),
        ("t16-h256-i128-e8-k2-bf17", "no field is written 'bf17'; did you mean 'bf16'[?]; tokens look like: t16, "),
        ("t16-h256-i128-e8-k2-bf16-skewd", "no field is written 'skewd'; did you mean 'skewed'[?]"),
        ("t16-h256-i128-e8-k2-bf16-e4m3.block.grp", "quant=e4m3.block.grp: .*; did you mean 'e4m3.block.group'[?]"),
        ("t１６-h256-i128-e8-k2-bf16", "no field is written 't１６'"),
        ("t2147483648-h256-i128-e8-k2-bf16", "tokens=2147483648: must be 0 or more, at most 2147483647"),
        ("t16-h256-i128-e8-k2-bf16-s281474976710657", "seed=281474976710657: must be 0 or more, at most 2814"),
        ("t16-h256-i128-e8-k2-bf16-limit1.2345678", "limit=1.2345678: must be positive, below 100000 and of at most 6"),
        ("t" + "9" * 300 + "-h256-i128-e8-k2-bf16", "tokens='9{80}'... .300 characters.: must be 0 or more"),
        ("-" * 10**6, ".1000000 characters.: a descriptor has at most 400 characters"),
    ],
)
def test_a_wrong_descriptor_names_the_token_and_what_is_valid(text, message):
    with pytest.raises(DescriptorError, match=message.replace("|", r"\|")):
        Case.parse(text)


def test_a_row_without_a_fill_asks_both_and_a_scenario_one():
    assert [c.fill for c in expand("t1-h64-i64-e4-k2-bf16")] == ["exact", "random"]
    assert [c.fill for c in expand("t1-h64-i64-e4-k2-bf16-swap.copy_")] == ["exact"]
    assert [c.fill for c in expand("t1-h64-i64-e4-k2-bf16-swigluoai")] == ["random"]
    assert [c.fill for c in expand("t1-h64-i64-e4-k2-bf16-extreme")] == ["extreme"]


def test_a_sweep_drops_empty_tokens():
    assert list(sweep("t{t}-h64-{o}", "why", t=(1, 2), o=("", "bias"))) == [
        "t1-h64",
        "t1-h64-bias",
        "t2-h64",
        "t2-h64-bias",
    ]


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("module", families(), ids=lambda m: m.FAMILY)
def test_every_row_parses_has_a_reason_and_is_asked_once(module, device):
    asked = rows(module, device == "cpu")
    assert len({r.case for r in asked}) == len(asked) > (9 if module in untimed() else 0)
    assert all(r.why for r in asked)
    assert {r.case.scenario for r in asked} <= set(scenarios())


def test_every_scenario_is_asked_somewhere():
    asked = {r.case.scenario for m in families() for d in ("cpu", "cuda") for r in rows(m, d == "cpu")}
    assert set(scenarios()) - asked == set()
