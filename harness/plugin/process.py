"""The state of one process of a run: its devices, its backends, its items, its worker."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from harness import backend as backends
from harness import device as devices
from harness.base.errors import UserError
from harness.device import Device
from harness.plugin.controller import Controller
from harness.plugin.items import ItemParams, is_timing, marks_of, may_run
from harness.plugin.plan import PLAN, begin_record, planned, write_plan
from harness.plugin.selection import MarkExpression, select_devices
from harness.problem import families
from harness.problem.case import Case
from harness.results import known_failures
from harness.results.continued import Continued
from harness.results.continued import continued as continue_run
from harness.results.verdict import Verdict
from harness.run.supervisor import Supervisor
from harness.scenarios import check_scenario

#: `-p no:moe-harness-isolation` keeps one process, as --in-process does.
ISOLATION = "moe-harness-isolation"


def runs_in_process(config: pytest.Config) -> bool:
    """Whether cases run in this process: for a debugger, for output as it comes, for pytest-benchmark's timing."""
    option = config.option
    if option.usepdb or getattr(option, "trace", False) or option.capture == "no" or is_timing(option.markexpr):
        return True
    return option.in_process or config.pluginmanager.is_blocked(ISOLATION)


class Process:
    """One process of a run: the controller, a worker of pytest-xdist, or the only process.

    `controller` is None in a worker, `worker` (xdist's workerinput) is None elsewhere. UserError: an option, a backend
    or a file cannot be used.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.worker: dict[str, Any] | None = getattr(config, "workerinput", None)
        option = config.option
        self.selection = select_devices(option.markexpr, option.device, devices.present())
        for name in option.require_device:
            if name not in devices.present():
                raise UserError(f"--require-device {name}: {devices.why_absent(name)}")
        self.timing = is_timing(option.markexpr)
        if self.timing and (self.worker or getattr(option, "numprocesses", None)):
            raise UserError(f"-m {option.markexpr!r} with -n: processes on one device would time each other")
        devices.start({device.name for device in self.selection.devices})
        if self.worker and self.worker["workercount"] > 1:
            torch.set_num_threads(1)  # the workers share the cores: more threads would only wait for each other
        self.stderr = os.fdopen(os.dup(2), "w")  # before pytest captures file descriptor 2: it reaches the terminal
        self.in_process = runs_in_process(config)
        self._supervisor: Supervisor | None = None
        self.blamed: list[Verdict] = []  #: on earlier cases, which ended the worker in a later one
        self.nodeids: dict[tuple[str, str, str], str] = {}  #: of the items that ran, by (case, backend, device)
        #: how many cases a backend could not run on a device, by (backend, device, reason)
        self.missed: Counter[tuple[str, str, str]] = Counter()
        self._backends: list[tuple[str, Any]] = []
        self.known_failures = known_failures.read(option.ledger)
        if option.backend:
            self._require_usable()
        named = self.backends() if option.backend else []
        begin = partial(begin_record, config, self.selection.devices, named)
        continued: Continued | None = None
        if option.continue_run and not self.worker:
            continued = continue_run(option.continue_run, begin(""))
        #: the items that have a verdict already, by pytest id
        self.done = set(self.worker["moe_done"] if self.worker else continued.records if continued else ())
        names = [backend.name for _, backend in named]
        self.controller: Controller | None = None
        if not self.worker:
            self.controller = Controller(config, self.selection, self.missed, names, begin, continued)

    def backends(self) -> list[tuple[str, Any]]:
        """(spec, backend) of every backend, loaded at the first call: tests that run no case need no kernels."""
        if not self._backends:
            specs = list(dict.fromkeys(self.config.option.backend))
            if any(":" in spec for spec in specs):
                sys.path.append(str(self.config.invocation_params.dir))  # a kernel author's own directory
            selected = backends.select(specs)
            self._backends = list(zip(specs or [backend.name for backend in selected], selected, strict=True))
        return self._backends

    def _require_usable(self) -> None:
        """UserError if a backend named by --backend can run on none of the devices."""
        for spec, backend in self.backends():
            reasons = {str(device): self.unavailable(backend, device) for device in self.selection.devices}
            if reasons and all(reasons.values()):
                why = "; ".join(f"{device}: {reason}" for device, reason in reasons.items())
                raise UserError(f"--backend {spec} cannot be used here: {why}")

    def unavailable(self, backend: Any, device: Device) -> str | None:
        """None, or why the backend cannot run on the device."""
        if not may_run(backend, device):
            return f"device: {backend.name} does not declare xpu_contract, so only a real XPU could run it"
        return backends.unavailable(backend, device)

    def items(self, module: Any) -> Iterator[ItemParams]:
        """The items of a family's module. Those of one case are neighbours: its inputs are drawn once for all."""
        if module.FAMILY == families.TIMED and not self.timing:
            return
        option = self.config.option
        expression = MarkExpression(option.markexpr)
        usable = {
            (device, spec): self.unavailable(backend, device)
            for device in self.selection.devices
            for spec, backend in self.backends()
        }
        stage = getattr(module, "STAGE", None)
        for case, on in self._cases(module).items():
            for device in on:
                for spec, backend in self.backends():
                    if stage and not option.backend and getattr(backend, stage) is None:
                        continue  # the family is about a stage that this backend does not have
                    params = ItemParams(case, module.FAMILY, device, backend, spec)
                    reason = usable[device, spec]
                    if reason is None:
                        yield params
                    elif option.backend or may_run(backend, device):
                        marks = set(marks_of(params))
                        selected = expression.can_be_true({name: name in marks for name in expression.names})
                        self.missed[spec, str(device), reason] += selected

    def _cases(self, module: Any) -> dict[Case, list[Device]]:
        """The cases of a family that --fill and --seed leave, each with its devices. DescriptorError: of a row."""
        option = self.config.option
        cases: dict[Case, list[Device]] = {}
        for device in self.selection.devices:
            for row in families.rows(module, device.on_cpu):
                if option.fill and row.case.fill not in option.fill:
                    continue
                check_scenario(row.case)
                case = row.case if option.seed is None else row.case.change(seed=option.seed)
                on = cases.setdefault(case, [])
                if device not in on:
                    on.append(device)
        return cases

    def collected(self, items: list[pytest.Item]) -> None:
        """Tell the controller which items will run; it may be another process, of pytest-xdist."""
        if self.worker:
            write_plan(Path(self.worker[PLAN]), self.worker["workerid"], items)
        elif self.controller and not self.config.option.collectonly:
            self.controller.plan(planned(items))

    # -- running a case -----------------------------------------------------------------------------------------------
    @property
    def supervisor(self) -> Supervisor:
        """The supervisor of this process's worker; made when it is first needed, once the backends are loaded."""
        if self._supervisor is None:
            option = self.config.option
            self._supervisor = Supervisor(
                self.selection.devices, option.case_timeout, threads=torch.get_num_threads(),
                loaded=dict(self._backends), outputs=option.outputs, blame=self.blamed.append,
                forks=not self.in_process,
            )  # fmt: skip
        return self._supervisor

    def close(self) -> None:
        """End the worker."""
        if self._supervisor is not None:
            self._supervisor.close()
        self.stderr.close()

    def end(self, record: dict[str, Any]) -> NoReturn:
        """Record and print a verdict after which this process cannot go on, and exit, whatever else is stuck."""
        if self.controller:
            self.controller.record(record)
        self.stderr.write(f"\n{record['status']}: {record['reason']}\n{record['reproduce']}\n")
        self.stderr.write("This ended the whole run: its cases share one process (-s, --pdb, --in-process, perf).\n")
        self.stderr.flush()
        os._exit(1)


@cache
def environment(device: Device) -> dict[str, str]:
    """The device's versions and names, for the records: the same all through a process."""
    return devices.environment(device)


KEY: pytest.StashKey[Process] = pytest.StashKey()
