"""Property fuzzing: any Problem of the grammar, sizes at the edges of tiles, within a budget of bytes and seconds.

Hypothesis draws cases and shrinks a failing one to the smallest descriptor that still fails; each case is judged in an
isolated process (run/isolated.py). Cases that a backend declares unsupported are not counted.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from harness.base.minimal import FAR, find_minimal, place
from harness.inputs.sizes import batch_bytes, weight_bytes
from harness.problem.case import ACTIVATIONS, DTYPES, LAYOUTS, ROUTINGS, Case, ExpertParallel, Problem, Quant
from harness.problem.exactness import inexact
from harness.results.verdict import Verdict
from harness.run.isolated import IsolatedRunner
from reference.scheme import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES, code_formats

SHRINKS, SHRINKING = 400, 120  #: cases, and seconds, to shrink a failure
ENDLESS = 1_000_000  #: examples, when only the seconds are limited
WORK = 64  #: multiplications of a case that count as one byte of the budget: the oracle computes each in float64
SCHEMES = tuple(
    Quant.parse(".".join(names))
    for names in product(code_formats(), WEIGHT_GRANULARITIES, ("none", *ACTIVATION_GRANULARITIES))
)
INEXACT_FILLS = ("random", "random", "extreme")
FILLS = (*["exact"] * 5, *INEXACT_FILLS)
LIMITS = [128.0, 256.0, 7.0, 2.0, 0.5]
#: Cheap scenarios that hold for every problem, or are Unsupported; those of PARTIAL only on an inexact fill.
SCENARIOS = (
    "repeat.bits", "repeat.leak", "batch.sizes", "batch.routings", "path.launches", "win.no_extra_tensor",
    "swap.copy_", "swap.data", "swap.parameter", "swap.same_address", "swap.two_layers", "swap.expert_map",
    "scratch.reuse", "scratch.pointers", "scratch.interleaved", "scratch.sizes", "scratch.ids",
)  # fmt: skip
PARTIAL = ("swap.w2", "swap.scales", "swap.bias")


def edges(*multiples: int, also: Sequence[int] = ()) -> tuple[int, ...]:
    """The multiples and their neighbours, and the numbers `also`, ascending: a failure shrinks towards the first."""
    return tuple(sorted({n + d for n in multiples for d in (-1, 0, 1) if n + d > 0} | set(also)))


TILES = (16, 32, 64, 128, 256, 512, 1024, 2048)
WIDTHS = edges(*TILES, 384, 4096, also=(8, 24, 40, 48, 56, 72, 80, 96, 101, 112, 136, 144, 160, 192, 320, 521))
#: The least hidden and intermediate sizes: narrower rows have no exact fill, and too few values for statistics.
HIDDEN, INNER = 32, 8


@dataclass(frozen=True)
class Space:
    """The values to draw a Case from; sizes ascend."""

    tokens: tuple[int, ...] = edges(*TILES, also=(0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 23, 47, 97, 193))
    hidden: tuple[int, ...] = tuple(n for n in WIDTHS if n >= HIDDEN)
    inner: tuple[int, ...] = tuple(n for n in WIDTHS if n >= INNER)
    experts: tuple[int, ...] = edges(4, 8, 16, 32, 64, 128, also=(1, 2, 6, 12, 24, 48, 100, 256, 300, 512))
    top_k: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 16)
    scenarios: tuple[str, ...] = SCENARIOS
    once: bool = True  #: mostly single calls; False: scenarios alone


#: Problems for sequences of many calls: the mixture matters there, not the sizes.
SEQUENCES = Space(
    tokens=(1, 2, 3, 5, 9, 17, 20), hidden=(48, 64, 80, 136), inner=(32, 40, 64, 72), experts=(2, 3, 4, 8, 16, 24),
    top_k=(1, 2, 3), scenarios=("sequence.calls",), once=False,
)  # fmt: skip


def counted(problem: Problem) -> int:
    """Bytes that a problem counts as: of its weights and batch, or the equivalent of its multiplications (WORK)."""
    pairs = problem.tokens * (problem.top_k + problem.shared_experts)
    work = pairs * (problem.w13_rows + problem.intermediate_size) * problem.hidden_size // WORK
    return max(weight_bytes(problem) + batch_bytes(problem), work)


def cases(space: Space, most: int) -> Any:
    """The strategy of Cases of at most `most` bytes. Shrinks towards small sizes and towards the first options."""
    from hypothesis import strategies

    @strategies.composite
    def case(draw: Callable[[Any], Any]) -> Case:
        def one(options: Sequence[Any]) -> Any:
            return options[draw(place(len(options))) - FAR]

        def fitting(name: str, options: tuple[int, ...]) -> Problem:
            """The problem with one of the sizes that keep it within `most` bytes, or with the smallest."""

            def sized(n: int) -> Problem:
                change: dict[str, Any] = {name: n}
                return replace(problem, **change)

            fits = bisect_right(options, most, key=lambda n: counted(sized(n)))
            return sized(one(options[: max(1, fits)]))

        # Always the same number of choices: one that changes while shrinking must not change what the others mean.
        dtype, experts = one(DTYPES), one(space.experts)
        top_k = one([k for k in space.top_k if k <= experts])
        quant, activation, limit = (
            one([None] * len(SCHEMES) + list(SCHEMES)),
            one(ACTIVATIONS),
            one([None] * 12 + LIMITS),
        )
        ranks = one([0] * 5 + [n for n in (2, 1, 3, 4, 8, 16) if experts % n == 0])
        rank, strided, on_input = one(range(16)), one([False, True]), one([False, True])
        routing = one(["uniform", *ROUTINGS, "remote"])
        problem = Problem(  # its sizes leave room for others than the smallest
            4, 1, 32, experts, top_k, dtype, quant if dtype != "fp32" else None, activation,
            limit=limit if activation != "relu2" else None,
            bias=one([False, True]),
            router_weight_on_input=on_input and top_k == 1,
            layout=one(LAYOUTS),
            ep=ExpertParallel(ranks, rank % ranks, strided) if ranks else None,
            shared_experts=one([0, 0, 0, 0, 1, 2]),
            ids=one([32, 64]),
            padded=one([False, True]),
            routing=routing if routing != "remote" or ranks > 1 else "half",
        )  # fmt: skip
        problem = fitting("hidden_size", space.hidden)
        problem = fitting("intermediate_size", space.inner)
        problem = fitting("tokens", space.tokens)
        fill = one(FILLS if inexact(problem) is None else INEXACT_FILLS)
        partial = PARTIAL if space.once and fill != "exact" else ()
        once = ("once",) * 60 if space.once else ()
        return Case(problem, fill, one(range(16)), one((*once, *space.scenarios, *partial)))

    return case()


@dataclass
class Fuzzed:
    """The result of a search."""

    found: Verdict | None = None  #: of the smallest case that fails
    every_time: bool = True  #: it failed once more in a new process
    ran: Counter[str] = field(default_factory=Counter)  #: fills, dtypes and schemes of the cases that ran
    cases: int = 0  #: that ran until the first that failed, or until the end
    shrinking: int = 0  #: that ran after it
    refused: Counter[str] = field(default_factory=Counter)  #: unsupported, by keyword
    mistrusted: int = 0
    seconds: float = 0.0


class _Enough(Exception):
    """The budget is used up."""


def fuzz(
    runner: IsolatedRunner, space: Space, *, seed: int, seconds: float, most: int, examples: int | None = None,
    progress: Callable[[Fuzzed, Case], None] = lambda fuzzed, case: None,
) -> Fuzzed:  # fmt: skip
    """Run cases of at most `most` bytes each until one fails, or for this many seconds or (if not None) examples.

    progress: called before each case.
    """
    fuzzed = Fuzzed()
    started = time.monotonic()
    shrink_until = float("inf")

    def ask(case: Case) -> Verdict | None:
        nonlocal shrink_until
        now = time.monotonic()
        if fuzzed.found is None and (now > started + seconds or fuzzed.cases == examples):
            raise _Enough
        if now > shrink_until:
            return None
        progress(fuzzed, case)
        verdict = runner.run(case)
        if verdict.status == "unsupported":
            fuzzed.refused[verdict.reason.partition(":")[0]] += 1
            return None
        if fuzzed.found is not None:
            fuzzed.shrinking += 1
        else:
            _count(fuzzed, case, verdict)
        if verdict.green:
            return None
        if fuzzed.found is None:
            fuzzed.found, shrink_until = verdict, time.monotonic() + SHRINKING
        return verdict

    try:
        if shrunk := find_minimal(cases(space, most), ask, seed=seed, examples=ENDLESS, shrinks=SHRINKS):
            case, verdict = shrunk
            again = runner.run_fresh(case)  # a process diagnoses only its first failures
            fuzzed.found, fuzzed.every_time = (verdict, False) if again.green else (again, True)
    except _Enough:
        pass
    fuzzed.seconds = time.monotonic() - started
    return fuzzed


def _count(fuzzed: Fuzzed, case: Case, verdict: Verdict) -> None:
    fuzzed.cases += 1
    fuzzed.mistrusted += verdict.status == "mistrusted"
    fuzzed.ran[case.fill] += 1
    fuzzed.ran[case.problem.dtype] += 1
    fuzzed.ran["fp8" if case.problem.quant else "unquantized"] += 1


def home(case: Case) -> str:
    """The file of cases/ to which a case belongs."""
    problem, kind = case.problem, case.scenario.partition(".")[0]
    kinds = {"swap": "weight_swap", "scratch": "scratch", "sequence": "sequences", "win": "router_weight_on_input"}
    if kind in kinds:
        family = kinds[kind]
    elif problem.router_weight_on_input:
        family = "router_weight_on_input"
    elif problem.ep is None and 0 < 4 * problem.tokens * problem.top_k <= problem.num_experts:
        family = "low_latency"
    elif problem.quant and problem.layout == "kn":
        family = "fp8_transpose"
    else:
        family = "layers"
    return f"cases/test_{family}.py"
