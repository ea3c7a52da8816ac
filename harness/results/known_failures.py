"""Known failures of kernels that others ship (cases/ledger.toml): a red verdict is then a new failure.

An entry names the cases of a backend that fail, how they fail, and where that was reported:

    [[known]]
    backend = "vllm-triton"                      # or a list
    cases = ["*-e4m3.tensor.*-ep*"]              # globs of descriptors; "but" takes some out again
    status = "failed"                            # failed (if left out), crashed or hung
    says = "a2 scale"                            # a regular expression for the verdict's reason
    issue = "https://github.com/vllm-project/vllm/issues/1"     # or: found = "2026-11-23", if not reported yet
    shows = "t16-h256-i128-e8-k2-bf16-e4m3.tensor.tensor-ep0of2-random"    # the smallest that shows it
    why = "amax over rows that no kernel wrote"

devices, a list, restricts an entry to some. sometimes = "reason" admits that such a case may also pass.

A known failure still runs. It becomes the verdict "known" if it fails as described, stays red if it fails in another
way, and is red if it passes, so that the entry is removed. A known crash or hang runs isolated, in its own process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.base import toml
from harness.base.errors import UserError, bare, shown
from harness.base.processes import ROOT
from harness.base.suggest import did_you_mean
from harness.problem.case import Case
from harness.results.verdict import FAILED, Verdict

LEDGER = ROOT / "cases" / "ledger.toml"
DEVICES = ("cpu", "cuda", "xpu")
LONGEST = 1000  #: characters of an expression


class LedgerError(UserError):
    """A file of known failures cannot be used; the message names the file, the entry, the field and what is valid."""


@dataclass(frozen=True)
class KnownFailure:
    """One entry; the fields are those of the file."""

    backend: tuple[str, ...]
    cases: tuple[str, ...]
    says: str
    shows: str
    why: str
    issue: str = ""
    found: str = ""
    status: str = "failed"
    but: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    sometimes: str = ""

    @property
    def source(self) -> str:
        """The issue, or the date on which it was found here."""
        return self.issue or f"found here {self.found}"

    def covers(self, case: str, backend: str, device: str) -> bool:
        """Whether the entry is about a case (its descriptor) on a backend and a device ("xpu", "xpu (emulated)")."""
        return (
            backend in self.backend
            and (not self.devices or device.split()[0] in self.devices)
            and any(fnmatchcase(case, glob) for glob in self.cases)
            and not any(fnmatchcase(case, glob) for glob in self.but)
        )

    def explains(self, verdict: Verdict) -> bool:
        """Whether a red verdict fails as the entry describes."""
        return verdict.status == self.status and re.search(self.says, verdict.reason) is not None


def read(path: Path | None = None) -> list[KnownFailure]:
    """The entries of a file of known failures (cases/ledger.toml). LedgerError: it cannot be used."""
    path = path or LEDGER
    table = toml.read(path, LedgerError, f"--ledger {path}")
    if strange := set(table) - {"known"}:
        raise LedgerError(f"--ledger {path}: {bare(min(strange))}: every entry is a table [[known]]")
    entries = table.get("known", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise LedgerError(f"--ledger {path}: known={shown(entries)}: every entry is a table [[known]]")
    return [_entry(f"--ledger {path}: entry {n}", entry) for n, entry in enumerate(entries, 1)]


def _entry(where: str, table: dict[str, Any]) -> KnownFailure:
    valid = {f.name: f for f in fields(KnownFailure)}
    for name in table:
        if name not in valid:
            raise LedgerError(
                f"{where}: {bare(name)}: no such field{did_you_mean(name, valid)}; valid: {', '.join(valid)}"
            )
    for name in ("backend", "cases", "says", "shows", "why"):
        if not table.get(name):
            raise LedgerError(f"{where} has no {name}")
    lists = {n: _strings(where, n, table[n]) for n in ("backend", "cases", "but", "devices") if n in table}
    texts = {n: v for n, v in table.items() if n not in lists}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise LedgerError(f"{where}: {name}={shown(value)}: must be text")
    entry = KnownFailure(**lists, **texts)  # type: ignore[arg-type]
    if entry.status not in FAILED:
        raise LedgerError(f"{where}: status={shown(entry.status)}; valid: {', '.join(FAILED)}")
    if strange := set(entry.devices) - set(DEVICES):
        valid_devices = f"{did_you_mean(min(strange), DEVICES)}; valid: {', '.join(DEVICES)}"
        raise LedgerError(f"{where}: devices={shown(min(strange))}{valid_devices}")
    if bool(entry.issue) == bool(entry.found):
        raise LedgerError(f"{where}: needs either issue, the address of a public issue, or found, a date")
    if entry.issue and not entry.issue.startswith("https://"):
        raise LedgerError(f"{where}: issue={shown(entry.issue)}: must be an address, https://...")
    _check(where, "found", date.fromisoformat, entry.found or "2000-01-01", "a date, such as 2026-11-23")
    _check(where, "says", re.compile, entry.says, "a regular expression")
    _check(where, "shows", Case.parse, entry.shows, "a descriptor")
    return entry


def _check(where: str, name: str, parse: Callable[[str], object], text: str, valid: str) -> None:
    try:
        if len(text) > LONGEST:
            raise ValueError(f"{len(text)} characters, at most {LONGEST}")
        parse(text)
    except (ValueError, re.error, OverflowError, RecursionError) as error:
        raise LedgerError(f"{where}: {name}={shown(text)}: must be {valid}: {error}") from error


def _strings(where: str, name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(v, str) and v for v in texts):
        raise LedgerError(f"{where}: {name}={shown(value)}: must be text or a list of texts")
    return tuple(texts)


def covering(entries: Iterable[KnownFailure], case: Case, backend: str, device: str) -> list[KnownFailure]:
    """The entries about one case."""
    return [entry for entry in entries if entry.covers(str(case), backend, device)]


def explanation(verdict: Verdict, about: list[KnownFailure]) -> str:
    """Why a red verdict is known; "" if no entry describes a failure like it."""
    return next((f"{entry.why} ({entry.source})" for entry in about if entry.explains(verdict)), "")


def judged(verdict: Verdict, about: list[KnownFailure]) -> Verdict:
    """Apply the entries about its case to a verdict, in place: a known failure turns "known", a pass turns "failed"."""
    if not about or verdict.status == "unsupported":
        return verdict
    if verdict.status in FAILED:
        verdict.known = explanation(verdict, about)
        if verdict.known:
            verdict.status = "known"
            return verdict
        entries = "; ".join(f"{entry.status}, {entry.says!r}" for entry in about)
        verdict.report += f"\nThe ledger knows this case to fail, but otherwise: {entries}\n"
        return verdict
    if any(entry.sometimes for entry in about):
        return verdict
    verdict.reason = (
        f"it {verdict.status}, but the ledger knows it to fail ({about[0].source}: {about[0].why}): "
        "if it is mended, take the entry out of the ledger"
    )
    verdict.status = "failed"
    return verdict
