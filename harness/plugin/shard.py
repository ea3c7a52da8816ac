"""A pytest plugin that keeps one shard of the items (--shard I/N)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from harness.ci import matrix
from harness.ci.durations import UNKNOWN, Durations, read, split
from harness.results.file import ResultsError


class Splitter:
    """A pytest plugin that keeps one shard of the items, after -k and -m have chosen: a selection is balanced, too."""

    def __init__(self, shard: str, durations: Path | None) -> None:
        try:
            self.number, self.count = matrix.shard_of(shard)
            self.durations = read(durations) if durations else Durations()
        except (matrix.MatrixError, ResultsError) as error:
            raise pytest.UsageError(str(error)) from error

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        keys = []
        weights: dict[tuple[str, str], float] = defaultdict(float)
        for item in items:
            asked = item.callspec.params.get("check") if hasattr(item, "callspec") else None
            if asked is None:  # a test that is no item of the battery
                key, seconds = (item.nodeid, ""), UNKNOWN
            else:
                case, device = str(asked.case), str(asked.device)
                key, seconds = (case, device), self.durations.of(device, asked.family, asked.backend.name, case)
            keys.append(key)
            weights[key] += seconds
        shards = split(weights, self.count)
        mine = [shards[key] == self.number for key in keys]
        config.hook.pytest_deselected(items=[item for item, kept in zip(items, mine) if not kept])
        items[:] = [item for item, kept in zip(items, mine) if kept]
