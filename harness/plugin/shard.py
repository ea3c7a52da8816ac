"""A pytest plugin that keeps one shard of the items (--shard I/N)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from harness.ci import durations, matrix


class Splitter:
    """A pytest plugin that keeps one shard of the items. It runs after -k and -m: selections are balanced as well.

    MatrixError, ResultsError: --shard or --durations-from cannot be used.
    """

    def __init__(self, shard: str, path: Path | None) -> None:
        self.number, self.count = matrix.shard_of(shard)
        self.durations = durations.read(path) if path else durations.Durations()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        keys = []
        weights: dict[tuple[str, str], float] = defaultdict(float)
        for item in items:
            params = item.callspec.params.get("check") if hasattr(item, "callspec") else None
            if params is None:  # a test that is no case
                key, seconds = (item.nodeid, ""), durations.UNKNOWN
            else:
                case, device = str(params.case), str(params.device)
                key = (case, device)
                seconds = self.durations.expected(device, params.family, params.backend.name, case)
            keys.append(key)
            weights[key] += seconds
        shards = durations.split(weights, self.count)
        mine = [shards[key] == self.number for key in keys]
        config.hook.pytest_deselected(items=[item for item, kept in zip(items, mine) if not kept])
        items[:] = [item for item, kept in zip(items, mine) if kept]
