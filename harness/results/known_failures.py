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
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.base import toml
from harness.base.errors import UserError
from harness.base.processes import ROOT
from harness.problem.case import Case, DescriptorError
from harness.results.verdict import FAILED, Verdict

LEDGER = ROOT / "cases" / "ledger.toml"


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
        raise LedgerError(f"--ledger {path}: {', '.join(sorted(strange))}: every entry is a table [[known]]")
    return [_entry(f"--ledger {path}: entry {n}", entry) for n, entry in enumerate(table.get("known", []), 1)]


def _entry(where: str, table: dict[str, Any]) -> KnownFailure:
    valid = {f.name: f for f in fields(KnownFailure)}
    for name in table:
        if name not in valid:
            raise LedgerError(f"{where}: {name}: no such field; valid: {', '.join(valid)}")
    for name in ("backend", "cases", "says", "shows", "why"):
        if not table.get(name):
            raise LedgerError(f"{where} has no {name}")
    lists = {n: _strings(where, n, table[n]) for n in ("backend", "cases", "but", "devices") if n in table}
    texts = {n: v for n, v in table.items() if n not in lists}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise LedgerError(f"{where}: {name}={value!r}: must be text")
    entry = KnownFailure(**lists, **texts)  # type: ignore[arg-type]
    if entry.status not in FAILED:
        raise LedgerError(f"{where}: status={entry.status!r}; valid: {', '.join(FAILED)}")
    if bool(entry.issue) == bool(entry.found):
        raise LedgerError(f"{where}: needs either issue, the address of a public issue, or found, a date")
    if entry.issue and not entry.issue.startswith("https://"):
        raise LedgerError(f"{where}: issue={entry.issue!r}: must be an address, https://...")
    try:
        date.fromisoformat(entry.found or "2000-01-01")
        re.compile(entry.says)
        Case.parse(entry.shows)
    except (ValueError, re.error, DescriptorError) as error:
        raise LedgerError(f"{where}: found, says or shows: {error}") from error
    return entry


def _strings(where: str, name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(v, str) and v for v in texts):
        raise LedgerError(f"{where}: {name}={value!r}: must be text or a list of texts")
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
