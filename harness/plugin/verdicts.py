"""From an item to its verdict, and from the verdict to the outcome of the test."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from harness.backend import BackendError
from harness.base.time_limit import time_limit
from harness.device import DeviceLost
from harness.perf.timing.benchmark import judged
from harness.plugin.controller import VERDICT
from harness.plugin.items import ItemParams
from harness.plugin.process import Process, environment
from harness.results import known_failures
from harness.results.verdict import ENDS, Verdict
from harness.run.case import run_case
from harness.run.isolated import IsolatedRunner


def _verdict(asked: ItemParams, known: list[known_failures.KnownFailure], benchmark: Any) -> Verdict:
    if benchmark is not None:
        return judged(asked, benchmark)
    if any(entry.status in ENDS for entry in known):
        with IsolatedRunner(asked.spec, asked.device, forks=False) as apart:  # or what is known would end this process
            return replace(apart.run(asked.case), family=asked.family, backend=asked.backend.name)
    return run_case(asked.case, asked.backend, asked.device, family=asked.family)


def check_item(harness: Process, asked: ItemParams, item: pytest.Item, benchmark: Any) -> None:
    def found(verdict: Verdict) -> dict[str, Any]:
        verdict.spec = asked.spec
        return verdict.record() | {"environment": environment(asked.device), "nodeid": item.nodeid}

    blank = Verdict(str(asked.case), asked.backend.name, str(asked.device), "hung", asked.family)
    seconds = harness.config.option.case_timeout
    hung = found(replace(blank, reason=f"no answer in {seconds:g} s (--case-timeout)", seconds=seconds))
    harness.note(nodeid=item.nodeid, started=time.time(), record=hung)
    lost = ""
    known = known_failures.covering(harness.ledger, asked.case, asked.backend.name, str(asked.device))
    with time_limit(seconds, lambda: harness.end_process(hung), harness.stderr):
        try:
            verdict = _verdict(asked, known, benchmark)
            if verdict.status in ("failed", "crashed"):
                asked.device.synchronize()  # was it this case's answer, or has the device been lost?
            verdict = known_failures.judged(verdict, known)
        except BackendError as error:
            verdict = replace(blank, status="crashed", reason=str(error))
        except DeviceLost as error:
            lost = str(error)
            verdict = replace(blank, status="crashed", reason=lost)
    record = found(verdict)
    if lost:
        if not harness.controller:
            harness.end_process(record)
        harness.controller.lost = (
            f"{lost}. No result after {asked.case} would mean anything in this process; "
            "with pytest-xdist, -n 1 goes on in a new one."
        )
    item.user_properties.append((VERDICT, json.dumps(record, default=str)))
    if verdict.status == "unsupported":
        pytest.skip(verdict.reason)
    elif verdict.status == "known":
        pytest.xfail(verdict.known)
    elif not verdict.green:
        told = [verdict.report.rstrip() or verdict.reason]
        if not told[0].endswith(record["reproduce"]):
            told.append(record["reproduce"])
        pytest.fail("\n".join(told), pytrace=False)
