"""The router kernel against the reference and transformers, and broken routers against the family of cases."""

from tests.support.interpreted import poisoned  # isort: skip  # noqa: F401

import math
import random

import pytest
import torch

from cases import test_routing as family
from harness.device import Device
from harness.inputs.logits import draw_logits
from harness.problem.case import Case
from harness.problem.families import rows
from harness.run.case import run_case
from harness.scenarios.router import WAYS
from kernels.triton.backend import TritonMoE
from kernels.triton.topk import fused_topk
from reference.routing import METHODS, judge_routing, route

CPU = Device("cpu")


# --- the kernel ------------------------------------------------------------------------------------------------------


def arguments(rng: random.Random, experts: int) -> tuple[int, dict]:
    """(top_k, arguments) that make sense for this number of experts, of any method."""
    method = rng.choice(METHODS)
    chosen = dict(method=method, routed_scaling_factor=rng.choice((1.0, 2.5, 0.125)))
    if method != "topk_softmax":
        chosen["renormalize"] = rng.choice((None, True, False))
    if method != "grouped":
        return rng.randint(1, min(experts, 12)), chosen
    groups = rng.choice([n for n in range(1, experts + 1) if experts % n == 0 and n <= 12])
    kept = rng.randint(1, groups)
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(rng.randrange(99))) * rng.choice((0.1, 3.0))
    chosen |= dict(scoring=rng.choice(("softmax", "sigmoid")), num_groups=groups, topk_groups=kept)
    chosen |= dict(correction_bias=rng.choice((None, bias)))
    return rng.randint(1, min(experts // groups * kept, 12)), chosen


@pytest.mark.parametrize("seed", range(40))
def test_any_arguments_against_the_reference(seed):
    rng = random.Random(seed)
    experts, tokens = rng.choice((1, 2, 6, 12, 30, 31, 48, 96, 200)), rng.randint(1, 40)
    top_k, chosen = arguments(rng, experts)
    case = f"t{tokens}-h1-i1-e{experts}-k{top_k}-{rng.choice(('bf16', 'fp16', 'fp32'))}-padded-extreme-s{seed}"
    logits = draw_logits(Case.parse(case), CPU.torch)
    bias = chosen.get("correction_bias")
    exact = chosen | (dict(correction_bias=bias.double()) if bias is not None else {})
    weights, ids = fused_topk(logits, top_k, **chosen)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert judge_routing(route(logits.double(), top_k, **exact), weights, ids) == []


def test_undetermined_rows_still_have_distinct_experts_in_order():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[nan] * 6, [-inf] * 6, [0.0] * 6, [nan, -inf, nan, 1.0, nan, 1.0], [inf, nan, inf, 0, 0, 1]])
    for options in (dict(method="softmax_topk"), dict(method="sigmoid"), dict(method="topk_softmax")):
        _, ids = fused_topk(logits, 4, **options)
        assert ids.tolist() == [[0, 1, 2, 3]] * 3 + [[3, 5, 0, 1], [0, 2, 5, 3]]
    for scoring in ("softmax", "sigmoid"):
        _, ids = fused_topk(logits[:3], 4, "grouped", correction_bias=torch.zeros(6), num_groups=3, topk_groups=2,
                            scoring=scoring)  # fmt: skip
        assert ids.tolist() == [[0, 1, 2, 3]] * 3


def test_a_bias_chooses_and_never_weighs():
    logits = torch.full((1, 8), -18.0)
    bias = 12 + torch.arange(8.0) / 100
    weights, ids = fused_topk(logits, 2, "grouped", correction_bias=bias)
    assert ids.tolist() == [[7, 6]]
    torch.testing.assert_close(weights.double(), torch.sigmoid(logits.double())[:, :2], rtol=1e-6, atol=0)


def test_shared_experts_padding_and_a_map():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 1.0, 1.0]])
    options = dict(method="topk_softmax", fused_shared=2, routed_scaling_factor=4.0)
    plain, _ = fused_topk(logits, 2, "topk_softmax")
    weights, ids = fused_topk(logits, 2, **options)
    assert ids.tolist() == [[0, 2, 3, 4], [1, 2, 3, 4], [0, 1, 3, 4]]
    assert torch.equal(weights[:, :2], 4 * plain) and weights[:, 2:].tolist() == [[1.0, 1.0]] * 3
    later, _ = fused_topk(logits, 2, scale_later=True, **options)
    assert torch.equal(later * 4, weights)
    places = torch.tensor([10, 11, 12, 13, 14], dtype=torch.int32)
    known = torch.tensor([2], dtype=torch.int32)
    weights, ids = fused_topk(logits, 2, id_map=places, num_valid_tokens=known, **options)
    assert ids.tolist() == [[10, 12, 13, 14], [11, 12, 13, 14], [-1] * 4] and weights[2].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(top_k=9), ValueError, "top_k=9; valid: 1 to 8, the experts in 1 of 1 groups"),
        (dict(method="best"), ValueError, "method='best'; valid: 'softmax_topk', 'topk_softmax', 'sigmoid', 'grouped'"),
        (dict(num_groups=3), ValueError, "num_groups=3; valid: a divisor of 8, the number of experts"),
        (dict(num_groups=2, topk_groups=3), ValueError, "topk_groups=3; valid: 1 to num_groups=2"),
        (dict(method="sigmoid", num_groups=2), ValueError, "num_groups is given; valid for method 'sigmoid': None"),
        (dict(method="topk_softmax", renormalize=False), ValueError, "renormalize=False; valid for .* True or None"),
        (dict(routed_scaling_factor=math.inf), ValueError, "routed_scaling_factor=inf; valid: a positive number"),
        (dict(scoring="tanh"), ValueError, "scoring='tanh'; valid: 'softmax', 'sigmoid'"),
        (dict(fused_shared=-1), ValueError, "fused_shared=-1; valid: 0 or more"),
        (dict(correction_bias=torch.zeros(7)), ValueError, r"correction_bias: shape \(7,\); valid: \(8,\) = \[E\]"),
        (
            dict(correction_bias=torch.zeros(8).half()),
            TypeError,
            "correction_bias: dtype torch.float16; valid: torch.f",
        ),
        (dict(id_map=torch.zeros(8)), TypeError, "id_map: dtype torch.float32; valid: torch.int32"),
        (dict(logits=torch.zeros(3, 8).double()), TypeError, "logits: dtype torch.float64; valid: torch.bfloat16"),
        (dict(logits=torch.zeros(8, 3).t()), ValueError, "logits: stride"),
        (dict(logits=torch.zeros(8)), ValueError, r"logits: shape \(8,\); valid: \[T, E\]"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_valid(changes, error, message):
    with pytest.raises(error, match=message):
        fused_topk(**(dict(logits=torch.zeros(3, 8), top_k=2, method="grouped") | changes))


def test_against_the_routers_of_transformers():
    pytest.importorskip("transformers", minversion="5.0")
    from tests.reference import test_against_transformers as t

    grouped = dict(method="grouped", num_groups=4, topk_groups=2, renormalize=True, routed_scaling_factor=2.5)
    deepseek = t.config_of(t.DeepseekV3Config, n_group=4, topk_group=2, norm_topk_prob=True,
                           routed_scaling_factor=2.5, n_routed_experts=t.EXPERTS)  # fmt: skip
    for router, options in (
        (t.MixtralTopKRouter(t.config_of(t.MixtralConfig)), dict(method="topk_softmax")),
        (t.GptOssTopKRouter(t.config_of(t.GptOssConfig)), dict(method="topk_softmax")),
        (t.Qwen3MoeTopKRouter(t.config_of(t.Qwen3MoeConfig, norm_topk_prob=False)), dict(method="softmax_topk")),
        (t.DeepseekV3TopkRouter(deepseek), grouped),
    ):
        logits, theirs, their_ids = t.randomized(router, torch.float32)(t.tokens(torch.float32))
        bias = getattr(router, "e_score_correction_bias", None)
        more = {} if bias is None else {"correction_bias": bias}
        ours, ids = fused_topk(logits, t.TOP_K, **options, **more)
        # No order is promised by theirs.
        (theirs, their_ids), (ours, ids) = (_by_id(w, i) for w, i in ((theirs, their_ids), (ours, ids)))
        assert torch.equal(ids, their_ids)
        torch.testing.assert_close(ours, theirs, rtol=2.0**-20, atol=0)


def _by_id(weights, ids):
    order = ids.long().argsort(1)
    return weights.gather(1, order), ids.long().gather(1, order)


# --- the family of cases: broken routers are noticed, right ones are not accused -------------------------------------


class Router:
    """A backend whose router is this function."""

    devices = frozenset({"cpu"})

    def __init__(self, route, promises=("best_first", "small_sigmoids", "errors")):
        self.name, self.route, self.promises = "router", route, frozenset(promises)

    prepare = TritonMoE().prepare


FAULTS = {}


def fault(*words):
    """A broken router, and words of the cases that have what it takes to see it."""

    def register(function):
        FAULTS[function.__name__] = (function, words)
        return function

    return register


@fault("route.softmax")
def neighbour(logits, top_k, method, **options):
    """Every id is one too large, around the end."""
    weights, ids = fused_topk(logits, top_k, method, **options)
    return weights, (ids + 1) % logits.shape[1]


@fault("route.sigmoid")
def twice(logits, top_k, method, **options):
    """The last slot repeats the first."""
    weights, ids = fused_topk(logits, top_k, method, **options)
    ids[:, -1], weights[:, -1] = ids[:, 0], weights[:, 0]
    return weights, ids


@fault("route.softmax")
def last_token_unwritten(logits, top_k, method, **options):
    """A tail mask of tokens that is one short."""
    weights, ids = fused_topk(logits[:-1], top_k, method, **options)
    out = torch.empty(len(logits), weights.shape[1]), torch.empty(len(logits), ids.shape[1], dtype=torch.int32)
    out[0][:-1], out[1][:-1] = weights, ids
    return out


@fault("route.softmax", "e17")
def last_expert_unseen(logits, top_k, method, **options):
    """A tail mask of experts that is one short."""
    if logits.shape[1] <= max(top_k, 2) or method == "grouped":
        return fused_topk(logits, top_k, method, **options)
    return fused_topk(logits[:, :-1], top_k, method, **options)


@fault("route.softmax_renorm")
def in_bfloat16(logits, top_k, method, **options):
    """Weights that were bfloat16 on their way."""
    weights, ids = fused_topk(logits, top_k, method, **options)
    return weights.bfloat16().float(), ids


@fault("route.softmax_renorm")
def long_ids(logits, top_k, method, **options):
    """int64 where int32 is read."""
    weights, ids = fused_topk(logits, top_k, method, **options)
    return weights, ids.long()


@fault("extreme", "route.sigmoid")
def writes_to_logits(logits, top_k, method, **options):
    """NaN is cleaned in place."""
    logits.nan_to_num_(nan=-1.0)
    return fused_topk(logits, top_k, method, **options)


@fault("route.softmax_renorm", "padded")
def as_if_dense(logits, top_k, method, **options):
    """Rows are taken to lie one behind the other."""
    dense = logits.as_strided(logits.shape, (logits.shape[1], 1))
    return fused_topk(dense, top_k, method, **options)


@fault("route.grouped_bias")
def without_bias(logits, top_k, method, correction_bias=None, **options):
    """The bias is forgotten."""
    return fused_topk(logits, top_k, method, **options)


@fault("route.groups8_4_bias")
def without_groups(logits, top_k, method, num_groups=None, topk_groups=None, **options):
    """All groups are kept."""
    return fused_topk(logits, top_k, method, **options)


@fault("route.groups4_3_bias")
def groups_by_their_best(logits, top_k, method, correction_bias=None, num_groups=None, topk_groups=None, **options):
    """Groups are ranked by their best expert, with a bias too."""
    if correction_bias is None or (num_groups or 1) == 1:
        return fused_topk(logits, top_k, method, correction_bias=correction_bias, **options)
    keys = torch.sigmoid(logits.float()) + correction_bias
    best = keys.unflatten(1, (num_groups, -1)).amax(2).topk(topk_groups, 1).indices
    kept = torch.zeros(len(logits), num_groups).scatter_(1, best, 1).repeat_interleave(logits.shape[1] // num_groups, 1)
    return fused_topk(torch.where(kept > 0, logits, -math.inf), top_k, method,
                      correction_bias=correction_bias, **options)  # fmt: skip


@fault("route.scaling")
def unscaled(logits, top_k, method, routed_scaling_factor=1.0, **options):
    """The scaling factor is forgotten."""
    return fused_topk(logits, top_k, method, **options)


@fault("extreme", "route.softmax")
def nan_is_large(logits, top_k, method, **options):
    """NaN wins, as in a sort that puts it last."""
    return fused_topk(torch.where(logits.isnan(), 1e4, logits), top_k, method, **options)


@fault("extreme", "route.softmax")
def other_end_of_ties(logits, top_k, method, correction_bias=None, **options):
    """Of equal experts the one of the larger id."""
    bias = None if correction_bias is None else correction_bias.flip(0)
    weights, ids = fused_topk(logits.flip(1), top_k, method, correction_bias=bias, **options)
    return weights, logits.shape[1] - 1 - ids


@fault("route.softmax")
def worst_first(logits, top_k, method, **options):
    """Slots in ascending order."""
    return tuple(t.flip(1) for t in fused_topk(logits, top_k, method, **options))


@fault("route.id_map")
def unmapped(logits, top_k, method, id_map=None, **options):
    """The map is forgotten."""
    return fused_topk(logits, top_k, method, **options)


@fault("route.fused_shared")
def shared_in_the_last_slot(logits, top_k, method, fused_shared=0, **options):
    """A shared expert takes a routed expert's slot."""
    if not fused_shared:
        return fused_topk(logits, top_k, method, **options)
    options.pop("id_map", None)
    weights, ids = fused_topk(logits, top_k, method, fused_shared=fused_shared, **options)
    ids[:, top_k - 1] = ids[:, top_k]
    return weights, ids


@fault("route.num_valid_tokens")
def padding_is_routed(logits, top_k, method, num_valid_tokens=None, **options):
    """Padding is routed as tokens are."""
    return fused_topk(logits, top_k, method, **options)


@fault("route.repeat")
def remembers(logits, top_k, method, **options):
    """A weight changes with every call."""
    weights, ids = fused_topk(logits, top_k, method, **options)
    remembers.calls = getattr(remembers, "calls", 0) + 1
    return (weights.nextafter(torch.tensor(2.0)) if remembers.calls % 2 else weights), ids


@fault("extreme", "route.sigmoid_renorm")
def sum_may_vanish(logits, top_k, method, renormalize=None, **options):
    """0 / 0 where all chosen sigmoids vanish."""
    if method != "sigmoid" or not renormalize:
        return fused_topk(logits, top_k, method, renormalize=renormalize, **options)
    weights, ids = fused_topk(logits, top_k, method, **options)
    return weights / weights.sum(1, keepdim=True), ids


def asked(*words):
    """The family's cases that have all of these words first, then the others; small ones before large."""
    found = [row.case for row in rows(family, on_cpu=True) if row.case.scenario != "route.layer"]
    return sorted(found, key=lambda c: (-len(set(words) & set(str(c).split("-"))), c.problem.tokens))


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_router_is_noticed(name):
    function, words = FAULTS[name]
    cases = asked(*words)[:60]
    verdicts = (run_case(case, Router(function), CPU, "routing") for case in cases)
    noticed = next((v for v in verdicts if not v.green), None)
    assert noticed is not None and noticed.status == "failed", noticed


def by_reference(logits, top_k, method, correction_bias=None, **options):
    """A router with nothing in common with the kernel: the reference, rounded once."""
    bias = None if correction_bias is None else correction_bias.double()
    found = route(logits.double(), top_k, method, correction_bias=bias, **options)
    return found.topk_weights.float(), found.topk_ids.int()


def by_tanh(logits, top_k, method, **options):
    """Sigmoids by way of tanh: what is small is lost, and ties are resolved from the other end."""
    if method != "sigmoid":
        return fused_topk(logits, top_k, method, **options)
    x = torch.where(logits.isnan(), -math.inf, logits.float())
    scores = 0.5 * torch.tanh(0.5 * x) + 0.5
    ids = scores.shape[1] - 1 - scores.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return scores.gather(1, ids) * options.get("routed_scaling_factor", 1.0), ids.int()


def accused(router, cases):
    return [f"{v.case}: {v.reason}" for v in (run_case(c, router, CPU, "routing") for c in cases) if not v.green]


def test_right_routers_are_not_accused():
    plain = [c for c in asked() if c.scenario.removeprefix("route.") in WAYS][::7]
    assert accused(Router(by_reference, promises=()), plain) == []
    sigmoids = [c for c in plain if c.scenario in ("route.sigmoid", "route.scaling_sigmoid")]
    assert len(sigmoids) > 8 and accused(Router(by_tanh, promises=()), sigmoids) == []
    # It must not promise what it does not keep.
    assert accused(Router(by_tanh, promises=("small_sigmoids",)), sigmoids) != []


def test_without_a_router_or_an_option_the_case_is_unsupported():
    case = Case.parse("t5-h1-i1-e8-k2-bf16-random-route.id_map")
    for router, reason in ((None, "has no route()"), (by_reference, "has no id_map")):
        lacking = Router(router)
        if router is by_reference:
            lacking.route = lambda logits, top_k, method, renormalize=None: by_reference(logits, top_k, method)
        verdict = run_case(case, lacking, CPU, "routing")
        assert verdict.status == "unsupported" and reason in verdict.reason
