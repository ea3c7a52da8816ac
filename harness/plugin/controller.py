"""The process that sees every report, whichever process made it: it keeps the verdicts, writes them down, sums them up.

Under pytest-xdist a worker that is about to die cannot report: before each case it leaves a note, a file that holds the
verdict to record if nothing more is heard of it.
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
from harness.results.file import Results, ResultsError, git_commit
from harness.results.floor import read_floor, shortfalls

VERDICT = "moe_verdict"  #: the user property of a report that carries a verdict


class Controller:
    """A pytest plugin of the one process that is not a worker."""

    def __init__(
        self, config: pytest.Config, selection: Selection, missed: Counter[tuple[str, str, str]], backends: list[str]
    ) -> None:
        self.config, self.option = config, config.option
        self.selection, self.missed = selection, missed
        self.backends = backends  #: those that were asked for by name, if any
        self.started = time.perf_counter()
        self.lost = ""  #: why nothing can run in this process any more
        self.records: list[dict[str, Any]] = []
        self.notes = ""  #: the directory of the workers' notes
        self.shortfalls: list[str] = []
        self.floor: dict[str, dict[str, int]] = {}
        self.results: Results | None = None
        if self.option.collectonly:
            return
        try:
            self.floor = read_floor(self.option.floor) if self.option.floor else {}
            if self.option.results:
                self.results = Results(self.option.results, git_commit(ROOT))
        except ResultsError as error:
            raise pytest.UsageError(str(error)) from error

    def close(self) -> None:
        if self.results:
            self.results.close()
        if self.notes:
            shutil.rmtree(self.notes)

    def record(self, found: dict[str, Any]) -> None:
        self.records.append(found)
        if self.results:
            self.results.append(found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == VERDICT:
                    self.record(json.loads(str(value)))
        elif report.when not in ("setup", "teardown"):  # xdist's report of a worker that died
            for found in self._last_words(report):
                self.record(found)

    def _last_words(self, report: pytest.TestReport) -> Iterator[dict[str, Any]]:
        """The verdict on the case that a worker was running when it died."""
        for path in Path(self.notes).glob("*.json") if self.notes else ():
            words = json.loads(path.read_text())
            if words["nodeid"] == report.nodeid:
                found = words["record"]
                if "started" in words and time.time() - words["started"] < self.option.case_timeout:
                    found |= {"status": "crashed", "reason": f"the process died: {report.longrepr}"}
                yield found

    def pytest_runtest_logfinish(self) -> None:
        # Not in the test itself: its report is counted first.
        if self.lost:
            pytest.exit(self.lost, returncode=1)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """xdist is about to start a worker."""
        self.notes = self.notes or tempfile.mkdtemp(prefix="moe-harness-")
        node.workerinput["moe_notes"] = self.notes
        send = node.sendcommand

        def sendcommand(name: str, **words: object) -> None:
            """A worker may have died a moment ago: its death arrives as an event, and gives its tests to others.

            Without this the whole run ends there (pytest-xdist issue 204).
            """
            try:
                send(name, **words)
            except OSError as error:
                node.log(f"{name} found no reader: {error}")

        node.sendcommand = sendcommand

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """An xdist worker has ended. Each collects everything, so each misses the same cases."""
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
        """What this run was restricted to, or ""; `backends` says whether --backend counts."""
        option = self.option
        words = set(MarkExpression(option.markexpr).names) - set(DEVICES)
        found = [f"-m {option.markexpr!r}"] if words else []
        found += [f"-k {option.keyword!r}"] if option.keyword else []
        found += ["--lf"] if getattr(option, "lf", False) else []
        for name in ("backend", "fill") if backends else ("fill",):
            found += [f"--{name} {value}" for value in getattr(option, name)]
        found += [f"--seed {option.seed}"] if option.seed is not None else []
        found += [f"--shard {option.shard}"] if option.shard else []
        paths = [arg.partition("[")[0] for arg in self.config.args]
        found += [arg for arg in paths if "::" in arg or arg.endswith(".py")][:3]
        return ", ".join(found)
