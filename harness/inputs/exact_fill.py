"""The exact fill: inputs for which every correct kernel gives the same bits, in any accumulation order.

Idea: let every partial sum be a small integer times a power of two, and let the gate saturate, so that no step rounds.

x       entries +-1. The columns of W1 come in a few sign signatures; in every signature class x has as many +1 as -1,
        but for one or three classes that lack one entry. So each row of W1, which is one of a few sign patterns V_q,
        has x . V_q = +-1 or +-3, though nearly every column is nonzero: drop one and the result shows.
        Every fourth token is a ramp: its products are +1 over the first half of K and -1 over the second, so that an
        accumulator of less than float32 overflows its integers on the way.
gate    16 x . V_q + 112 if the row is on for the token's class, - 192 if it is off (class columns of x are one-hot):
        silu, gelu and tanh-gelu return the gate itself (>= 64: also in float64) or zero (<= -144: also in float32).
a       gate * up = 32 * {2..5} * {1, 3}: at most four significant bits, exact in bf16, fp16 and e4m3.
W2      +-1 on so few rows that the sum over I and top_k fits in the eight bits of bf16; router weights are 1/2 or 1.
codes   scales are powers of two. Dynamic scales are made so: each block of a row of x that shares a scale (1x128, say)
        holds +m*2^j and -m*2^j, m being the largest code (448 in e4m3), whose contributions cancel; each such block of
        rows of I holds one whose activation is m*2^j for every token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.problem.case import Problem
from harness.problem.exactness import GATE, OFF, ON, UNIT, forced_gate, pair_weight
from reference.scheme import Format, power_of_two_above


@dataclass
class SignPatterns:
    """What x and the weights of one layer have in common: which columns of K play which part."""

    free: Tensor  #: [F] columns that carry the sign patterns
    signature: Tensor  #: [F] class of each free column
    patterns: Tensor  #: [R, F] the patterns V_q, +-1
    classes: Tensor  #: [2] one-hot token-class columns ([0] for an activation without gate)
    amax: list[Tensor]  #: per block of columns that shares a scale, the pair of columns that fixes its dynamic scale
    wide: bool  #: whether sums may be +-3 as well as +-1


def sign_patterns(problem: Problem, seed: int, device: torch.device) -> SignPatterns:
    """Draw the sign patterns of a layer: the same for every batch and every call with this seed."""
    rng = torch.Generator().manual_seed(seed * 7919 + problem.hidden_size)
    hidden = problem.hidden_size
    amax: list[Tensor] = []
    taken = torch.zeros(hidden, dtype=torch.bool)
    if problem.quant and problem.quant.dynamic:
        for start, size in _blocks(problem, hidden):
            columns = start + torch.randperm(size, generator=rng)[:2]
            taken[columns] = True
            amax.append(columns.to(device))
    others = torch.nonzero(~taken).flatten()
    classes = others[torch.randperm(len(others), generator=rng)[: 2 if problem.gated else 0]]
    taken[classes] = True
    free = torch.nonzero(~taken).flatten()
    bits = 5 if len(free) >= 128 else 3
    half = len(free) // 2
    first = (torch.arange(half) % 2**bits)[torch.randperm(half, generator=rng)]
    # The second half of K repeats the classes of the first, so that a ramp is balanced in every class.
    second = first[torch.randperm(half, generator=rng)]
    signature = torch.cat([first, second, torch.randint(2**bits, (len(free) % 2,), generator=rng)])
    patterns = ((signature[None] >> torch.arange(bits)[:, None]) & 1) * 2 - 1
    on_input = problem.router_weight_on_input
    wide = not problem.bias and problem.top_k + problem.shared_experts <= 2 and not on_input
    return SignPatterns(
        free.to(device), signature.to(device), patterns.to(device, torch.float32), classes.to(device), amax, wide
    )  # fmt: skip


def hidden_states(problem: Problem, s: SignPatterns, rng: torch.Generator) -> Tensor:
    """[T, K] float32."""
    tokens, device = problem.tokens, s.free.device
    x = torch.zeros(tokens, problem.hidden_size, device=device)
    if not tokens:
        return x

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device)

    def pick(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=rng, device=device)

    # Sort the columns by class in a random order within each: alternating signs then balance every class.
    order = (s.signature + rand(tokens, len(s.free)) * 0.999).argsort(1)
    ranked = s.signature.sort().values
    start = torch.searchsorted(ranked, ranked)
    count = torch.searchsorted(ranked, ranked, right=True) - start
    place = torch.arange(len(ranked), device=device) - start
    alternating = (1 - 2 * (place % 2)).float()
    alternating[(count % 2 == 1) & (place == count - 1)] = 0
    signs = torch.zeros(tokens, len(s.free), device=device).scatter_(1, order, alternating.expand(tokens, -1))

    ramp = torch.arange(tokens, device=device) % 4 == 3
    half = len(s.free) // 2
    slope = torch.ones(len(s.free), device=device)
    slope[half:] = -1
    slope[2 * half :] = 0
    signs[ramp] = s.patterns[pick(len(s.patterns), int(ramp.sum()))] * slope

    # Take one entry out of one class (all sums become +-1), or of three (+-1 and +-3).
    present = s.signature.unique()
    chosen = present[rand(tokens, len(present)).argsort(1)[:, :3]]
    three = (
        (rand(tokens) < 0.5) if s.wide and len(present) >= 3 else torch.zeros(tokens, dtype=torch.bool, device=device)
    )
    for j in range(min(3, chosen.shape[1])):
        keys = rand(tokens, len(s.free)) + 1
        keys[(s.signature[None] != chosen[:, j : j + 1]) | (signs == 0)] = 0
        column = keys.argmax(1)
        hit = (keys.max(1).values > 0) & (three | (j == 0))
        signs[hit, column[hit]] = 0
    x[:, s.free] = signs
    if len(s.classes):
        x[torch.arange(tokens, device=device), s.classes[pick(len(s.classes), tokens)]] = 1
    for pair in s.amax:
        largest = _dynamic_codes(problem).max * 2.0 ** pick(3, tokens).float()
        x[:, pair[0]] = largest
        if len(pair) == 2:
            x[:, pair[1]] = -largest
    return x


def _dynamic_codes(problem: Problem) -> Format:
    assert problem.quant is not None and problem.quant.dynamic is not None
    return problem.quant.dynamic.codes


def _blocks(problem: Problem, size: int) -> list[tuple[int, int]]:
    """(start, length) of blocks of which each holds an amax: those that share a scale; 128 where all of a row do."""
    assert problem.quant is not None and problem.quant.dynamic is not None
    block = problem.quant.dynamic.granularity.columns or 128
    return [(start, min(block, size - start)) for start in range(0, size, block)]


def router_weights(problem: Problem, rng: torch.Generator, device: torch.device) -> Tensor:
    """[T, k] float32: 1/2 or 1; on input 1 or 2, so that the gate stays saturated."""
    low = 1.0 if problem.router_weight_on_input else 0.5
    return low * (1 + torch.randint(2, (problem.tokens, problem.top_k), generator=rng, device=device).float())


def terms_per_class(problem: Problem, wide: bool) -> int:
    """How many rows of one class an output may add up, so that the sum over top_k has eight bits."""
    gate, up = (5, 3) if wide or problem.bias else (4, 1)
    if problem.activation == "swigluoai":
        up += 1
    largest = (9 if wide or problem.bias else 1) if not problem.gated else gate * up
    if problem.router_weight_on_input:
        largest *= 4
    slots = problem.top_k + problem.shared_experts
    return max(1, (256 // (2 * slots) - int(problem.bias)) // largest)


def static_scales(problem: Problem) -> tuple[float, float]:
    """Powers of two under which x and a stay below the largest code."""
    assert problem.quant is not None and problem.quant.activations is not None
    largest = 15 * UNIT * (4 if problem.router_weight_on_input else 1)
    return 0.5, power_of_two_above(largest / problem.quant.activations.codes.max)


def expert_weights(problem: Problem, s: SignPatterns, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One expert's real-valued w13 [2I, K] ([I, K] ungated; swigluoai interleaved) and w2 [K, I], float32."""
    inter, hidden, device = problem.intermediate_size, problem.hidden_size, s.free.device

    def pick(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=rng, device=device)

    def signed_patterns() -> Tensor:
        rows = torch.zeros(inter, hidden, device=device)
        rows[:, s.free] = s.patterns[pick(len(s.patterns), inter)] * (2.0 * pick(2, inter, 1) - 1)
        for pair in s.amax:
            rows[:, pair] = (pair_weight(problem.quant) if len(pair) == 2 else 0.0) * (2.0 * pick(2, inter, 1) - 1)
        return rows

    up = signed_patterns()
    on_class = pick(2, inter) if problem.gated else torch.zeros(inter, dtype=torch.long, device=device)
    forced = torch.zeros(inter, dtype=torch.bool, device=device)
    if problem.gated:
        gate = GATE * signed_patterns()
        for c, column in enumerate(s.classes):
            gate[:, column] = torch.where(on_class == c, float(ON), float(OFF))
        if s.amax:  # dynamic activation scales: one row of each block reaches the largest code * 2^j for every token
            for start, size in _blocks(problem, inter):
                row = start + int(pick(size, 1))
                forced[row] = True
                gate[row], up[row] = 0.0, 0.0
                for column in s.classes:
                    gate[row, column] = forced_gate(_dynamic_codes(problem))
                    if problem.activation == "swigluoai":
                        up[row, column] = 7.0
                    else:
                        up[row, column] = 8.0 * 2.0 ** int(pick(2, 1))  # 896 at least: others reach 480
        if problem.activation == "swigluoai":
            w13 = torch.stack([gate, up], 1).reshape(2 * inter, hidden)
        else:
            w13 = torch.cat([gate, up])
    else:
        w13 = 4 * up

    w2 = torch.zeros(hidden, inter, device=device)
    terms = terms_per_class(problem, s.wide)
    for c in range(2 if problem.gated else 1):
        rows = torch.nonzero((on_class == c) & ~forced).flatten()
        if len(rows):
            columns = rows[pick(len(rows), hidden, terms)]
            w2.scatter_(1, columns, 2.0 * pick(2, hidden, terms) - 1)
    if forced.any():  # an output of its own for some of the rows that fix the scale: they alone fill its eight bits
        rows = torch.nonzero(forced).flatten()
        outputs = torch.randperm(hidden, generator=rng, device=device)[: max(1, hidden // 8)]
        w2[outputs] = 0
        share = 0.25 if problem.top_k + problem.shared_experts <= 8 else 0.125
        w2[outputs, rows[pick(len(rows), len(outputs))]] = share * (2.0 * pick(2, len(outputs)) - 1)
    return w13, w2


def expert_biases(problem: Problem, rng: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """One expert's w13_bias [2I] ([I]) and w2_bias [K], float32."""
    inter = problem.intermediate_size

    def pick(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=rng, device=device).float()

    w2_bias = (UNIT if problem.gated else UNIT / 2) * (pick(3, problem.hidden_size) - 1)
    if not problem.gated:
        return 8 * pick(2, inter), w2_bias
    # A weighted input makes gates of up to four bits already: another addend there would need a fifth.
    quantized = problem.quant is not None and problem.quant.activation is not None
    gate = torch.zeros(inter, device=device) if quantized and problem.router_weight_on_input else UNIT * pick(2, inter)
    up = 2 * (pick(3, inter) - 1)
    if problem.activation == "swigluoai":
        return torch.stack([gate, up], 1).reshape(-1), w2_bias
    return torch.cat([gate, up]), w2_bias


def forced_rows(w13: Tensor, s: SignPatterns) -> Tensor:
    """Rows of w13 (and their partners) that carry no sign pattern: they fix a dynamic scale and take no bias."""
    return (w13[:, s.free] == 0).all(1)
