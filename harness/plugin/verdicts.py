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
from harness.perf.timing.benchmark import run_timed
from harness.plugin.controller import VERDICT
from harness.plugin.items import ItemParams
from harness.plugin.process import Process, environment
from harness.results import known_failures
from harness.results.known_failures import KnownFailure
from harness.results.verdict import ENDS, FAILED, Verdict
from harness.run.case import run_case
from harness.run.isolated import IsolatedRunner


def _verdict(params: ItemParams, known: list[KnownFailure], benchmark: Any) -> Verdict:
    if benchmark is not None:
        return run_timed(params, benchmark)
    if any(entry.status in ENDS for entry in known):
        with IsolatedRunner(params.spec, params.device, forks=False) as runner:  # the known failure would end ours
            return replace(runner.run(params.case), family=params.family, backend=params.backend.name)
    return run_case(params.case, params.backend, params.device, params.family, params.spec)


def check_item(process: Process, params: ItemParams, node: pytest.Item, benchmark: Any) -> None:
    """Run one item: its verdict goes into the report's user_properties, and becomes the outcome of the test.

    benchmark: pytest-benchmark's fixture, or None; with it, a case that passes is timed as well.
    """

    def record_of(verdict: Verdict) -> dict[str, Any]:
        return verdict.record() | {"environment": environment(params.device), "nodeid": node.nodeid}

    blank = Verdict(str(params.case), params.backend.name, str(params.device), "hung", params.family, spec=params.spec)
    seconds = process.config.option.case_timeout
    hung = record_of(replace(blank, reason=f"no answer in {seconds:g} s (--case-timeout)", seconds=seconds))
    process.note(nodeid=node.nodeid, started=time.time(), record=hung)
    lost = ""
    known = known_failures.covering(process.known_failures, params.case, params.backend.name, str(params.device))
    with time_limit(seconds, lambda: process.end_process(hung), process.stderr):
        try:
            verdict = _verdict(params, known, benchmark)
            if verdict.status in FAILED:
                params.device.synchronize()  # raises DeviceLost if the failure took the device with it
            verdict = known_failures.judged(verdict, known)
        except BackendError as error:
            verdict = replace(blank, status="crashed", reason=str(error), error_type=type(error).__name__)
        except DeviceLost as error:
            lost = str(error)
            verdict = replace(blank, status="crashed", reason=lost, error_type="DeviceLost", device_lost=True)
    record = record_of(verdict)
    if lost:
        if not process.controller:
            process.end_process(record)
        process.controller.lost = (
            f"{lost}. No result after {params.case} would mean anything in this process; "
            "with pytest-xdist, -n 1 goes on in a new one."
        )
    node.user_properties.append((VERDICT, json.dumps(record, default=str)))
    if verdict.status == "unsupported":
        pytest.skip(verdict.reason)
    elif verdict.status == "known":
        pytest.xfail(verdict.known)
    elif not verdict.green:
        text = verdict.report.rstrip() or verdict.reason
        if not text.endswith(record["reproduce"]):
            text += "\n" + record["reproduce"]
        pytest.fail(text, pytrace=False)
