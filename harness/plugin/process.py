"""The state of one process of a run: its devices, its backends, its items, its note to the controller."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cache
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
from harness.plugin.selection import MarkExpression, select_devices
from harness.problem import families
from harness.problem.case import Case
from harness.results import known_failures


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
        #: how many cases a backend could not run on a device, by (backend, device, reason)
        self.missed: Counter[tuple[str, str, str]] = Counter()
        self._backends: list[tuple[str, Any]] = []
        self.known_failures = known_failures.read(option.ledger)
        if option.backend:
            self._require_usable()
        names = [backend.name for _, backend in self._backends]
        self.controller = None if self.worker else Controller(config, self.selection, self.missed, names)

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
        """The cases of a family that --fill and --seed leave, each with its devices."""
        option = self.config.option
        cases: dict[Case, list[Device]] = {}
        for device in self.selection.devices:
            for row in families.rows(module, device.on_cpu):
                if option.fill and row.case.fill not in option.fill:
                    continue
                case = row.case if option.seed is None else row.case.change(seed=option.seed)
                on = cases.setdefault(case, [])
                if device not in on:
                    on.append(device)
        return cases

    def note(self, **words: Any) -> None:
        """Write a worker's note: what the controller records if the worker dies before it reports."""
        if self.worker:
            path = Path(self.worker["moe_notes"]) / f"{self.worker['workerid']}.json"
            draft = path.with_suffix(f".{threading.get_ident()}")  # the watchdog's thread may write too
            draft.write_text(json.dumps(words))
            draft.replace(path)  # whole or not at all: another worker's death makes the controller read every note

    def end_process(self, record: dict[str, Any]) -> NoReturn:
        """Record and print a verdict after which this process cannot go on, and exit, whatever else is stuck."""
        self.note(nodeid=record["nodeid"], record=record)
        text = f"\n{record['status']}: {record['reason']}\n{record['reproduce']}\n"
        if self.controller:
            self.controller.record(record)
            text += "This ended the whole run; with pytest-xdist, -n 1 goes on in a new process.\n"
        self.stderr.write(text)
        self.stderr.flush()
        os._exit(1)


@cache
def environment(device: Device) -> dict[str, str]:
    """The device's versions and names, for the records: the same all through a process."""
    return devices.environment(device)


KEY: pytest.StashKey[Process] = pytest.StashKey()
