"""The pytest plugin: every row of a family, on every device and backend, becomes one item; verdicts become a table.

    -m / --device -> devices -> harness.device.start -> items (pytest_generate_tests) -> check() -> run_case
       -> verdict in the report's user_properties -> the controller: results file, table, floor

Which devices: plugin/selection.py. What becomes of the verdicts: plugin/controller.py. Under pytest-xdist the workers
choose devices and make items exactly as a single process does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import device as devices
from harness.device import DEVICES
from harness.plugin.items import marks_of, times
from harness.plugin.process import KEY, Process
from harness.plugin.selection import select_devices
from harness.plugin.verdicts import check_item
from harness.problem import families
from harness.problem.case import FILLS, DescriptorError
from harness.results import known_failures

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
    add("--ledger", type=Path, default=known_failures.LEDGER, metavar="PATH", help="known failures (cases/ledger.toml)")
    add("--shard", metavar="I/N", help="only the I-th of N parts of the items, of about the same duration")
    add("--durations-from", type=Path, metavar="PATH", help="with --shard: past durations, or a results file")
    add("--case-timeout", type=float, default=300, metavar="SECONDS", help="a case's time limit (300; 0: none)")


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
    if whole and not option.keyword and any(not device.on_cpu for device in chosen):
        option.numprocesses = max(1, min(GPU_WORKERS, len(os.sched_getaffinity(0)) * 3 // 4))
        option.dist = "worksteal"  # items of one case stay together: what is drawn for it is kept in a process


# -- hooks: start and collection --------------------------------------------------------------------------------------
def pytest_configure(config: pytest.Config) -> None:
    own = [f"{name}: runs on this device" for name in DEVICES]
    own += [f"{fill}: inputs are drawn this way (inputs/draw.py)" for fill in FILLS]
    own += ["emulated: a device's contract, run on the CPU by Triton's interpreter"]
    if getattr(config.option, "markers", False):
        own += [f"{module.FAMILY}: a family of cases" for module in families.families()]
    for line in own:
        config.addinivalue_line("markers", line)
    harness = config.stash[KEY] = Process(config)
    if harness.controller:
        config.pluginmanager.register(harness.controller, "moe-harness-controller")
    if config.option.shard:
        from harness.plugin.shard import Splitter

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
                marks=[getattr(pytest.mark, name) for name in marks_of(asked)],
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
        raise pytest.UsageError(f"{request.node.nodeid}: its module has no FAMILY (see problem/families.py)")
    harness, asked = request.config.stash[KEY], request.param
    called = []

    def run(benchmark: Any = None) -> None:
        called.append(True)
        check_item(harness, asked, request.node, benchmark)

    yield run
    if not called:
        pytest.fail("the test never called check(): it proves nothing", pytrace=False)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for device in config.stash[KEY].selection.devices:
        machine_info[device.name] = {**devices.environment(device), **device.driver()}


def pytest_sessionfinish(session: pytest.Session) -> None:
    harness = session.config.stash[KEY]
    if harness.worker:
        session.config.workeroutput["moe_missed"] = [[*key, n] for key, n in harness.missed.items()]  # type: ignore[attr-defined]
