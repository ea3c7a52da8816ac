"""From an item to its verdict, and from the verdict to the outcome of the test."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

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
from harness.run.worker_process import RunnerError


def _verdict(process: Process, params: ItemParams, known: list[KnownFailure], benchmark: Any) -> Verdict:
    if benchmark is not None:
        return run_timed(params, benchmark)
    ends = any(entry.status in ENDS for entry in known)
    if process.in_process and not ends:  # a known failure would end ours
        return run_case(params.case, params.backend, params.device, params.family, params.spec)
    name = params.backend.name
    try:
        return process.supervisor.run(params.case, params.spec, params.device, params.family, name, known=ends)
    except RunnerError as error:
        reason = f"an error of the harness: {str(error).splitlines()[-1]}"
        return Verdict(
            str(params.case), name, str(params.device), "crashed", params.family, reason, str(error), spec=params.spec
        )


def check_item(process: Process, params: ItemParams, node: pytest.Item, benchmark: Any) -> None:
    """Run one item: its verdict goes into the report's user_properties, and becomes the outcome of the test.

    benchmark: pytest-benchmark's fixture, or None; with it, a case that passes is timed as well.
    """

    def record_of(verdict: Verdict, nodeid: str = node.nodeid) -> dict[str, Any]:
        return verdict.record() | {"environment": environment(params.device), "nodeid": nodeid}

    process.nodeids[str(params.case), params.backend.name, str(params.device)] = node.nodeid
    blank = Verdict(str(params.case), params.backend.name, str(params.device), "hung", params.family, spec=params.spec)
    known = known_failures.covering(process.known_failures, params.case, params.backend.name, str(params.device))
    seconds = process.config.option.case_timeout
    hung = record_of(replace(blank, reason=f"no answer in {seconds:g} s (--case-timeout)", seconds=seconds))
    limit = seconds if process.in_process and not process.config.option.usepdb else 0.0
    with time_limit(limit, lambda: process.end(hung), process.stderr):
        try:
            verdict = _verdict(process, params, known, benchmark)
            if process.in_process and verdict.status in FAILED:
                params.device.synchronize()  # raises DeviceLost if the failure took the device with it
        except DeviceLost as error:
            verdict = replace(blank, status="crashed", reason=str(error), error_type="DeviceLost", device_lost=True)
            if not process.controller:
                process.end(record_of(verdict))
            process.controller.lost = f"{error}. No result after {params.case} would mean anything in this process."
    verdict = known_failures.judged(verdict, known)
    for earlier in process.blamed:
        nodeid = process.nodeids[earlier.case, earlier.backend, earlier.device]
        node.user_properties.append((VERDICT, json.dumps(record_of(earlier, nodeid))))
    process.blamed.clear()
    record = record_of(verdict)
    node.user_properties.append((VERDICT, json.dumps(record, default=str)))
    if record["output"]:
        node.add_report_section("call", "backend", record["output"])
    _conclude(verdict, record)


def _conclude(verdict: Verdict, record: dict[str, Any]) -> None:
    """Make the verdict the outcome of the test. record: the verdict with texts that are safe to print."""
    if verdict.status == "unsupported":
        pytest.skip(record["reason"])
    elif verdict.status == "known":
        pytest.xfail(record["known"])
    elif not verdict.green:
        text = record["report"].rstrip() or record["reason"]
        if not text.endswith(record["reproduce"]):
            text += "\n" + record["reproduce"]
        pytest.fail(text, pytrace=False)
