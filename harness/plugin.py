"""The pytest plugin: every row of a family, on every device and backend, becomes one item; verdicts become a table.

    -m / --device -> devices -> harness.device.start -> items (pytest_generate_tests) -> check() -> harness.check.run
       -> verdict in the report's user_properties -> the controller: results file, table, floor

Which devices: harness/selection.py. What becomes of the verdicts: harness/controller.py. Under pytest-xdist the workers
choose devices and make items exactly as a single process does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from harness import battery, ledger
from harness import device as devices
from harness.backend import BackendError
from harness.controller import VERDICT, Controller
from harness.device import DEVICES, Device, DeviceLost
from harness.problem import FILLS, Case, DescriptorError
from harness.selection import MarkExpression, select_devices
from harness.time_limit import time_limit
from harness.verdict import Verdict

GPU_WORKERS = 12  #: processes that share a GPU by default


# -- options ----------------------------------------------------------------------------------------------------------
def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe-harness", "moe-harness")
    add = group.addoption
    add("--device", action="append", default=[], choices=DEVICES, help="run on this device (repeatable; also: -m cuda)")
    add("--backend", action="append", default=[], metavar="SPEC", help="a backend's name, or package.module:object")
    add("--fill", action="append", default=[], choices=FILLS, help="only cases with this fill (repeatable)")
    add("--seed", type=int, metavar="N", help="replaces the seed of every case")
    add("--require-device", action="append", default=[], choices=DEVICES, help="an error if this device is not here")
    add("--results", type=Path, metavar="PATH", help="append one JSON line for every verdict to this file")
    add("--floor", type=Path, metavar="PATH", help="fail if fewer cases ran than this file wants (cases/floor.toml)")
    add("--ledger", type=Path, default=ledger.LEDGER, metavar="PATH", help="known failures (cases/ledger.toml)")
    add("--shard", metavar="I/N", help="only the I-th of N parts of the items, of about the same duration")
    add("--durations-from", type=Path, metavar="PATH", help="with --shard: past durations, or a results file")
    add("--case-timeout", type=float, default=300, metavar="SECONDS", help="a case's time limit (300; 0: none)")


# -- the state of a run -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Asked:
    """One item: a case on a backend and a device."""

    case: Case
    family: str
    device: Device
    backend: Any
    spec: str  #: what --backend calls it


class Harness:
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
            self.ledger = ledger.read(option.ledger)
        except ledger.LedgerError as error:
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

        if not _may_run(backend, device):
            return f"device: {backend.name} does not declare xpu_contract, so only a real XPU could run it"
        return unavailable(backend, device)

    def items(self, module: Any) -> Iterator[Asked]:
        """The items of a family's module. Those of one case come together: its inputs are drawn once for all."""
        option = self.config.option
        if module.FAMILY == battery.TIMED and not self.timing:
            return
        expression = MarkExpression(option.markexpr)
        cases: dict[Case, list[Device]] = {}
        for device in self.selection.devices:
            for row in battery.rows(module, device):
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
                    asked = Asked(case, module.FAMILY, device, backend, spec)
                    reason = usable[device, spec]
                    if reason is None:
                        yield asked
                    elif option.backend or _may_run(backend, device):
                        marks = set(_marks(asked))
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
def _environment(device: Device) -> dict[str, str]:
    return devices.environment(device)


def _marks(asked: Asked) -> list[str]:
    return [asked.device.name, asked.family, asked.case.fill, *(["emulated"] if asked.device.emulated else [])]


def _may_run(backend: Any, device: Device) -> bool:
    """An emulated XPU is for kernels that promise its contract: others would only run on the CPU again."""
    return not device.emulated or getattr(backend, "xpu_contract", False)


def times(markexpr: str) -> bool:
    """Whether this run is one that times: -m names the family of timed cases, and not to leave it out."""
    expression = MarkExpression(markexpr)
    return battery.TIMED in expression.names and expression.can_be_true({battery.TIMED: True})


KEY: pytest.StashKey[Harness] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)  # before xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A whole run on a GPU spreads over worker processes by itself: Triton compiles on CPU cores, for minutes on one.

    -n 0 keeps it in one process.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if option.numprocesses is not None or option.usepdb or option.collectonly or option.capture == "no":
        return
    if times(option.markexpr):
        return
    chosen = select_devices(option.markexpr, option.device, devices.present()).devices
    whole = not any("::" in argument or argument.endswith(".py") for argument in config.args)
    if whole and not option.keyword and any(device.torch.type != "cpu" for device in chosen):
        option.numprocesses = max(1, min(GPU_WORKERS, len(os.sched_getaffinity(0)) * 3 // 4))
        option.dist = "worksteal"  # items of one case stay together: what is drawn for it is kept in a process


# -- hooks: start and collection --------------------------------------------------------------------------------------
def pytest_configure(config: pytest.Config) -> None:
    own = [f"{name}: runs on this device" for name in DEVICES]
    own += [f"{fill}: inputs are drawn this way (harness/inputs.py)" for fill in FILLS]
    own += ["emulated: a device's contract, run on the CPU by Triton's interpreter"]
    if getattr(config.option, "markers", False):
        own += [f"{module.FAMILY}: a family of cases" for module in battery.families()]
    for line in own:
        config.addinivalue_line("markers", line)
    harness = config.stash[KEY] = Harness(config)
    if harness.controller:
        config.pluginmanager.register(harness.controller, "moe-harness-controller")
    if config.option.shard:
        from harness.shards import Splitter

        config.pluginmanager.register(Splitter(config.option.shard, config.option.durations_from), "moe-harness-shard")


def pytest_unconfigure(config: pytest.Config) -> None:
    harness = config.stash.get(KEY, None)
    if harness is None:
        return
    harness.stderr.close()
    if harness.controller:
        harness.controller.close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    chosen = config.stash[KEY].selection
    names = ", ".join(map(str, chosen.devices)) or "none"
    return [f"moe-harness: devices: {names}", *(f"moe-harness: {line}" for line in chosen.remarks)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" not in metafunc.fixturenames or not hasattr(metafunc.module, "FAMILY"):
        return
    harness = metafunc.config.stash[KEY]
    # Known from here on, so that --strict-markers accepts it: families are found as they are collected.
    metafunc.config.addinivalue_line("markers", f"{metafunc.module.FAMILY}: a family of cases")
    try:
        parameters = [
            pytest.param(
                asked,
                id=f"{asked.case}:{asked.backend.name}:{asked.device.name}",
                marks=[getattr(pytest.mark, name) for name in _marks(asked)],
            )
            for asked in harness.items(metafunc.module)
        ]
    except DescriptorError as error:
        pytest.fail(f"{metafunc.module.__name__}: {error}", pytrace=False)
    # pytest would make one skipped item of an empty list: pytest_collection_modifyitems takes it away again.
    metafunc.parametrize("check", parameters or [pytest.param(None, id="nothing")], indirect=True)


def _is_placeholder(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("check", item) is None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    placeholders = [i for i in items if _is_placeholder(i)]
    if placeholders:
        config.hook.pytest_deselected(items=placeholders)
        items[:] = [item for item in items if item not in placeholders]


# -- one item ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def check(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """check(): runs this item's case; the verdict is the outcome of the test. check(benchmark): and times it then."""
    if not hasattr(request, "param"):
        raise pytest.UsageError(f"{request.node.nodeid}: its module has no FAMILY (see harness/battery.py)")
    harness, asked = request.config.stash[KEY], request.param
    called = []

    def run(benchmark: Any = None) -> None:
        called.append(True)
        _check(harness, asked, request.node, benchmark)

    yield run
    if not called:
        pytest.fail("the test never called check(): it proves nothing", pytrace=False)


def _verdict(asked: Asked, known: list[ledger.Known], benchmark: Any) -> Verdict:
    if benchmark is not None:
        from harness.perf.benchmark import judged

        return judged(asked, benchmark)
    if any(entry.status in ledger.ENDS for entry in known):
        from harness.apart import Apart

        with Apart(asked.spec, asked.device, forks=False) as apart:  # or what is known would end this process
            return replace(apart.run(asked.case), family=asked.family, backend=asked.backend.name)
    from harness import check as checks

    return checks.run(asked.case, asked.backend, asked.device, family=asked.family)


def _check(harness: Harness, asked: Asked, item: pytest.Item, benchmark: Any) -> None:
    def found(verdict: Verdict) -> dict[str, Any]:
        verdict.spec = asked.spec
        return verdict.record() | {"environment": _environment(asked.device), "nodeid": item.nodeid}

    blank = Verdict(str(asked.case), asked.backend.name, str(asked.device), "hung", asked.family)
    seconds = harness.config.option.case_timeout
    hung = found(replace(blank, reason=f"no answer in {seconds:g} s (--case-timeout)", seconds=seconds))
    harness.note(nodeid=item.nodeid, started=time.time(), record=hung)
    lost = ""
    known = ledger.covering(harness.ledger, asked.case, asked.backend.name, str(asked.device))
    with time_limit(seconds, lambda: harness.end_process(hung), harness.stderr):
        try:
            verdict = _verdict(asked, known, benchmark)
            if verdict.status in ("failed", "crashed"):
                asked.device.synchronize()  # was it this case's answer, or has the device been lost?
            verdict = ledger.judged(verdict, known)
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


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for device in config.stash[KEY].selection.devices:
        machine_info[device.name] = {**devices.environment(device), **device.driver()}


def pytest_sessionfinish(session: pytest.Session) -> None:
    harness = session.config.stash[KEY]
    if harness.worker:
        session.config.workeroutput["moe_missed"] = [[*key, n] for key, n in harness.missed.items()]  # type: ignore[attr-defined]
