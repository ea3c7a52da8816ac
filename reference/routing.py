"""The router in float64: from logits to experts and their weights; and the judge of a kernel's router.

    softmax_topk   s = softmax(logits), the k largest s           Shazeer et al. 2017, arXiv:1701.06538; Qwen3
    topk_softmax   softmax of the k largest logits alone,         Mixtral, arXiv:2401.04088
                   which is softmax_topk renormalized
    sigmoid        s = sigmoid(logits), the k largest s           Llama 4, with k = 1
    grouped        best groups first, then experts within them    DeepSeek-V3, arXiv:2412.19437, section 2.1.2

A kernel computes the scores in float32, so it may choose either of two experts whose scores nearly tie at the cut.
Every score therefore has an interval that contains the score of any correct kernel. The intervals decide which choices
of experts and which weights are correct.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from reference.formats import require_float64, round_to, ulp

METHODS = ("softmax_topk", "topk_softmax", "sigmoid", "grouped")
SCORINGS = ("softmax", "sigmoid")
_16_BIT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_U = 2.0**-24  # half a float32 ulp, relative: the error of one rounded operation
_TINY = 2.0**-126  # a kernel may flush smaller float32 numbers to zero
#: (value, low, high), tensors of one shape: the value, and the interval that contains it in a correct kernel.
Interval = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts of every token, with all that judging another choice needs.

    topk_weights [T, k] float64 and topk_ids [T, k] int64 are sorted by selection score, then by id. near_tie [T] bool
    marks tokens whose set of experts float32 rounding may change. scores [T, E] are the unbiased scores, from which the
    weights are computed; in a correct kernel each lies within [scores_low, scores_high]. The other fields are arguments
    of route().
    """

    topk_weights: Tensor
    topk_ids: Tensor
    near_tie: Tensor
    scores: Tensor
    scores_low: Tensor
    scores_high: Tensor
    renormalize: bool
    epsilon: float
    correction_bias: Tensor | None
    num_groups: int
    topk_groups: int
    routed_scaling_factor: float


def route(
    logits: Tensor,
    top_k: int,
    method: str,
    renormalize: bool | None = None,
    correction_bias: Tensor | None = None,
    num_groups: int | None = None,
    topk_groups: int | None = None,
    routed_scaling_factor: float = 1.0,
    scoring: str = "sigmoid",
    logits_format: str = "fp32",
) -> Routing:
    """Choose top_k experts for every token of logits [T, E] float64.

    renormalize divides the weights of a token by their sum; None means True for topk_softmax and False for the others.
    correction_bias [E] float64, num_groups, topk_groups (both 1 by default) and scoring belong to "grouped": of
    num_groups equal groups the topk_groups best remain, ranked by the sum of their two best biased scores, or, without
    a correction_bias, by their best score. The bias affects the choice and never a weight. With "grouped", renormalize
    adds 1e-20 to the sum. routed_scaling_factor multiplies every weight. logits_format is the format in which the
    kernel under test computes its logits; "fp32" is also correct for a kernel that receives 16-bit logits.

    A NaN logit counts as -inf. Where the formula is 0/0 or inf/inf (softmax without a finite logit, or with +inf), the
    weights are NaN and judge_routing accepts any weight. Among equal scores the smaller id comes first.
    ValueError for any other argument.
    """
    require_float64(logits, "logits")
    num_experts = logits.shape[-1]
    grouped = method == "grouped"
    _check(logits.dim() == 2, "shape of logits", tuple(logits.shape), "[tokens, experts]")
    _check(method in METHODS, "method", method, ", ".join(METHODS))
    _check(scoring in SCORINGS, "scoring", scoring, ", ".join(SCORINGS))
    _check(1 <= top_k <= num_experts, "top_k", top_k, f"1 to {num_experts}, the number of experts")
    _check(method != "topk_softmax" or renormalize is not False, "renormalize", renormalize, "True for topk_softmax")
    _check(routed_scaling_factor > 0, "routed_scaling_factor", routed_scaling_factor, "a positive number")
    for name, value in dict(correction_bias=correction_bias, num_groups=num_groups, topk_groups=topk_groups).items():
        _check(grouped or value is None, name, value, f"None for method {method!r}")
    num_groups, topk_groups = num_groups or 1, topk_groups or 1
    divides = num_groups > 0 and num_experts % num_groups == 0
    _check(divides, "num_groups", num_groups, f"a divisor of {num_experts}, the number of experts")
    _check(1 <= topk_groups <= num_groups, "topk_groups", topk_groups, f"1 to num_groups = {num_groups}")
    reachable = num_experts // num_groups * topk_groups
    _check(top_k <= reachable, "top_k", top_k, f"at most the {reachable} experts of topk_groups = {topk_groups} groups")
    if correction_bias is not None:
        require_float64(correction_bias, "correction_bias")
        _check(len(correction_bias) == num_experts, "len(correction_bias)", len(correction_bias), f"{num_experts}")

    logits = torch.where(torch.isnan(logits), -torch.inf, logits)
    logit_error = torch.where(torch.isinf(logits), 0.0, ulp(logits, logits_format) / 2)
    by_sigmoid = method == "sigmoid" or (grouped and scoring == "sigmoid")
    scores, low, high = (_sigmoid if by_sigmoid else _softmax)(logits, logit_error)
    selection, group_selection = _selection((scores, low, high), correction_bias, num_groups)
    kept = _mask(_top(group_selection[0], topk_groups), num_groups)
    eligible = kept.repeat_interleave(num_experts // num_groups, 1)
    ids = _top(torch.where(eligible, selection[0], -torch.inf), top_k)
    chosen = _mask(ids, num_experts)
    certain = _surely(kept, ~kept, *group_selection) & _surely(chosen, eligible & ~chosen, *selection)
    renormalize = method == "topk_softmax" if renormalize is None else renormalize
    routing = Routing(
        scores, ids, ~certain, scores, low, high, renormalize, 1e-20 if grouped else 0.0,
        correction_bias, num_groups, topk_groups, routed_scaling_factor,
    )  # fmt: skip
    return dataclasses.replace(routing, topk_weights=weights_of(routing, ids)[0])


def weights_of(routing: Routing, topk_ids: Tensor) -> Interval:
    """Return (weights, low, high), each float64 [T, k], of a choice topk_ids [T, k]; low <= correct weight <= high."""
    scores, low, high = (s.gather(1, topk_ids) for s in (routing.scores, routing.scores_low, routing.scores_high))
    roundings = 2  # the scaling factor as a float32 number, and the product with it
    if routing.renormalize:
        total, total_low, total_high = (s.sum(1, keepdim=True) + routing.epsilon for s in (scores, low, high))
        scores, low, high = scores / total, low / total_high, high / total_low
        high = torch.where(total_low > 0, high, torch.inf)
        roundings += topk_ids.shape[1] + 4  # k - 1 additions in any order and epsilon; a division within 2 ulp
    factor = routing.routed_scaling_factor
    return scores * factor, low * factor * (1 - roundings * _U), high * factor * (1 + roundings * _U)


def judge_routing(expected: Routing, topk_weights: Tensor, topk_ids: Tensor) -> list[str]:
    """Compare a kernel's topk_weights [T, k] and integer topk_ids [T, k] with expected; return one sentence per error.

    The order of experts within a token is free. The ids of a token must be distinct, in range, and a set that rounding
    can make the best; its weights must be the weights of that set. For a token without a near tie the only such set is
    expected.topk_ids. Weights of a 16-bit dtype may be rounded to it once.
    """
    shape, num_experts = expected.topk_ids.shape, expected.scores.shape[1]
    for name, tensor in (("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if tensor.shape != shape:
            return [f"{name} has shape {tuple(tensor.shape)} instead of {tuple(shape)}"]
    ids, actual = topk_ids.to(expected.topk_ids), topk_weights.to(expected.topk_weights)

    legal = ((ids >= 0) & (ids < num_experts)).all(1) & (ids.sort(1).values.diff(dim=1) != 0).all(1)
    ids = torch.where(legal[:, None], ids, expected.topk_ids)  # valid indices for the lines below; not judged
    admissible = legal & _admissible(expected, ids)

    weights, low, high = weights_of(expected, ids)
    if topk_weights.dtype in _16_BIT:
        low, high = (round_to(bound, _16_BIT[topk_weights.dtype]) for bound in (low, high))  # rounding is monotone
    in_bounds = ((low <= actual) & (actual <= high)) | torch.isnan(weights)

    errors = []
    for t in torch.nonzero(~(admissible & in_bounds.all(1))).flatten().tolist():
        if not legal[t]:
            illegal = topk_ids[t].tolist()
            errors.append(f"token {t}: experts {illegal} are not distinct numbers from 0 to {num_experts - 1}")
        elif not admissible[t]:
            chosen, best = set(ids[t].tolist()), set(expected.topk_ids[t].tolist())
            errors.append(f"token {t}: experts {sorted(chosen - best)} chosen instead of {sorted(best - chosen)}")
        for j in torch.nonzero(admissible[t] & ~in_bounds[t]).flatten().tolist():
            errors.append(
                f"token {t}: weight of expert {int(ids[t, j])} is {float(actual[t, j]):.9g} instead of "
                f"{float(weights[t, j]):.9g} (allowed {float(low[t, j]):.9g} to {float(high[t, j]):.9g})"
            )
    return errors


def _softmax(logits: Tensor, logit_error: Tensor) -> Interval:
    """Return the scores [T, E] of logits [T, E] and an interval that contains a float32 evaluation in any order.

    d = logit - max, z = exp2(d log2 e), s = z / sum(z). ln z is off by x = 3 u |d| (subtraction, constant, product)
    + 4 u (exp2 within 2 ulp); ln sum(z) by the mean of expm1(x) (Jensen; ln(1 + y) <= y) and E - 1 additions; the
    division by 2 ulp = 4 u. The bounds also hold for the large x of 16-bit logits.
    """
    scores = torch.softmax(logits, -1)
    # A score of 0 has d = -inf, and 0 * inf would be NaN.
    distance = torch.where(scores == 0, 0.0, logits.amax(-1, keepdim=True) - logits)
    error = _U * (4 + 3 * distance) + logit_error
    error = error + (scores * torch.expm1(error)).sum(-1, keepdim=True) + _U * (logits.shape[-1] - 1 + 4)
    return _interval(scores, error, _TINY)


def _sigmoid(logits: Tensor, logit_error: Tensor) -> Interval:
    """Return what _softmax returns, with z = exp2(-logit log2 e), s = 1 / (1 + z).

    ln z is off by x = 2 u |logit| + 4 u, and so ln(1 + z) by at most (1 - s) expm1(x); the addition by u, the division
    by 4 u. A kernel that evaluates tanh(logit / 2) / 2 + 1 / 2 instead, with tanh within 2 ulp, is off by u absolutely,
    however small s is.
    """
    scores = torch.sigmoid(logits)
    magnitude = torch.where(torch.isinf(logits), 0.0, logits.abs())
    error = _U * (4 + 2 * magnitude) + logit_error
    return _interval(scores, (1 - scores) * torch.expm1(error) + 5 * _U, _U)


def _interval(scores: Tensor, log_error: Tensor, absolute_error: float) -> Interval:
    low = (scores * torch.exp(-log_error) - absolute_error).clamp(min=0.0)
    return scores, low, scores * torch.exp(log_error) + absolute_error


def _selection(scores: Interval, correction_bias: Tensor | None, num_groups: int) -> tuple[Interval, Interval]:
    """Return the values that rank experts, [T, E], and groups, [T, num_groups]."""
    if correction_bias is None:
        value, low, high = (s.unflatten(-1, (num_groups, -1)).amax(-1) for s in scores)
        return scores, (value, low, high)
    experts = _rounded([s + correction_bias for s in scores])
    groups = [e.unflatten(-1, (num_groups, -1)) for e in experts]
    # The sum of the two largest is monotone in every score: the ends of the intervals map to the ends of its own.
    return experts, _rounded([g.topk(min(2, g.shape[-1]), -1).values.sum(-1) for g in groups])


def _rounded(interval: Sequence[Tensor]) -> Interval:
    value, low, high = interval
    return value, low - _U * low.abs(), high + _U * high.abs()


def _admissible(expected: Routing, ids: Tensor) -> Tensor:
    """Return whether some scores within their intervals make ids the correct choice: [T, k] -> bool [T].

    Naive: tries every set of groups for the tokens whose experts differ from the expected ones.
    """
    num_experts, num_groups = expected.scores.shape[1], expected.num_groups
    chosen = _mask(ids, num_experts)
    result = (chosen == _mask(expected.topk_ids, num_experts)).all(1)
    others = torch.nonzero(~result).flatten()
    chosen = chosen[others]
    scores = expected.scores[others], expected.scores_low[others], expected.scores_high[others]
    selection, group_selection = _selection(scores, expected.correction_bias, num_groups)
    for groups in itertools.combinations(range(num_groups), expected.topk_groups):
        kept = _mask(torch.tensor([groups], device=ids.device), num_groups)
        eligible = kept.repeat_interleave(num_experts // num_groups, 1)
        best = _possibly(kept, ~kept, *group_selection) & _possibly(chosen, eligible & ~chosen, *selection)
        result[others] |= best & ~(chosen & ~eligible).any(1)
    return result


def _surely(chosen: Tensor, others: Tensor, _: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whether every chosen score exceeds every other one, whatever the rounding: bool [T]."""
    return torch.where(chosen, low, torch.inf).amin(1) > torch.where(others, high, -torch.inf).amax(1)


def _possibly(chosen: Tensor, others: Tensor, _: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whether some rounding lifts every chosen score above every other one: bool [T]; true if any is NaN."""
    return ~(torch.where(chosen, high, torch.inf).amin(1) < torch.where(others, low, -torch.inf).amax(1))


def _top(values: Tensor, count: int) -> Tensor:
    """Return the positions of the count largest values of each row, largest first; a stable sort keeps ties by id."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _mask(positions: Tensor, size: int) -> Tensor:
    """Return bool [T, size], true at the positions [T, n]."""
    mask = torch.zeros(len(positions), size, dtype=torch.bool, device=positions.device)
    return mask.scatter(1, positions, True)


def _check(condition: bool, field: str, value: object, valid: str) -> None:
    if not condition:
        raise ValueError(f"{field} is {value!r}; valid is {valid}")
