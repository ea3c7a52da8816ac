"""One process's share of a run."""

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

from harness import device as devices
from harness.backend import BackendError
from harness.device import Device
from harness.plugin.controller import Controller
from harness.plugin.items import ItemParams, marks_of, may_run, times
from harness.plugin.selection import MarkExpression, select_devices
from harness.problem import families
from harness.problem.case import Case
from harness.results import known_failures


class Process:
    """One process's share of a run: the controller's, a worker's, or both at once without xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.worker: dict[str, Any] | None = getattr(config, "workerinput", None)
        option = config.option
        self.selection = select_devices(option.markexpr, option.device, devices.present())
        for name in option.require_device:
            if name not in devices.present():
                raise pytest.UsageError(f"--require-device {name}: {devices.why_absent(name)}")
        self.timing = times(option.markexpr)
        if self.timing and (self.worker or getattr(option, "numprocesses", None)):
            raise pytest.UsageError(f"-m {option.markexpr!r} with -n: processes on one device would time each other")
        devices.start({device.name for device in self.selection.devices})
        if self.worker and self.worker["workercount"] > 1:
            torch.set_num_threads(1)  # the workers share the cores: more threads would only wait for each other
        self.stderr = os.fdopen(os.dup(2), "w")  # pytest's capture has not begun: this one reaches the terminal
        #: how many cases a backend could not run on a device, by (backend, device, reason)
        self.missed: Counter[tuple[str, str, str]] = Counter()
        self._backends: list[tuple[str, Any]] = []
        try:
            self.ledger = known_failures.read(option.ledger)
        except known_failures.LedgerError as error:
            raise pytest.UsageError(str(error)) from error
        if option.backend:
            self._require_usable()
        names = [backend.name for _, backend in self._backends]
        self.controller = None if self.worker else Controller(config, self.selection, self.missed, names)

    def backends(self) -> list[tuple[str, Any]]:
        """(spec, backend): loaded when first needed, so that tests without a battery need no kernels."""
        from harness import backend

        if not self._backends:
            specs = self.config.option.backend
            if any(":" in spec for spec in specs):
                sys.path.append(str(self.config.invocation_params.dir))  # a kernel author's own directory
            try:
                found = backend.select(dict.fromkeys(specs))
            except BackendError as error:
                raise pytest.UsageError(str(error)) from error
            self._backends = list(zip(dict.fromkeys(specs) or [b.name for b in found], found, strict=True))
        return self._backends

    def _require_usable(self) -> None:
        """A backend that was asked for by name must run on one device at least."""
        for spec, backend in self.backends():
            reasons = {str(device): self.unavailable(backend, device) for device in self.selection.devices}
            if reasons and all(reasons.values()):
                told = "; ".join(f"{device}: {reason}" for device, reason in reasons.items())
                raise pytest.UsageError(f"--backend {spec} cannot be used here: {told}")

    def unavailable(self, backend: Any, device: Device) -> str | None:
        from harness.backend import unavailable

        if not may_run(backend, device):
            return f"device: {backend.name} does not declare xpu_contract, so only a real XPU could run it"
        return unavailable(backend, device)

    def items(self, module: Any) -> Iterator[ItemParams]:
        """The items of a family's module. Those of one case come together: its inputs are drawn once for all."""
        option = self.config.option
        if module.FAMILY == families.TIMED and not self.timing:
            return
        expression = MarkExpression(option.markexpr)
        cases: dict[Case, list[Device]] = {}
        for device in self.selection.devices:
            for row in families.rows(module, device.on_cpu):
                if not option.fill or row.case.fill in option.fill:
                    case = row.case if option.seed is None else row.case.change(seed=option.seed)
                    found = cases.setdefault(case, [])
                    found.append(device) if device not in found else None
        usable = {
            (device, spec): self.unavailable(backend, device)
            for device in self.selection.devices
            for spec, backend in self.backends()
        }
        stage = getattr(module, "STAGE", None)
        for case, on in cases.items():
            for device in on:
                for spec, backend in self.backends():
                    if stage and not option.backend and getattr(backend, stage, None) is None:
                        continue  # a family about a stage is no question to whoever has no such stage
                    asked = ItemParams(case, module.FAMILY, device, backend, spec)
                    reason = usable[device, spec]
                    if reason is None:
                        yield asked
                    elif option.backend or may_run(backend, device):
                        marks = set(marks_of(asked))
                        wanted = expression.can_be_true({name: name in marks for name in expression.names})
                        self.missed[spec, str(device), reason] += wanted

    def note(self, **words: Any) -> None:
        """A worker: what the controller should know if nothing more is heard of it."""
        if self.worker:
            path = Path(self.worker["moe_notes"]) / f"{self.worker['workerid']}.json"
            draft = path.with_suffix(f".{threading.get_ident()}")  # the watchdog's thread may write too
            draft.write_text(json.dumps(words))
            draft.replace(path)  # whole or not at all: another worker's death makes the controller read every note

    def end_process(self, found: dict[str, Any]) -> NoReturn:
        """The verdict after which this process cannot go on: recorded, said, and out, whatever else is stuck."""
        self.note(nodeid=found["nodeid"], record=found)
        told = f"\n{found['status']}: {found['reason']}\n{found['reproduce']}\n"
        if self.controller:
            self.controller.record(found)
            told += "This ended the whole run; with pytest-xdist, -n 1 goes on in a new process.\n"
        self.stderr.write(told)
        self.stderr.flush()
        os._exit(1)


@cache
def environment(device: Device) -> dict[str, str]:
    return devices.environment(device)


KEY: pytest.StashKey[Process] = pytest.StashKey()
