"""Git histories of one small file, and workers that read their measurements from that file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from harness.perf.versions.checkout import CannotBuild, Checkouts, WorkerError
from tests.support.demo_repository import git


def make(repository: Path, states: list[dict], merges: dict[int, int] | None = None) -> list[str]:
    """Make a repository with a commit for each state. Returns the full names of the commits.

    A state with a key "parent" branches off from that commit; the others follow the commit before them. merges: the
    second parent, by commit.
    """
    repository.mkdir(parents=True, exist_ok=True)
    git(repository, "init", "-q", "-b", "main")
    stream = []
    for number, state in enumerate(states):
        text, subject = json.dumps(state), state.get("subject", f"commit {number}")
        parent = state.get("parent", number - 1)
        stream += ["commit refs/heads/main", f"mark :{number + 1}"]
        stream += [f"author D <d@d> {1750000000 + number} +0000"]
        stream += [f"committer D <d@d> {1750000000 + number} +0000", f"data {len(subject)}", subject]
        stream += [f"from :{parent + 1}"] if number else []
        stream += [f"merge :{merges[number] + 1}"] if merges and number in merges else []
        stream += ["M 100644 inline state.json", f"data {len(text)}", text, ""]
    marks = repository / ".git" / "marks"
    subprocess.run(
        ["git", "fast-import", "--quiet", "--force", f"--export-marks={marks}"], cwd=repository, check=True,
        input="\n".join(stream).encode(),
    )  # fmt: skip
    names = dict(line.split() for line in marks.read_text().splitlines())
    git(repository, "reset", "-q", "--hard")
    return [names[f":{number + 1}"] for number in range(len(states))]


class FakeCheckouts(Checkouts):
    """Checkouts of a small history. Times have 2 % noise.

    requests: all (commit, request) so far. interrupt: the number of requests after which KeyboardInterrupt is raised.
    """

    def __init__(self, repo: Path, build: str | None = None, interrupt: int | None = None, seed: int = 0) -> None:
        super().__init__(repo, build)
        self.requests: list[tuple[str, str]] = []
        self.started: list[str] = []
        self.interrupt = interrupt
        self.random = np.random.default_rng(seed)

    def __enter__(self) -> FakeCheckouts:
        return self

    def worker(self, commit: str, device: str) -> FakeWorker:  # type: ignore[override]
        state = json.loads(self.git("show", f"{commit}:state.json").stdout)
        if "cannot_build" in state:
            raise CannotBuild(commit, state["cannot_build"], "")
        self.started.append(commit)
        return FakeWorker(self, commit, state)


class FakeWorker:
    """A worker that reads from the commit's state: "error", "status", "reason", "error_type", "us" and counts."""

    def __init__(self, checkouts: FakeCheckouts, commit: str, state: dict) -> None:
        self.checkouts, self.commit, self.state = checkouts, commit, state
        self.closed = False

    def ask(self, request: str, **fields) -> dict:
        checkouts = self.checkouts
        assert not self.closed and fields["case"] and fields["backend"]
        if checkouts.interrupt is not None and len(checkouts.requests) >= checkouts.interrupt:
            raise KeyboardInterrupt
        checkouts.requests.append((self.commit, request))
        if "error" in self.state:
            raise WorkerError(*self.state["error"])
        if request == "verdict":
            fields = {name: self.state[name] for name in VERDICT if name in self.state}
            return {"status": "passed", "reason": "", **fields}
        if request == "structure":
            if self.state.get("status", "passed") != "passed":
                raise WorkerError("incorrect", f"{self.state['status']}: {self.state['reason']}")
            counts = {name: self.state.get(name, 1) for name in COUNTED}
            return {"metrics": counts, "kernels": self.state.get("kernels", ["_gemm[1]"])}
        noise = np.exp(0.02 * checkouts.random.normal(size=fields["samples"]))
        return {"samples": [float(self.state["us"] * factor) for factor in noise]}

    def close(self) -> None:
        self.closed = True


VERDICT = ("status", "reason", "error_type")
COUNTED = (
    "launches", "programs", "operators", "allocations", "allocated_bytes", "copies_h2d", "copies_d2h", "syncs",
    "python_calls", "tensor_core",
)  # fmt: skip
