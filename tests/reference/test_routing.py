"""reference.routing against a brute force in plain Python, and its judge on correct and wrong float32 kernels."""

import math

import pytest
import torch

from reference.routing import judge_routing, route, weights_of

#: Arguments of route() for every method, with 32 experts.
BIAS = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).float().double() * 0.1
CASES = {
    "softmax_topk": dict(top_k=4, method="softmax_topk"),
    "softmax_topk_renormalized": dict(top_k=4, method="softmax_topk", renormalize=True),
    "topk_softmax": dict(top_k=2, method="topk_softmax"),
    "sigmoid_top1": dict(top_k=1, method="sigmoid"),
    "sigmoid_renormalized": dict(top_k=4, method="sigmoid", renormalize=True),
    "deepseek_v3": dict(
        top_k=4,
        method="grouped",
        correction_bias=BIAS,
        num_groups=8,
        topk_groups=4,
        renormalize=True,
        routed_scaling_factor=2.5,
    ),  # fmt: skip
    "deepseek_v2": dict(top_k=3, method="grouped", scoring="softmax", num_groups=4, topk_groups=2),
    "biased_without_groups": dict(top_k=4, method="grouped", correction_bias=BIAS, renormalize=True),
    "all_experts": dict(top_k=32, method="softmax_topk"),
}
ALL_CASES = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)


def random_logits(tokens=64, experts=32, seed=0, scale=2.0):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * scale


def brute_force(row, top_k, method, renormalize=None, correction_bias=None, num_groups=1, topk_groups=1,
                routed_scaling_factor=1.0, scoring="sigmoid"):  # fmt: skip
    """Route one token in plain Python floats; return [(id, weight), ...], best first."""
    row = [-math.inf if math.isnan(v) else v for v in row]
    experts = range(len(row))
    if method == "topk_softmax":
        ids = sorted(experts, key=lambda e: (-row[e], e))[:top_k]
        terms = [math.exp(row[e] - row[ids[0]]) for e in ids]
        return [(e, routed_scaling_factor * term / math.fsum(terms)) for e, term in zip(ids, terms)]
    if method == "softmax_topk" or (method == "grouped" and scoring == "softmax"):
        top = max(row)
        scores = [math.exp(v - top) for v in row]
        scores = [s / math.fsum(scores) for s in scores]
    else:
        scores = [1 / (1 + math.exp(-v)) for v in row]
    biased = [s + (0 if correction_bias is None else float(correction_bias[e])) for e, s in enumerate(scores)]
    size = len(row) // num_groups

    def group_score(g):
        members = sorted((biased[e] for e in experts if e // size == g), reverse=True)
        return members[0] if correction_bias is None else sum(members[:2])

    groups = sorted(range(num_groups), key=lambda g: (-group_score(g), g))[:topk_groups]
    ids = sorted((e for e in experts if e // size in groups), key=lambda e: (-biased[e], e))[:top_k]
    total = sum(scores[e] for e in ids) + (1e-20 if method == "grouped" else 0) if renormalize else 1.0
    return [(e, routed_scaling_factor * scores[e] / total) for e in ids]


@ALL_CASES
def test_against_brute_force(arguments):
    logits = random_logits().double()
    logits[2] -= 60.0  # sigmoids small enough for the 1e-20 to matter
    logits[3, 5] = math.nan
    logits[4, :20] = -math.inf
    logits[5, 7] = 80.0
    routing = route(logits, **arguments)
    for t, row in enumerate(logits.tolist()):
        expected = brute_force(row, **arguments)
        assert routing.topk_ids[t].tolist() == [e for e, _ in expected]
        assert routing.topk_weights[t].tolist() == pytest.approx([w for _, w in expected], rel=1e-13, abs=1e-300)
    assert routing.topk_ids.dtype == torch.int64 and routing.topk_weights.dtype == torch.float64
    assert not routing.near_tie[6:].any()
    assert judge_routing(routing, routing.topk_weights, routing.topk_ids) == []


def kernel(logits, top_k, method, renormalize=None, correction_bias=None, num_groups=1, topk_groups=1,
           routed_scaling_factor=1.0, scoring="sigmoid", by_tanh=False, reverse_ties=False):  # fmt: skip
    """Route logits in plain float32; reverse_ties prefers the larger id among equal scores."""
    logits = logits.float()
    if reverse_ties:  # route the experts in reverse order and map their ids back
        bias = None if correction_bias is None else correction_bias.flip(0)
        weights, ids = kernel(logits.flip(1), top_k, method, renormalize, bias, num_groups, topk_groups,
                              routed_scaling_factor, scoring, by_tanh)  # fmt: skip
        return weights, logits.shape[1] - 1 - ids
    if method == "topk_softmax":
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return torch.softmax(values[:, :top_k], -1) * routed_scaling_factor, ids[:, :top_k]
    if method == "softmax_topk" or (method == "grouped" and scoring == "softmax"):
        scores = torch.softmax(logits, -1)
    else:
        scores = 0.5 * torch.tanh(0.5 * logits) + 0.5 if by_tanh else torch.sigmoid(logits)
    biased = scores if correction_bias is None else scores + correction_bias.float()
    groups = biased.unflatten(-1, (num_groups, -1))
    group_scores = groups.amax(-1) if correction_bias is None else groups.topk(2, -1).values.sum(-1)
    best = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
    kept = torch.zeros_like(group_scores).scatter(1, best, 1.0).bool()
    masked = torch.where(kept[..., None], groups, -math.inf).flatten(1)
    ids = masked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if method == "grouped" else 0))
    return weights * routed_scaling_factor, ids


LOGITS = {
    "float32": random_logits(900, seed=1),
    "bfloat16_with_many_ties": random_logits(900, seed=2).bfloat16(),
    "coarse": random_logits(900, seed=3).round(),
    "equal_but_for_the_last_bits": 1.0 + random_logits(900, seed=4) * 2.0**-22,
    "wide": random_logits(900, seed=5, scale=40.0),
    "saturated": 15.0 + random_logits(900, seed=6),
    "all_sigmoids_tiny": -12.0 + random_logits(900, seed=7),
    "all_equal": torch.zeros(50, 32),
}


@pytest.mark.parametrize("name", LOGITS)
@ALL_CASES
def test_correct_kernels_are_accepted(arguments, name):
    logits = LOGITS[name]
    expected = route(logits.double(), **arguments)
    for variant in (dict(), dict(by_tanh=True), dict(reverse_ties=True)):
        weights, ids = kernel(logits, **arguments, **variant)
        assert judge_routing(expected, weights, ids.int()) == []
        assert judge_routing(expected, weights.bfloat16(), ids) == []
        differs = (ids.sort(1).values != expected.topk_ids.sort(1).values).any(1)
        assert not (differs & ~expected.near_tie).any()
        shuffled = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))
        assert judge_routing(expected, weights[:, shuffled], ids[:, shuffled]) == []


def test_a_tie_at_the_cut_admits_exactly_the_tied_experts():
    logits = torch.tensor([[5.0, 1.0, 1.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    expected = route(logits, 2, "topk_softmax")
    assert expected.topk_ids.tolist() == [[0, 1]] and expected.near_tie.all()
    for other, right in {1: True, 2: True, 3: True, 4: False, 5: False}.items():
        ids = torch.tensor([[0, other]])
        assert (judge_routing(expected, weights_of(expected, ids)[0], ids) == []) is right
    ids = torch.tensor([[1, 2]])  # both tied, but the best expert is missing
    assert judge_routing(expected, weights_of(expected, ids)[0], ids) != []


def test_tied_groups_admit_whole_groups_only():
    # Groups {0, 1}, {2, 3}, {4, 5}: the first is best, the other two tie by their maximum.
    logits = torch.tensor([[3.0, 2.0, 1.0, -1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = route(logits, 4, "grouped", num_groups=3, topk_groups=2)
    assert expected.topk_ids.tolist() == [[0, 1, 2, 3]] and expected.near_tie.all()
    for ids, right in (([0, 1, 2, 3], True), ([5, 4, 1, 0], True), ([0, 1, 2, 4], False), ([0, 1, 3, 5], False)):
        ids = torch.tensor([ids])
        assert (judge_routing(expected, weights_of(expected, ids)[0], ids) == []) is right


def test_a_near_tie_is_a_gap_within_the_rounding_of_the_logits_format():
    logits = torch.tensor([[2.0, 1.0, 1.0 - 2.0**-16, 0.0]], dtype=torch.float64)
    assert not route(logits, 2, "softmax_topk").near_tie.any()
    assert route(logits, 2, "softmax_topk", logits_format="bf16").near_tie.all()
    logits[0, 2] = 1.0 - 2.0**-23
    assert route(logits, 2, "softmax_topk").near_tie.all()
    assert not route(logits, 1, "softmax_topk").near_tie.any()  # the tie is not at the cut
    assert not route(logits, 3, "softmax_topk").near_tie.any()


@ALL_CASES
def test_wrong_kernels_are_rejected(arguments):
    logits = random_logits(64, seed=8)
    expected = route(logits.double(), **arguments)
    weights, ids = kernel(logits, **arguments)
    top_k = arguments["top_k"]
    assert judge_routing(expected, weights, ids) == []

    def rejected(weights, ids, tokens=64):
        return len({c.split(":")[0] for c in judge_routing(expected, weights, ids)}) == tokens

    assert rejected(weights * 1.0001, ids)
    assert rejected(weights + math.nan, ids)
    if top_k > 1:
        assert rejected(weights.flip(1), ids)
        twice = ids.clone()
        twice[:, 1] = twice[:, 0]
        assert rejected(weights, twice)
    out_of_range = ids.clone()
    out_of_range[5, 0] = -1
    out_of_range[6, 0] = 32
    assert rejected(weights, out_of_range, tokens=2)
    if top_k < 32:
        neighbour = ids.clone()
        absent = next(e for e in range(32) if e not in ids[9].tolist())
        neighbour[9, -1] = absent if absent != int(ids[9, -1]) else absent + 1
        assert rejected(weights_of(expected, neighbour)[0], neighbour, tokens=1)
    assert "shape" in judge_routing(expected, weights[1:], ids)[0]


def test_historical_mistakes_are_rejected():
    logits = random_logits(256, seed=9)
    v3 = CASES["deepseek_v3"]
    expected = route(logits.double(), **v3)
    mistakes = {
        "bias ignored": v3 | dict(correction_bias=torch.zeros(32)),
        "no renormalization": v3 | dict(renormalize=False),
        "no scaling factor": v3 | dict(routed_scaling_factor=1.0),
        "groups ignored": v3 | dict(num_groups=1, topk_groups=1),
        "groups by their maximum": v3 | dict(correction_bias=None),
        "softmax for sigmoid": v3 | dict(scoring="softmax"),
    }
    for mistake, arguments in mistakes.items():
        assert len(judge_routing(expected, *kernel(logits, **arguments))) > 20, mistake
    # Weights from the biased scores instead of the unbiased ones.
    ids = expected.topk_ids
    biased = (torch.sigmoid(logits.double()) + BIAS).gather(1, ids)
    assert len(judge_routing(expected, biased / biased.sum(1, keepdim=True) * 2.5, ids)) > 200
    # Scores rounded to bfloat16 before the choice.
    expected = route(logits.double(), 4, "softmax_topk", renormalize=True)
    weights, ids = torch.softmax(logits, -1).bfloat16().float().topk(4)
    assert len(judge_routing(expected, weights / weights.sum(1, keepdim=True), ids)) > 200


def test_undefined_weights_are_accepted_and_their_ids_are_judged():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[nan] * 4, [-inf] * 4, [inf, 0, 0, inf], [nan, 0, 0, 0]], dtype=torch.float64)
    expected = route(logits, 2, "softmax_topk", renormalize=True)
    assert torch.isnan(expected.topk_weights[:3]).all()
    assert expected.topk_ids[3].tolist() == [1, 2] and expected.topk_weights[3].tolist() == [0.5, 0.5]
    ids = torch.tensor([[3, 0], [0, 1], [3, 0], [2, 3]])
    assert judge_routing(expected, torch.full((4, 2), 0.5), ids) == []
    ids[0, 0] = 0
    assert len(judge_routing(expected, torch.full((4, 2), 0.5), ids)) == 1


def test_no_tokens_give_empty_tensors():
    expected = route(torch.zeros(0, 8, dtype=torch.float64), 2, "topk_softmax")
    assert expected.topk_ids.shape == expected.topk_weights.shape == (0, 2)
    assert judge_routing(expected, expected.topk_weights, expected.topk_ids) == []


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
@ALL_CASES
def test_the_accelerator_agrees_with_the_cpu(arguments):
    device = torch.accelerator.current_accelerator()
    logits = LOGITS["bfloat16_with_many_ties"].double()
    ours = route(logits, **arguments)
    there = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    theirs = route(logits.to(device), **there)
    assert torch.equal(theirs.near_tie.cpu(), ours.near_tie)
    assert torch.equal(theirs.topk_ids.cpu()[~ours.near_tie], ours.topk_ids[~ours.near_tie])
    assert judge_routing(theirs, ours.topk_weights, ours.topk_ids) == []
    assert judge_routing(ours, theirs.topk_weights, theirs.topk_ids) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(top_k=9, method="sigmoid"), "top_k is 9; valid is 1 to 8"),
        (dict(top_k=2, method="topk"), "method is 'topk'; valid is softmax_topk, topk_softmax"),
        (dict(top_k=2, method="topk_softmax", renormalize=False), "renormalize is False; valid is True"),
        (dict(top_k=2, method="sigmoid", num_groups=2), "num_groups is 2; valid is None for method 'sigmoid'"),
        (dict(top_k=2, method="grouped", num_groups=3), "num_groups is 3; valid is a divisor of 8"),
        (
            dict(top_k=2, method="grouped", num_groups=2, topk_groups=3),
            "topk_groups is 3; valid is 1 to num_groups = 2",
        ),
        (dict(top_k=5, method="grouped", num_groups=2, topk_groups=1), "top_k is 5; valid is at most the 4 experts"),
        (dict(top_k=2, method="grouped", scoring="tanh"), "scoring is 'tanh'; valid is softmax, sigmoid"),
        (
            dict(top_k=2, method="sigmoid", routed_scaling_factor=0.0),
            "routed_scaling_factor is 0.0; valid is a positive",
        ),
        (dict(top_k=2, method="grouped", correction_bias=BIAS), r"len\(correction_bias\) is 32; valid is 8"),
    ],
)
def test_errors_name_the_field_the_value_and_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(1, 8, dtype=torch.float64), **arguments)
