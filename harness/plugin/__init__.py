"""The pytest plugin (conftest.py: pytest_plugins = ["harness.plugin"]): one item for each case, device and backend.

    -m / --device -> devices -> harness.device.start -> items (pytest_generate_tests) -> check() -> the worker: run_case
       -> verdict in the report's user_properties -> the controller: results file, table, floor

Public: the name `harness.plugin`, the options, the marks and the fixture `check`. selection.py chooses the devices,
process.py makes the items, verdicts.py runs one, plan.py lists all, controller.py collects the verdicts. Every process
of pytest runs its cases in a worker process of its own (run/supervisor.py). Under pytest-xdist every one of its workers
chooses devices and makes items exactly as a single process does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import device as devices
from harness.base.arguments import folder, integer, seconds, writable_file
from harness.base.errors import UserError
from harness.base.text import shortened
from harness.device import DEVICES
from harness.plugin.items import is_timing, marks_of
from harness.plugin.process import KEY, Process
from harness.plugin.selection import select_devices
from harness.plugin.shard import Splitter
from harness.plugin.verdicts import check_item
from harness.problem import families
from harness.problem.case import FILLS, MOST_SEED, DescriptorError
from harness.results import known_failures
from harness.results.verdict import OUTPUT

GPU_WORKERS = 12  #: processes that share a GPU by default


# -- options ----------------------------------------------------------------------------------------------------------
def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe-harness", "moe-harness")
    add = group.addoption
    add("--device", action="append", default=[], choices=DEVICES, help="run on this device (repeatable; also: -m cuda)")
    add("--backend", action="append", default=[], metavar="SPEC", help="a backend's name, or package.module:object")
    add("--fill", action="append", default=[], choices=FILLS, help="only cases with this fill (repeatable)")
    add("--seed", type=integer(0, MOST_SEED), metavar="N", help="replaces the seed of every case")
    add("--require-device", action="append", default=[], choices=DEVICES, help="an error if this device is not here")
    add("--results", type=writable_file, metavar="PATH", help="append one JSON line for every verdict to this file")
    add("--floor", type=Path, metavar="PATH", help="fail if fewer cases ran than this file demands (cases/floor.toml)")
    add("--ledger", type=Path, default=known_failures.LEDGER, metavar="PATH", help="known failures (cases/ledger.toml)")
    add("--shard", metavar="I/N", help="only the I-th of N parts of the items, of about the same duration")
    add("--durations-from", type=Path, metavar="PATH", help="with --shard: past durations, or a results file")
    add("--continue", dest="continue_run", type=Path, metavar="RESULTS", help="go on with the last run of this file")
    add("--case-timeout", type=seconds, default=300, metavar="SECONDS", help="time limit of a case (300; 0: none)")
    add("--in-process", action="store_true", help="run cases in pytest's process: no case survives a crash of another")
    add("--outputs", type=folder, metavar="DIR", help="keep the whole of what failing cases print, a file each")


@pytest.hookimpl(tryfirst=True)  # before xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread a whole run on a GPU over worker processes: Triton compiles on CPU cores, and one takes minutes.

    -n 0 keeps the run in one process.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if option.numprocesses is not None or option.usepdb or option.collectonly or option.capture == "no":
        return
    if is_timing(option.markexpr):
        return
    chosen = select_devices(option.markexpr, option.device, devices.present()).devices
    whole = not any("::" in argument or argument.endswith(".py") for argument in config.args)
    if whole and not option.keyword and any(not device.on_cpu for device in chosen):
        option.numprocesses = max(1, min(GPU_WORKERS, len(os.sched_getaffinity(0)) * 3 // 4))
        option.dist = "worksteal"  # items of one case stay together: its process keeps the inputs


# -- hooks: start and collection --------------------------------------------------------------------------------------
@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn UserError into pytest.UsageError: pytest prints its one line, and exits with 4."""
    try:
        yield
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_configure(config: pytest.Config) -> None:
    own = [f"{name}: runs on this device" for name in DEVICES]
    own += [f"{fill}: inputs are drawn this way (inputs/draw.py)" for fill in FILLS]
    own += ["emulated: a device's contract, run on the CPU by Triton's interpreter"]
    if getattr(config.option, "markers", False):
        own += [f"{module.FAMILY}: a family of cases" for module in families.families()]
    for line in own:
        config.addinivalue_line("markers", line)
    with usage_errors():
        process = config.stash[KEY] = Process(config)
        if config.option.shard:
            splitter = Splitter(config.option.shard, config.option.durations_from)
            config.pluginmanager.register(splitter, "moe-harness-shard")
    if process.controller:
        config.pluginmanager.register(process.controller, "moe-harness-controller")


def pytest_unconfigure(config: pytest.Config) -> None:
    process = config.stash.get(KEY, None)
    if process is None:
        return
    process.close()
    if process.controller:
        process.controller.close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    chosen = config.stash[KEY].selection
    names = ", ".join(map(str, chosen.devices)) or "none"
    return [f"moe-harness: devices: {names}", *(f"moe-harness: {line}" for line in chosen.remarks)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" not in metafunc.fixturenames or not hasattr(metafunc.module, "FAMILY"):
        return
    process = metafunc.config.stash[KEY]
    # Declared here, or --strict-markers would refuse it: a family is known once its module is collected.
    metafunc.config.addinivalue_line("markers", f"{metafunc.module.FAMILY}: a family of cases")
    with usage_errors():
        try:
            items = list(process.items(metafunc.module))
        except DescriptorError as error:  # of a row: the family is wrong, not the command line
            pytest.fail(f"{metafunc.module.__name__}: {error}", pytrace=False)
    parameters = [
        pytest.param(
            params,
            id=f"{params.case}:{params.backend.name}:{params.device.name}",
            marks=[getattr(pytest.mark, name) for name in marks_of(params)],
        )
        for params in items
    ]
    # pytest would make one skipped item of an empty list: a placeholder, which pytest_collection_modifyitems removes.
    metafunc.parametrize("check", parameters or [pytest.param(None, id="nothing")], indirect=True)


def _is_placeholder(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("check", item) is None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    placeholders = [item for item in items if _is_placeholder(item)]
    done = config.stash[KEY].done
    left_out = [*placeholders, *(item for item in items if item.nodeid in done)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(tryfirst=True)  # before xdist tells the controller
def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[KEY].collected(session.items)


# -- one item ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def check(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """check() runs the item's case, and its verdict becomes the outcome of the test; check(benchmark) also times it."""
    if not hasattr(request, "param"):
        raise pytest.UsageError(f"{request.node.nodeid}: its module has no FAMILY (see problem/families.py)")
    called = False

    def run(benchmark: Any = None) -> None:
        nonlocal called
        called = True
        check_item(request.config.stash[KEY], request.param, request.node, benchmark)

    yield run
    if not called:
        pytest.fail("the test never called check(): it proves nothing", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Cut what a case printed in this process, and make it safe for the log of CI."""
    report = yield
    if "check" in getattr(item, "fixturenames", ()):
        report.sections = [(name, shortened(text, OUTPUT, tail=OUTPUT // 2)) for name, text in report.sections]
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for device in config.stash[KEY].selection.devices:
        machine_info[device.name] = {**devices.environment(device), **device.driver()}


def pytest_sessionfinish(session: pytest.Session) -> None:
    process = session.config.stash[KEY]
    if process.worker:
        session.config.workeroutput["moe_missed"] = [[*key, n] for key, n in process.missed.items()]  # type: ignore[attr-defined]
