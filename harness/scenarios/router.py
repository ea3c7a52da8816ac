"""Scenarios of the router: logits -> the experts of every token and their weights, judged by reference/routing.py.

For backends with route(logits, top_k, method, **options) -> (topk_weights float32 [T, k], topk_ids int32 [T, k]). The
options are those of reference.routing.route, and, for the scenarios of these names, id_map, fused_shared, scale_later
and num_valid_tokens (kernels/triton/topk.py). A Problem's tokens, num_experts, top_k, dtype and padded describe the
logits, and the fill their values: `exact` well separated, `random` normal, `extreme` a row of each of EXTREMES in turn.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.backend import Unsupported
from harness.inputs.draw import generator
from harness.inputs.logits import BIASES, draw_logits
from harness.scenarios.registry import must_refuse, require_promise, scenario, start
from harness.scenarios.stage_call import accept, call_stage, require_options, require_tensor, stage
from harness.session.session import Session
from harness.trace.bits import same_bits
from reference.routing import Routing, judge_routing, route, weights_of

#: (num_groups, topk_groups) of the scenarios route.groups<num_groups>_<topk_groups>.
GROUPS = ((2, 1), (2, 2), (3, 2), (4, 1), (4, 3), (5, 2), (8, 1), (8, 4), (8, 7), (8, 8))
#: Correction biases of the grouped scenarios, names of BIASES, by the suffix of the scenario's name.
SUFFIXES = {"": None, "_bias": "even", "_bias12": "twelve", "_negative": "negative"}


def _ways() -> dict[str, dict[str, Any]]:
    """Scenario route.<name>: arguments of the reference; bias is a name of BIASES.

    The plain methods; then the grouped router as DeepSeek-V3 uses it (sigmoid, renormalized, scaled), with one group
    and with each of GROUPS, each with every bias of SUFFIXES; then two grouped routers by softmax.
    """
    ways: dict[str, dict[str, Any]] = {
        "softmax": dict(method="softmax_topk"),
        "softmax_renorm": dict(method="softmax_topk", renormalize=True),
        "topk_softmax": dict(method="topk_softmax"),
        "sigmoid": dict(method="sigmoid"),
        "sigmoid_renorm": dict(method="sigmoid", renormalize=True),
        "scaling": dict(method="softmax_topk", renormalize=True, routed_scaling_factor=2.5),
        "scaling_sigmoid": dict(method="sigmoid", routed_scaling_factor=0.3),
        "softmax_bias": dict(method="grouped", scoring="softmax", bias="even"),
    }
    groups: dict[str, dict[str, int]] = {"grouped": {}}
    groups |= {f"groups{n}_{kept}": dict(num_groups=n, topk_groups=kept) for n, kept in GROUPS}
    for name, sizes in groups.items():
        for suffix, bias in SUFFIXES.items():
            grouped: dict[str, Any] = dict(method="grouped", renormalize=True, routed_scaling_factor=2.5, bias=bias)
            ways[name + suffix] = grouped | sizes
    for n, kept in ((4, 2), (8, 3)):
        ways[f"groups{n}_{kept}_softmax"] = dict(method="grouped", scoring="softmax", num_groups=n, topk_groups=kept)
    return ways


WAYS = _ways()


def check(s: Session, way: str, what: str = "", tokens: int | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """Route one batch and judge it; returns (topk_weights float32, topk_ids int32), [T, k].

    tokens: of the batch, those of the case by default; more: arguments beside those of WAYS[way].
    """
    problem, device = s.case.problem, s.device.torch
    arguments = dict(WAYS[way]) | more
    logits = draw_logits(s.case, device, tokens)
    if bias := arguments.pop("bias", None):
        drawn = torch.randn(problem.num_experts, generator=generator(s.case, "bias"))
        arguments["correction_bias"] = BIASES[bias](drawn).to(device)
    groups, kept = arguments.get("num_groups", 1), arguments.get("topk_groups", 1)
    if problem.num_experts % groups or problem.num_experts // groups * kept < problem.top_k:
        raise Unsupported(f"shape: no {problem.top_k} of {problem.num_experts} experts in {kept} of {groups} groups")
    function = stage(s, "route")
    require_options(s, function, "route", arguments)
    options = dict(top_k=problem.top_k, **arguments)
    weights, ids = call_stage(s, function, {"logits": logits}, options, what)

    slots = problem.top_k + arguments.get("fused_shared", 0)
    require_tensor(s, "topk_weights", weights, (len(logits), slots), torch.float32, what)
    require_tensor(s, "topk_ids", ids, (len(logits), slots), torch.int32, what)
    complaints, routed_weights, routed_ids = _routed(arguments, problem.num_experts, weights.cpu(), ids.cpu())
    expected = _expected(s, logits.cpu()[: len(routed_ids)], arguments)
    if not complaints:
        complaints = judge_routing(expected, routed_weights, routed_ids)
    if not complaints and "best_first" in s.backend.promises and expected.correction_bias is None:
        complaints = _out_of_order(expected, logits.cpu(), routed_ids)
    budgets = {"weights": 0.0 if complaints else _budget_used(expected, routed_weights, routed_ids)}
    accept(s, complaints, what, budgets, _doubt(s, expected))
    return weights, ids


def _routed(
    arguments: dict[str, Any], num_experts: int, weights: Tensor, ids: Tensor
) -> tuple[list[str], Tensor, Tensor]:
    """Remove what the options add to a routing: padding rows, mapped ids, shared experts. Returns complaints about
    these, and the weights and ids that remain."""
    complaints = []
    if (num_valid := arguments.get("num_valid_tokens")) is not None:
        count = min(int(num_valid), len(ids))
        for t in range(count, len(ids)):
            if bool((ids[t] != -1).any() | (weights[t] != 0).any()):
                complaints.append(f"token {t} is padding, but has experts {ids[t].tolist()}, {weights[t].tolist()}")
        weights, ids = weights[:count], ids[:count]
    if (id_map := arguments.get("id_map")) is not None:
        table = id_map.cpu().long()
        back = torch.full((int(table.max()) + 2,), -1)
        back[table] = torch.arange(len(table))
        strange = (ids < 0) | (ids >= len(back))
        ids = torch.where(strange, -1, back[ids.long().clamp(0, len(back) - 1)]).int()
    if shared := arguments.get("fused_shared", 0):
        wanted = torch.arange(num_experts, num_experts + shared)
        factor = arguments["routed_scaling_factor"] if arguments.get("scale_later") else 1.0
        for t in range(len(ids)):
            mine = weights[t, -shared:]
            if not torch.equal(ids[t, -shared:].long(), wanted):
                complaints.append(f"token {t}: shared experts {ids[t, -shared:].tolist()} instead of {wanted.tolist()}")
            elif bool((mine.double() * factor - 1).abs().max() > 6 * 2.0**-24):  # factor rounded; quotient within 2 ulp
                complaints.append(f"token {t}: shared experts weigh {mine.tolist()} instead of 1 / {factor:g}")
        weights, ids = weights[:, :-shared], ids[:, :-shared]
    return complaints, weights, ids


def _expected(s: Session, logits: Tensor, arguments: dict[str, Any]) -> Routing:
    """The reference's routing, with narrower intervals for a backend that promises "small_sigmoids"."""
    known = {k: v for k, v in arguments.items() if k not in ("id_map", "fused_shared", "num_valid_tokens")}
    if known.pop("scale_later", False):
        known["routed_scaling_factor"] = 1.0
    if (bias := known.get("correction_bias")) is not None:
        known["correction_bias"] = bias.cpu().double()
    expected = route(logits.double(), s.case.problem.top_k, **known)
    by_sigmoid = known["method"] == "sigmoid" or (
        known["method"] == "grouped" and known.get("scoring", "sigmoid") == "sigmoid"
    )
    if not by_sigmoid or "small_sigmoids" not in s.backend.promises:
        return expected
    # A sigmoid is the softmax of the logit and 0, whose error is relative; the error of a tanh is absolute.
    x = torch.where(torch.isfinite(logits), logits, 0).double().flatten()
    narrow = route(torch.stack([x, torch.zeros_like(x)], 1), 1, "softmax_topk")
    finite = torch.isfinite(logits)
    low, high = (t[:, 0].view_as(logits) for t in (narrow.scores_low, narrow.scores_high))
    return replace(
        expected,
        scores_low=torch.where(finite, torch.maximum(low, expected.scores_low), expected.scores_low),
        scores_high=torch.where(finite, torch.minimum(high, expected.scores_high), expected.scores_high),
    )


def _out_of_order(expected: Routing, logits: Tensor, ids: Tensor) -> list[str]:
    """A sentence for each token that breaks the promise "best_first": its experts must be in order of logit, and of id
    where logits are equal, and of experts with the same logit and equally good groups the smallest ids must be chosen.
    For routings without a bias."""
    x = torch.where(torch.isnan(logits), -math.inf, logits.float())[: len(ids)]
    ids = ids.long()
    chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(1, ids, True)
    number = torch.arange(x.shape[1])
    best = x.unflatten(1, (expected.num_groups, -1)).amax(2)
    best = best.repeat_interleave(x.shape[1] // expected.num_groups, 1)
    mine = x.gather(1, ids)
    wrong = ((mine.diff(dim=1) > 0) | ((mine[:, 1:] == mine[:, :-1]) & (ids.diff(dim=1) < 0))).any(1)
    for slot in range(ids.shape[1]):
        e = ids[:, slot : slot + 1]
        as_good = (x == mine[:, slot : slot + 1]) & (best == best.gather(1, e))
        wrong |= (~chosen & as_good & (number < e)).any(1)
    return [
        f"token {t}: experts {ids[t].tolist()} are not best first, or not the first of equal logits {mine[t].tolist()}"
        for t in torch.nonzero(wrong).flatten().tolist()
    ]


def _budget_used(expected: Routing, weights: Tensor, ids: Tensor) -> float:
    """The largest share of a weight's interval, on its side of the expected weight, that is used. Counts only weights
    whose interval excludes zero and is finite."""
    wanted, low, high = weights_of(expected, ids.long())
    difference = weights.double() - wanted
    width = torch.where(difference > 0, high - wanted, wanted - low)
    counted = (difference != 0) & (low > 0) & torch.isfinite(high)
    share = torch.where(counted, difference.abs() / width, 0.0)
    return float(share.max()) if share.numel() else 0.0


def _doubt(s: Session, expected: Routing) -> str | None:
    """Why a match proves little, or None."""
    if not expected.near_tie.numel():
        return "there is no token to route"
    vague = expected.near_tie | expected.topk_weights.isnan().any(1)
    if bool(vague.all()) and "best_first" not in s.backend.promises:
        return "every token is a tie, or has no defined weights"
    return None


for _way in WAYS:
    scenario(f"route.{_way}")(partial(check, way=_way))


@scenario("route.repeat")
def repeat(s: Session) -> None:
    """Two calls with the same logits return the same bits."""
    if not s.backend.deterministic:
        raise Unsupported(f"scenario: {s.backend.name} declares that it is not deterministic")
    first = check(s, "groups4_3_bias", "first call")
    again = check(s, "groups4_3_bias", "second call")
    for name, a, b in zip(("topk_weights", "topk_ids"), first, again):
        s.require(same_bits(a, b), f"the second call gave other {name} for the same logits")


@scenario("route.batches")
def batches(s: Session) -> None:
    """Batches that grow and shrink, including an empty batch, by every method."""
    most = s.case.problem.tokens
    for way in ("softmax", "topk_softmax", "sigmoid_renorm", "grouped_bias"):
        for tokens in (most, 1, 0, 2 * most + 1):
            check(s, way, f"{way}, {tokens} tokens", tokens)


def _id_map(s: Session, more: int = 0) -> Tensor:
    """The place of each of the num_experts + more experts, [n] int32: distinct, among twice as many."""
    count = s.case.problem.num_experts + more
    return torch.randperm(2 * count, generator=generator(s.case, "map"))[:count].int().to(s.device.torch)


@scenario("route.id_map")
def id_map(s: Session) -> None:
    """With id_map every method returns the mapped ids."""
    for way in ("softmax_renorm", "topk_softmax", "sigmoid", "grouped_bias", "groups2_1"):
        check(s, way, way, id_map=_id_map(s))


@scenario("route.fused_shared")
def fused_shared(s: Session) -> None:
    """Shared experts get additional slots; the routed experts keep theirs."""
    for count, way in ((1, "scaling"), (2, "grouped_bias"), (1, "topk_softmax")):
        check(s, way, f"{way}, {count} shared", fused_shared=count)
    check(s, "scaling", "moved as well", fused_shared=2, id_map=_id_map(s, 2))


@scenario("route.scale_later")
def scale_later(s: Session) -> None:
    """With scale_later the routed weights are unscaled, and a shared expert's weight is 1 / routed_scaling_factor."""
    for way in ("scaling", "scaling_sigmoid", "grouped_bias"):
        check(s, way, way, scale_later=True)
        check(s, way, f"{way}, 2 shared", scale_later=True, fused_shared=2)


@scenario("route.num_valid_tokens")
def num_valid_tokens(s: Session) -> None:
    """Padding tokens get no expert, for any values of their logits."""
    tokens = s.case.problem.tokens
    for count in sorted({0, 1, tokens - 1, tokens, tokens + 3}):
        known = torch.tensor([count], dtype=torch.int32, device=s.device.torch)
        check(s, "softmax_renorm", f"{count} of {tokens}", num_valid_tokens=known)


@scenario("route.layer")
def layer(s: Session) -> None:
    """The layer takes the router's outputs."""
    inputs, call = start(s)
    for way in ("topk_softmax", "grouped_bias"):
        weights, ids = check(s, way, way)
        s.check(call, replace(inputs, topk_weights=weights, topk_ids=ids), f"routed by {way}")


@scenario("route.refuses")
def refuses(s: Session) -> None:
    """Meaningless arguments are refused by an error that names them."""
    require_promise(s, "errors")
    problem, function = s.case.problem, stage(s, "route")
    logits = draw_logits(s.case, s.device.torch)
    n, k = problem.num_experts, problem.top_k
    bias = torch.zeros(n, device=s.device.torch)
    tall = torch.zeros(2 * n, problem.tokens, dtype=logits.dtype, device=s.device.torch)
    grouped: dict[str, Any] = dict(method="grouped", top_k=k)
    for what, words, x, options in (
        ("more experts than there are", ("top_k",), logits, dict(method="sigmoid", top_k=n + 1)),
        ("no expert at all", ("top_k",), logits, dict(method="sigmoid", top_k=0)),
        ("an unknown method", ("method",), logits, dict(method="best", top_k=k)),
        ("an unknown scoring", ("scoring",), logits, dict(grouped, scoring="tanh")),
        ("groups of unequal size", ("num_groups",), logits, dict(grouped, num_groups=n - 1, top_k=1)),
        ("more groups than experts", ("num_groups",), logits, dict(grouped, num_groups=n + 1)),
        ("more groups kept than there are", ("topk_groups",), logits, dict(grouped, num_groups=1, topk_groups=2)),
        ("more experts than the kept groups have", ("top_k",), logits, dict(grouped, num_groups=n, topk_groups=k - 1)),
        ("groups for a method without", ("num_groups",), logits, dict(method="sigmoid", top_k=k, num_groups=2)),
        ("a bias for a method without", ("bias",), logits, dict(method="sigmoid", top_k=k, correction_bias=bias)),
        ("a bias that is too short", ("bias",), logits, dict(grouped, correction_bias=bias[:-1])),
        ("a bias of float64", ("bias",), logits, dict(grouped, correction_bias=bias.double())),
        ("a scaling factor of zero", ("scaling",), logits, dict(grouped, routed_scaling_factor=0.0)),
        ("logits that are integers", ("logits",), logits.int(), dict(method="sigmoid", top_k=k)),
        ("logits of one dimension", ("logits",), logits[0], dict(method="sigmoid", top_k=k)),
        ("logits with strided columns", ("logits", "stride"), tall[::2].t(), dict(method="sigmoid", top_k=k)),
    ):
        must_refuse(s, what, words, partial(function, x, **options), {"logits": logits})
    check(s, "softmax", "after the refusals")
