"""Common properties of the wrong elements of an output: whole tokens, tiles, tails, a factor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.oracle.judge import Judgement

TILES = (128, 64, 32, 16)
EVERY_TOKEN = "every token is wrong"


@dataclass
class Places:
    """The wrong elements by token, column and expert."""

    wrong: Tensor  #: [T, K] bool
    rows: Tensor  #: [T] bool: the token has a wrong element
    columns: Tensor  #: [K] bool
    expert: Tensor  #: [T, k] local expert of every slot, -1 if not served here


def count(mask: Tensor) -> str:
    """ "3 of 16 (18.8%)": the number and the share of the true elements."""
    return f"{int(mask.sum())} of {mask.numel()} ({float(mask.double().mean()):.1%})" if mask.numel() else "0 of 0"


def runs(mask: Tensor) -> str:
    """True positions as ranges: "0-15, 32, 40-47, ..."."""
    places = torch.nonzero(mask).flatten().tolist()
    runs: list[list[int]] = []
    for p in places:
        if runs and p == runs[-1][1] + 1:
            runs[-1][1] = p
        else:
            runs.append([p, p])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(texts[:12]) + (f", ... ({len(runs)} runs)" if len(runs) > 12 else "")


def patterns(judgement: Judgement, places: Places) -> Iterator[str]:
    """Common properties of the wrong elements, the most telling first."""
    got, expected = judgement.got, judgement.expected
    assert got is not None and expected is not None
    got, expected, wrong = got.cpu(), expected.cpu(), places.wrong
    if not wrong.any():
        yield "no single element is off, but all together: a coherent or too frequent error (rounding, scale)"
        ratio = _factor(got, expected)
        if ratio is not None and abs(ratio - 1) > 1e-4:
            yield f"got is about {ratio:.5g} times expected"
        return
    unwritten = wrong & got.isnan() & ~expected.isnan()
    if unwritten.any():
        yield f"{count(unwritten)} of the outputs are NaN: never written (out was full of NaN), or NaN was read"
    positions = [*_row_patterns(places), *_column_patterns(places)]
    values = []
    if not unwritten.any() and bool((got[wrong] == 0).all()):
        values.append("every wrong output is zero")
    ratio = _factor(got[wrong], expected[wrong])
    if ratio is not None and ratio != 0:
        values.append(f"the wrong outputs are {ratio:.4g} times the expected ones")
    # A place tells more than a value, except "every token", which tells nothing yet.
    yield from values + positions if EVERY_TOKEN in positions else positions + values


def _factor(got: Tensor, expected: Tensor) -> float | None:
    """c if got = c * expected up to a relative error of 1 %, otherwise None."""
    finite = torch.isfinite(got) & torch.isfinite(expected)
    g, e = got[finite], expected[finite]
    power = (e**2).sum()
    if len(g) < 8 or power == 0:
        return None
    c = float((g * e).sum() / power)
    residual = ((g - c * e) ** 2).sum() / power
    return c if residual < 1e-4 * max(c * c, 1e-12) else None


def _row_patterns(places: Places) -> Iterator[str]:
    rows, tokens = places.rows, len(places.rows)
    if rows.all():
        yield EVERY_TOKEN
        return
    first = int(torch.nonzero(rows).flatten()[0])
    if rows[first:].all():
        yield f"all tokens from {first} on: a tail of the batch"
    order: dict[int, list[int]] = {}
    for token, experts in enumerate(places.expert.tolist()):
        for e in experts:
            if e >= 0:
                order.setdefault(e, []).append(token)
    for e, mine in order.items():
        if _same(rows, mine):
            yield f"all tokens of expert {e}, and only they: its weights, scales or rows"
    last = [mine[-1] for mine in order.values()]
    if _same(rows, last):
        yield "the last row of every expert: a tail mask"
    first_rows = [mine[0] for mine in order.values()]
    if _same(rows, first_rows):
        yield "the first row of every expert"
    for tile in TILES:
        tails = [t for mine in order.values() for t in mine[len(mine) // tile * tile :] if len(mine) > tile]
        if tails and _same(rows, tails):
            yield f"the rows behind the last full tile of {tile} of every expert: a tail of M"
    served = [t for t, experts in enumerate(places.expert.tolist()) if any(e >= 0 for e in experts)]
    unserved = sorted(set(range(tokens)) - set(served))
    if unserved and _same(rows, unserved):
        yield "the tokens without any valid slot: their rows must be zero"
    partly = [t for t, experts in enumerate(places.expert.tolist()) if any(e < 0 for e in experts)]
    if partly and _same(rows, partly):
        yield "the tokens with an invalid slot (id -1, or an expert of another rank)"


def _column_patterns(places: Places) -> Iterator[str]:
    columns = places.columns
    if columns.all():
        return
    indices = torch.nonzero(columns).flatten()
    first, last = int(indices[0]), int(indices[-1])
    if columns[first:].all():
        yield f"all columns from {first} on: a tail of N"
    for tile in TILES:
        if first % tile == 0 and (last + 1) % tile == 0 and columns[first : last + 1].all():
            yield f"whole column tiles of {tile}: columns {first} to {last}"
            return
    if columns[first::2].all() and not columns[first + 1 :: 2].any():
        yield "every other column: interleaved and packed halves mixed up"


def _same(rows: Tensor, tokens: list[int]) -> bool:
    return sorted(set(tokens)) == torch.nonzero(rows).flatten().tolist()
