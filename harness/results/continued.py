"""`--continue RESULTS`: the last run of a results file, which a kill or a lost device left unfinished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from harness.results.file import Record, ResultsError
from harness.results.reader import read_results

#: Fields of the begin record that must be the same: a verdict from anything else may differ.
SAME = ("commit", "changes", "kernel_commits", "versions", "options")


@dataclass(frozen=True)
class Continued:
    """An unfinished run: the name that its records carry, and its verdicts by pytest id."""

    path: Path
    run: str
    records: dict[str, Record]


def continued(path: Path, begin: Record) -> Continued:
    """The last run of a results file, if a run that begins so may go on with it.

    ResultsError: the file cannot be read or holds no run, or that run was of another commit, of other versions or
    options.
    """
    lines = read_results(path)
    begun = [record for record in lines.begins if not record.get("continues")]
    if not begun:
        raise ResultsError(f"--continue {path}: it holds no run that has begun")
    old, new = begun[-1], json.loads(json.dumps(begin, default=str))
    for name in SAME:
        if old.get(name) != new.get(name):
            raise ResultsError(
                f"--continue {path}: its run has {name} {json.dumps(old.get(name))}, this one has "
                f"{json.dumps(new.get(name))}: "
                "a verdict may differ, so run the whole again"
            )
    mine = [record for record in lines.records if record.get("run") == old["run"] and record.get("nodeid")]
    return Continued(path, old["run"], {str(record["nodeid"]): record for record in mine})
