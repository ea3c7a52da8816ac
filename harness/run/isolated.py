"""Cases on one backend, judged in an isolated process."""

from __future__ import annotations

from harness.device import Device
from harness.problem.case import Case
from harness.results.verdict import Verdict
from harness.run.supervisor import LIMIT, Supervisor
from harness.run.worker_process import RunnerError

__all__ = ["IsolatedRunner", "RunnerError"]


class IsolatedRunner:
    """A Supervisor of one backend: `with IsolatedRunner(spec, device) as runner: runner.run(case)`."""

    def __init__(self, spec: str, device: Device, limit: float = LIMIT) -> None:
        self.spec, self.device = spec, device
        self._supervisor = Supervisor([device], limit)

    def __enter__(self) -> IsolatedRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self._supervisor.close()

    def run(self, case: Case) -> Verdict:
        """The verdict on a case. RunnerError for an error of the harness in the worker."""
        return self._supervisor.run(case, self.spec, self.device)

    def run_fresh(self, case: Case) -> Verdict:
        """The verdict of a new process, in which no other case has run."""
        self._supervisor.renew()
        return self.run(case)
