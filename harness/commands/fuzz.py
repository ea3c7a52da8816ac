"""moe-harness fuzz: random problems of the grammar on one backend, until one fails or the time is used up."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable
from typing import Any

from harness.base.arguments import MOST_SEED, integer, positive_seconds, seconds
from harness.base.errors import UserError
from harness.base.text import inert, shortened
from harness.device import DEVICES, ready
from harness.results.verdict import REASON, REPORT

SIZES = {"K": 2**10, "M": 2**20, "G": 2**30}
ON_CPU, ON_GPU = "1M", "256M"  #: bytes of weights and batch that one problem may take


def register(add: Callable[..., Any]) -> None:
    """Declares the command's arguments."""
    sub = add(fuzz, "fuzz", "Random problems, at the edges of tiles and formats; a failure is shrunk.")
    sub.add_argument("--backend", metavar="SPEC", required=True, help="a backend's name, or package.module:object")
    sub.add_argument("--device", choices=DEVICES, default="cpu", help="where (cpu)")
    sub.add_argument(
        "--seconds", type=positive_seconds, default=60, metavar="N", help="how long (60); shrinking is not included"
    )
    sub.add_argument("--examples", type=integer(1), metavar="N", help="at most so many problems")
    sub.add_argument(
        "--bytes",
        type=_bytes,
        metavar="SIZE",
        help=f"most bytes of a problem's weights and batch ({ON_GPU}; on the cpu {ON_CPU})",
    )
    sub.add_argument("--case-timeout", type=seconds, default=120, metavar="SECONDS", help="of the backend (120)")
    sub.add_argument(
        "--seed", type=integer(0, MOST_SEED), metavar="N", help="the same problems again (random, and printed)"
    )
    sub.add_argument("--sequences", action="store_true", help="small problems, each with sequences of calls")


def fuzz(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from harness import backend as backends
    from harness.base.minimal import missing

    if reason := missing():
        raise UserError(f"fuzz: {reason}")
    device = ready(args.device)
    backend = backends.load(args.backend)
    if reason := backends.unavailable(backend, device):
        raise UserError(f"--backend {args.backend} on {device}: {reason.partition(': ')[2]}")

    from harness.run.fuzz import SEQUENCES, Space
    from harness.run.fuzz import fuzz as search
    from harness.run.isolated import IsolatedRunner, RunnerError

    most = args.bytes or _bytes(ON_CPU if device.on_cpu else ON_GPU)
    seed = args.seed if args.seed is not None else secrets.randbelow(2**32)
    again = f"python3 -m harness fuzz --backend {args.backend} --device {device.name} --seed {seed} --bytes {most}"
    again += " --sequences" if args.sequences else ""
    print(f"moe-harness: {backend.name} on {device}, seed {seed}", flush=True)
    try:
        with IsolatedRunner(args.backend, device, args.case_timeout) as runner:
            result = search(
                runner, SEQUENCES if args.sequences else Space(), seed=seed, seconds=args.seconds, most=most,
                examples=args.examples, progress=_progress,
            )  # fmt: skip
    except RunnerError as error:
        raise UserError(f"--backend {args.backend}: {str(error).splitlines()[-1]}") from error
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print("\n".join(_count_lines(result)))
    if result.found is None:
        if result.cases:
            print("nothing found")
            return 0
        print(f"nothing ran: {backend.name} supports none of these problems, or --seconds was too short")
        return 1
    print("\n".join(map(inert, _failure_lines(result, again))))
    return 1


def _bytes(text: str) -> int:
    unit = SIZES.get(text[-1:].upper())
    try:
        return integer(1)(text[:-1] if unit else text) * (unit or 1)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or of {', '.join(SIZES)} as in 256M") from error


def _progress(result: Any, case: Any) -> None:
    if sys.stderr.isatty():
        state = f"shrinking {result.shrinking}" if result.found else f"{result.cases} ran"
        print(f"\r\033[K{state}  {str(case)[:100]}", end="", file=sys.stderr, flush=True)


def _count_lines(result: Any) -> list[str]:
    def counts(counter: Any) -> str:
        return ", ".join(f"{n} {name}" for name, n in counter.most_common())

    refused = sum(result.refused.values())
    lines = [
        f"{result.cases} problems in {result.seconds:.0f} s ({result.cases / max(result.seconds, 1e-9):.1f} a second)"
    ]
    lines += [f"  of these     {counts(result.ran)}"] if result.ran else []
    lines += [f"  mistrusted   {result.mistrusted}"] if result.mistrusted else []
    lines += [f"  unsupported  {refused}, not counted: {counts(result.refused)}"] if refused else []
    return lines


def _failure_lines(result: Any, again: str) -> list[str]:
    from harness.problem.case import Case
    from harness.run.fuzz import home

    verdict = result.found
    unrepeated = "it passed in a new process: the failure depends on the cases before it"
    return [
        "",
        f"{verdict.case} {verdict.status}: {shortened(verdict.reason, REASON)}",
        *shortened(verdict.details, REPORT, REPORT // 4).splitlines(),
        *([] if result.every_time else [unrepeated]),
        "",
        f"found after {result.cases} problems, shrunk with {result.shrinking} more; to run this one again:",
        f"  {verdict.reproduce}",
        "to run all of them again:",
        f"  {again} --examples {result.cases}",
        f"to keep it, one line of ROWS in {home(Case.parse(verdict.case))}:",
        f'  "{verdict.case}": "WHY: what went wrong here, and where it was seen",',
    ]
