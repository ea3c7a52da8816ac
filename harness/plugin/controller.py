"""The process that receives every report: it keeps the verdicts, writes the results file, prints the table.

Under pytest-xdist a dying worker cannot report. Before each case it writes a note, a file with the verdict that the
controller records if the worker dies.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.base.processes import ROOT
from harness.device import DEVICES
from harness.plugin.selection import MarkExpression, Selection
from harness.results import summary
from harness.results.file import Record, Results, git_commit
from harness.results.floor import read_floor, shortfalls

VERDICT = "moe_verdict"  #: the user property of a report that carries a verdict


class Controller:
    """A pytest plugin of the one process that is not a worker. ResultsError: --floor or --results cannot be used."""

    def __init__(
        self, config: pytest.Config, selection: Selection, missed: Counter[tuple[str, str, str]], backends: list[str]
    ) -> None:
        self.config, self.option = config, config.option
        self.selection, self.missed = selection, missed
        self.backends = backends  #: the names of those that --backend selects, if any
        self.started = time.perf_counter()
        self.lost = ""  #: why nothing can run in this process any more
        self.records: list[Record] = []
        self.notes = ""  #: the directory of the workers' notes
        self.shortfalls: list[str] = []
        self.floor: dict[str, dict[str, int]] = {}
        self.results: Results | None = None
        if self.option.collectonly:
            return
        self.floor = read_floor(self.option.floor) if self.option.floor else {}
        if self.option.results:
            self.results = Results(self.option.results, git_commit(ROOT))

    def close(self) -> None:
        if self.results:
            self.results.close()
        if self.notes:
            shutil.rmtree(self.notes)

    def record(self, record: Record) -> None:
        """Keep a record, and append it to the results file."""
        self.records.append(record)
        if self.results:
            self.results.append(record)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == VERDICT:
                    self.record(json.loads(str(value)))
        elif report.when not in ("setup", "teardown"):  # xdist's report of a worker that died
            for record in self._noted(report):
                self.record(record)

    def _noted(self, report: pytest.TestReport) -> Iterator[Record]:
        """The record, from a worker's note, of the case that it was running when it died."""
        for path in Path(self.notes).glob("*.json") if self.notes else ():
            words = json.loads(path.read_text())
            if words["nodeid"] == report.nodeid:
                record = words["record"]
                if "started" in words and time.time() - words["started"] < self.option.case_timeout:
                    record |= {"status": "crashed", "reason": f"the process died: {report.longrepr}"}
                yield record

    def pytest_runtest_logfinish(self) -> None:
        # Not in the test itself: its report is counted first.
        if self.lost:
            pytest.exit(self.lost, returncode=1)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker, before xdist starts it, where its note goes."""
        self.notes = self.notes or tempfile.mkdtemp(prefix="moe-harness-")
        node.workerinput["moe_notes"] = self.notes
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
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take the missed cases from a worker that has ended. All workers collect, and miss, the same ones."""
        for *key, n in getattr(node, "workeroutput", {}).get("moe_missed", []):
            self.missed[tuple(key)] = n

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self.floor:
            return
        if chosen := self._selected(backends=False):
            self.shortfalls = [f"The floor is for whole runs, not for a selection ({chosen}): it was not checked."]
            return
        on = [str(device) for device in self.selection.devices]
        self.shortfalls = shortfalls(self.floor, self.records, on, self.backends)
        if self.shortfalls and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        remarks = list(self.selection.remarks)
        lines = summary.render(
            self.records,
            [summary.Missing(*key, n) for key, n in sorted(self.missed.items())],
            remarks,
            self._selected() if self.records else "",
            str(self.option.results or "") if self.results else "",
            seconds=time.perf_counter() - self.started,
            short=self.option.verbose < 0,
        )
        lines += self.shortfalls
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
