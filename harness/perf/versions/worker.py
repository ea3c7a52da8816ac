"""The process that measures one checkout: `python -m harness.perf.versions.worker --device NAME --worktree DIR`.

A request is a JSON line on stdin, an answer a JSON line on stdout. {"ask": ...}, and

    hello      -> {"environment": ..., "driver": ..., "path": ...}
    verdict    case, backend -> the verdict's record
    structure  case, backend, targets -> the record of harness.perf.count.structure.CallCounts
    time       case, backend, metric, samples -> {"samples": microseconds, "method"}

or {"error": kind, "message": text}, with the kinds of checkout.WorkerError. The process ends with its input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from harness import backend as backends
from harness import device as devices
from harness.backend import Backend, BackendError
from harness.device import Device, DeviceLost, ready
from harness.perf.versions.checkout import FROZEN, WorkerError
from harness.problem.case import Case
from harness.results.verdict import Verdict

STOPWATCHES = 4  #: prepared layers that are kept
KEPT_BYTES = 8 * 2**30  #: of weights of these layers: several workers share a device


def main() -> None:
    """Answer requests until the input ends, or until the device is lost."""
    answers, requests = _channels()
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--worktree", type=Path, required=True)
    args = parser.parse_args()
    server = Server(ready(args.device), args.worktree)
    for line in requests:
        answers.write(json.dumps(server.answer(json.loads(line)), default=str) + "\n")
        answers.flush()
        if server.lost:
            break
    sys.stderr.flush()
    os._exit(0)  # an orderly exit with torch takes seconds, and changes no answer


def _channels() -> tuple[IO[str], IO[str]]:
    """(output, input) of the pipes. Kernels get stderr for their output, and an empty input."""
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return answers, requests


class Server:
    """Measures one checkout on one device. Keeps its backends, verdicts and stopwatches."""

    def __init__(self, device: Device, worktree: Path) -> None:
        self.device, self.worktree = device, worktree.resolve()
        self.lost = False
        self._backends: dict[str, Backend] = {}
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._stopwatches: OrderedDict[tuple[str, str], tuple[Any, int]] = OrderedDict()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request. An error is an answer too."""
        name = request.pop("ask")
        try:
            return getattr(self, f"on_{name}")(**request)
        except WorkerError as error:
            return {"error": error.kind, "message": error.message}
        except DeviceLost as error:
            self.lost = True
            return {"error": "died", "message": str(error)}
        except Exception as error:  # a kernel may raise anything
            message = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            return {"error": "crashed", "message": message}

    # -- requests -----------------------------------------------------------------------------------------------------
    def on_hello(self) -> dict[str, Any]:
        return {
            "environment": devices.environment(self.device),
            "driver": self.device.driver(),
            "path": sys.path,
        }

    def on_verdict(self, case: str, backend: str) -> dict[str, Any]:
        return self._verdict(case, backend).record()

    def on_structure(self, case: str, backend: str, targets: list[str]) -> dict[str, Any]:
        from harness.perf.count import structure

        verdict = self._verdict(case, backend)
        try:
            measured = structure.measure(Case.parse(case), self._backend(backend), self.device, verdict)
        except structure.NotCorrect as error:
            raise WorkerError("incorrect", str(error)) from error
        except structure.NotMeasured as error:
            raise WorkerError("unsupported", str(error)) from error
        return (structure.compile_for(measured, targets) if targets else measured).record()

    def on_time(self, case: str, backend: str, metric: str, samples: int) -> dict[str, Any]:
        watch = self._stopwatch(case, backend)
        from harness.perf.timing.clock import NotTimed

        try:
            times = watch.sample(metric, samples)
        except NotTimed as error:
            raise WorkerError("unsupported", str(error)) from error
        return {"samples": times, "method": watch.method}

    # -- kept ---------------------------------------------------------------------------------------------------------
    def _backend(self, spec: str) -> Backend:
        if spec not in self._backends:
            backend, module = _find(spec)
            _require_own({module, type(backend.object).__module__}, self.worktree)
            self._backends[spec] = backend
        return self._backends[spec]

    def _verdict(self, case: str, spec: str) -> Verdict:
        from harness.run.case import run_case

        backend = self._backend(spec)
        if (case, spec) not in self._verdicts:
            self._verdicts[case, spec] = run_case(Case.parse(case), backend, self.device, spec=spec)
        return self._verdicts[case, spec]

    def _stopwatch(self, case: str, spec: str) -> Any:
        """A stopwatch for a case that passes in this process. Raises WorkerError."""
        from harness.inputs.sizes import weight_bytes
        from harness.perf.timing.clock import NotTimed, Stopwatch

        if (case, spec) in self._stopwatches:
            self._stopwatches.move_to_end((case, spec))
            return self._stopwatches[case, spec][0]
        verdict = self._verdict(case, spec)
        if verdict.status == "unsupported":
            raise WorkerError("unsupported", verdict.reason)
        if verdict.status != "passed":
            kind = "crashed" if verdict.status == "crashed" else "incorrect"
            raise WorkerError(kind, f"{verdict.status}: {verdict.reason}")
        parsed = Case.parse(case)
        size = weight_bytes(parsed.problem)
        while self._stopwatches and not self._fits(size):
            self._stopwatches.popitem(last=False)
            self.device.release()
        try:
            watch = Stopwatch(parsed, self._backend(spec), self.device)
        except NotTimed as error:
            raise WorkerError("unsupported", str(error)) from error
        self._stopwatches[case, spec] = watch, size
        return watch

    def _fits(self, size: int) -> bool:
        held = sum(bytes_ for _, bytes_ in self._stopwatches.values())
        return len(self._stopwatches) < STOPWATCHES and held + size <= KEPT_BYTES


def _find(spec: str) -> tuple[Backend, str]:
    """The backend of this name, or package.module:object, and its module.

    Raises WorkerError "unsupported" if this checkout has no such backend.
    """
    if ":" in spec:
        return _load(spec), spec.partition(":")[0]
    broken: list[WorkerError] = []
    for candidate in _declared():
        try:
            backend = _load(candidate)
        except WorkerError as error:  # an older checkout lacks some of them
            if error.kind == "import":
                broken.append(error)
            continue
        if backend.name == spec:
            return backend, candidate.partition(":")[0]
    if broken:
        raise broken[0]
    raise WorkerError("unsupported", f"package: no backend {spec!r} in this version")


def _declared() -> Iterator[str]:
    yield from backends.BUILTIN.values()
    for entry in importlib.metadata.entry_points(group=backends.ENTRY_POINTS):
        yield entry.value


def _load(spec: str) -> Backend:
    module = spec.partition(":")[0]
    try:
        return backends.load(spec)
    except BackendError as error:
        cause = error.__cause__
        missing = isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}.")
        if missing or (isinstance(cause, AttributeError) and module in sys.modules):
            raise WorkerError("unsupported", f"package: no {spec} in this version") from error
        raise WorkerError("import", str(error)) from error


def _require_own(homes: set[str], worktree: Path) -> None:
    """Raise WorkerError "import" unless the loaded packages of these modules come from the worktree.

    Otherwise code from an editable installation of the same package, or from PYTHONPATH, would be measured instead of
    every commit.
    """
    packages = {home.partition(".")[0] for home in homes} - sys.stdlib_module_names
    if strange := packages & set(FROZEN):
        raise WorkerError("import", f"{strange.pop()} is what measures, not the code under test")
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in packages and file and not Path(file).resolve().is_relative_to(worktree):
            raise WorkerError("import", f"{name} was imported from {file}, not from the checkout {worktree}")


if __name__ == "__main__":
    main()
