"""The facts of a run that its results file begins with, and its plan: the items that were collected."""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from harness import device as devices
from harness.backend import Backend
from harness.base.processes import ROOT
from harness.device import Device
from harness.results.file import PlannedItem, Record, git_changes, git_commit

PLAN = "moe_plan"  #: of xdist's workerinput: the directory for a worker's plan

#: A function of the selection, as text, that returns the begin record.
Begin = Callable[[str], Record]

#: Options that select cases or change their verdicts.
OPTIONS = ("markexpr", "keyword", "device", "backend", "fill", "seed", "shard", "case_timeout")


def begin_record(
    config: pytest.Config, on: Iterable[Device], backends: Iterable[tuple[str, Backend]], selection: str
) -> Record:
    """The begin record of a run (docs/results.schema.json).

    backends: (spec, backend) of those that --backend names; selection: the options that restrict the run, as text.
    """
    option = config.option
    paths = [str(argument) for argument in config.args]
    return {
        "commit": git_commit(ROOT),
        "changes": git_changes(ROOT),
        "kernel_commits": {backend.name: commit for _, backend in backends if (commit := _own_commit(backend))},
        "environment": {str(device): devices.environment(device) for device in on},
        "versions": _versions(),
        "options": {name: getattr(option, name) for name in OPTIONS if getattr(option, name)} | {"paths": paths},
        "selection": selection,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "pytest"):
        found[package] = metadata.version(package)
    return found


def _own_commit(backend: Backend) -> str:
    """The commit of the repository that a backend's file lives in; "" if that is the harness's own, or unknown."""
    try:
        file = Path(inspect.getfile(type(backend.object))).resolve()
    except (TypeError, OSError):
        return ""
    return "" if file.is_relative_to(ROOT) else git_commit(file.parent)


def planned(items: Iterable[pytest.Item]) -> list[PlannedItem]:
    """The items that are cases."""
    found = []
    for item in items:
        callspec: Any = getattr(item, "callspec", None)
        params = callspec.params.get("check") if callspec else None
        if params is not None:
            case, device = str(params.case), str(params.device)
            found.append(PlannedItem(item.nodeid, params.family, case, params.backend.name, device))
    return found


def write_plan(folder: Path, worker: str, items: Iterable[pytest.Item]) -> None:
    """Leave the plan of a worker of pytest-xdist for the controller."""
    (folder / f"{worker}.json").write_text(json.dumps([asdict(item) for item in planned(items)]))


def read_plan(folder: Path, worker: str) -> list[PlannedItem]:
    """The plan that a worker of pytest-xdist has left."""
    return [PlannedItem(**words) for words in json.loads((folder / f"{worker}.json").read_text())]
