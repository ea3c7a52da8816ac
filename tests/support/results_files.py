"""Results files of whole runs: with a beginning, a plan, verdicts and an end."""

from harness.results.file import PlannedItem, Results
from harness.results.verdict import FAILED


def nodeid_of(record):
    family = record["family"] or "layers"
    device = record["device"].split()[0]
    return f"cases/test_{family}.py::test_{family}[{record['case']}:{record['backend']}:{device}]"


def planned_item(record):
    return PlannedItem(
        record["nodeid"], record["family"] or "layers", record["case"], record["backend"], record["device"]
    )


def write_run(path, records, *, missing=(), end=True, exit_code=None, run="", **begin):
    """Append a run with these verdicts to a file. Returns the name of the run.

    missing: records that are planned, and have no verdict; end: whether the run has one; exit_code: of pytest; run: the
    name of the run that goes on; begin: fields of the first record.
    """
    records, missing = [[{"nodeid": nodeid_of(r), **r} for r in each] for each in (records, missing)]
    file = Results(path, {"commit": "abc", **begin}, run=run)
    file.plan(map(planned_item, [*records, *missing]))
    for record in records:
        file.append(record)
    if end:
        red = any(record["status"] in FAILED for record in records)
        assert file.end(int(red) if exit_code is None else exit_code, 1.0) == []
    else:
        file.close()
    return file.run
