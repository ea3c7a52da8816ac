"""The process that receives every report: it keeps the verdicts, writes the results file, prints the table.

A run has a plan, the items that were collected, and an end. An item of the plan without a verdict makes the run red.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.base.text import number
from harness.device import DEVICES
from harness.plugin.plan import PLAN, Begin, read_plan
from harness.plugin.selection import MarkExpression, Selection
from harness.results import summary
from harness.results.continued import Continued
from harness.results.file import PlannedItem, Record, Results
from harness.results.floor import read_floor, shortfalls
from harness.results.verdict import FAILED, Verdict

VERDICT = "moe_verdict"  #: the user property of a report that carries a verdict
NOT_CHECKED = "The floor is for whole runs, not for a selection"
MOST = 5  #: items without a verdict that are named


class Controller:
    """A pytest plugin of the one process that is not a worker of pytest-xdist.

    begin: the facts of the run; continued: the run that --continue goes on with. UserError: --floor or --results cannot
    be used.
    """

    def __init__(
        self, config: pytest.Config, selection: Selection, missed: Counter[tuple[str, str, str]], backends: list[str],
        begin: Begin, continued: Continued | None,
    ) -> None:  # fmt: skip
        self.config, self.option = config, config.option
        self.selection, self.missed = selection, missed
        self.backends = backends  #: the names of those that --backend selects, if any
        self.continued = continued
        self.started = time.perf_counter()
        self.lost = ""  #: why nothing can run in this process any more
        self.records: dict[str, Record] = {}  #: by pytest id
        self.planned: dict[str, PlannedItem] | None = None
        self.folder = ""  #: where the workers of pytest-xdist leave their plan
        self.problems: list[str] = []
        self.floor: dict[str, dict[str, int]] = {}
        self.results: Results | None = None
        if self.option.collectonly:
            return
        self.floor = read_floor(self.option.floor) if self.option.floor else {}
        if continued:
            self.records = dict(continued.records)
            self.results = Results(continued.path, begin(self._selected()), run=continued.run)
        elif self.option.results:
            self.results = Results(self.option.results, begin(self._selected()))

    def close(self) -> None:
        """Remove the files of the workers."""
        if self.folder:
            shutil.rmtree(self.folder)

    def record(self, record: Record) -> None:
        """Keep a record, and append it to the results file."""
        self.records[record["nodeid"]] = record
        if self.results:
            self.results.append(record)

    def plan(self, items: list[PlannedItem]) -> None:
        """Keep the items of the run, and write them into the results file."""
        self.planned = {item.nodeid: item for item in items}
        if self.results:
            self.results.plan(items)

    # -- hooks --------------------------------------------------------------------------------------------------------
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when not in ("setup", "call", "teardown"):
            self._worker_died(report)
        if report.when != "call":
            return
        for record in [json.loads(str(value)) for name, value in report.user_properties if name == VERDICT]:
            self.record(record)
            if record["nodeid"] != report.nodeid:  # of an earlier case, whose report said that it passed
                text = f"{record['reason']}\n{record['reproduce']}"
                failed = pytest.TestReport(record["nodeid"], report.location, {}, "failed", text, "call")
                self.config.hook.pytest_runtest_logreport(report=failed)

    def _worker_died(self, report: pytest.TestReport) -> None:
        """Record the case of a worker of pytest-xdist that has ended, by what pytest-xdist reports of it."""
        if item := (self.planned or {}).get(report.nodeid):
            reason = f"pytest's process died: {report.longrepr}"
            verdict = Verdict(item.case, item.backend, item.device, "crashed", item.family, reason, reason)
            self.record(verdict.record() | {"nodeid": report.nodeid})

    def pytest_runtest_logfinish(self) -> None:
        # Not in the test itself: its report is counted first.
        if self.lost:
            pytest.exit(self.lost, returncode=1)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist, before it starts, where its plan goes and what has a verdict already."""
        if not self.folder:
            self.folder = tempfile.mkdtemp(prefix="moe-harness-")
        node.workerinput[PLAN] = self.folder
        node.workerinput["moe_done"] = list(self.continued.records) if self.continued else []
        send = node.sendcommand

        def sendcommand(name: str, **words: object) -> None:
            """Send a command to a worker that may have died a moment ago.

            Its death arrives later as an event, and its tests go to other workers. Without this the OSError ends the
            whole run (pytest-xdist issue 204).
            """
            try:
                send(name, **words)
            except OSError as error:
                node.log(f"{name}: the worker is dead: {error}")

        node.sendcommand = sendcommand

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """Take the plan from the first worker that has collected: all collect the same items."""
        if self.planned is None:
            self.plan(read_plan(Path(self.folder), node.gateway.id))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take the missed cases from a worker that has ended. All workers collect, and miss, the same ones."""
        for *key, n in getattr(node, "workeroutput", {}).get("moe_missed", []):
            self.missed[tuple(key)] = n

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.option.collectonly:
            return
        self.problems = self._without_verdict() + self._below_floor()
        red = any(not line.startswith(NOT_CHECKED) for line in self.problems)
        if self.continued and any(record["status"] in FAILED for record in self.continued.records.values()):
            red = True  # of the part that ran before
        good = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.continued and self.planned == {} and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # nothing was left to run
        if red and session.exitstatus in good:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.results:
            lost = self.results.end(int(session.exitstatus), time.perf_counter() - self.started)
            self.problems += lost
            if lost and session.exitstatus in good:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _without_verdict(self) -> list[str]:
        missing = [nodeid for nodeid in self.planned or {} if nodeid not in self.records]
        if not missing:
            return []
        more = [f"  and {len(missing) - MOST} more"] if len(missing) > MOST else []
        return (
            [f"{number(len(missing), 'case')} of the plan without a verdict:"]
            + [f"  {nodeid}" for nodeid in missing[:MOST]]
            + more
        )

    def _below_floor(self) -> list[str]:
        if not self.floor:
            return []
        if chosen := self._selected(backends=False):
            return [f"{NOT_CHECKED} ({chosen}): it was not checked."]
        on = [str(device) for device in self.selection.devices]
        return shortfalls(self.floor, list(self.records.values()), on, self.backends)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        remarks = list(self.selection.remarks)
        lines = summary.render(
            list(self.records.values()),
            [summary.Missing(*key, n) for key, n in sorted(self.missed.items())],
            remarks,
            self._selected() if self.records else "",
            str(self.option.results or "") if self.results else "",
            seconds=time.perf_counter() - self.started,
            short=self.option.verbose < 0,
        )
        lines += self.problems
        if self.option.collectonly:
            lines = remarks
        if lines:
            terminalreporter.write_sep("=", "moe-harness")
            for line in lines:
                terminalreporter.write_line(line)

    def _selected(self, backends: bool = True) -> str:
        """The options that restrict this run, as text, or ""; `backends`: --backend is one of them."""
        option = self.option
        words = set(MarkExpression(option.markexpr).names) - set(DEVICES)
        parts = [f"-m {option.markexpr!r}"] if words else []
        parts += [f"-k {option.keyword!r}"] if option.keyword else []
        parts += ["--lf"] if getattr(option, "lf", False) else []
        for name in ("backend", "fill") if backends else ("fill",):
            parts += [f"--{name} {value}" for value in getattr(option, name)]
        parts += [f"--seed {option.seed}"] if option.seed is not None else []
        parts += [f"--shard {option.shard}"] if option.shard else []
        paths = [arg.partition("[")[0] for arg in self.config.args]
        parts += [arg for arg in paths if "::" in arg or arg.endswith(".py")][:3]
        return ", ".join(parts)
