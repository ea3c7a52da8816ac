"""Every fault in every way to run: the verdict on its case, the exit code, and what else was lost.

A plain run, `run` and `fuzz` have one fault each. `-n 2` and `verify` run all faults in one run, each between cases
without a fault: what one of them took from another case, or from the run, would show.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from harness.base.processes import ROOT, environment
from harness.problem.case import Case
from harness.results.verdict import FAILED, Verdict
from harness.run.fuzz import Space
from harness.run.fuzz import fuzz as search
from tests.reliability import litter, warm
from tests.reliability.catalogue import FAULTS
from tests.reliability.faults import FAULTY, FOLDER, HONEST, MAP, PIDS, Fault
from tests.reliability.loading import HEAD, LOADING, MODULE, SPEC

WAYS = ("plain", "-n 2", "verify", "run", "fuzz")
BATCHES = ("-n 2", "verify")
CASES = str(Path(__file__).with_name("fault_cases.py"))
SIZES = "h32-i8-e2-k1-bf16"
BEFORE, AT, AFTER = (f"t{n}-{SIZES}-exact" for n in (3, 4, 5))
LIMIT, LIMIT_COLD = "2", "3"  #: seconds of a backend for one case; in a process that still has to import much
PATIENCE = 120.0  #: seconds for a run with one fault
PATIENCE_OF_ALL = 900.0  #: for a run with all faults
LOG = 1_000_000  #: bytes of a run's output, at most
#: What no log may contain as it is: the marks of litter.py.
ALIVE = re.compile(r"^\s*::(error|stop-commands)::owned|##\[error\]owned|\x1b\[2Jowned|\u202eowned", re.MULTILINE)
SEED, BYTES, EXAMPLES = 3, 2**14, 12  #: of fuzz


@dataclass
class Cell:
    """What came of one fault in one way; `problems` is what should not have happened."""

    fault: str
    way: str
    status: str = ""
    code: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Recorded:
    """A results file: its verdicts by (case, backend), and whether its run has all its parts."""

    path: Path
    verdicts: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    whole: bool = False


def read(path: Path) -> Recorded:
    """Read a results file, line by line, without the harness's own reader."""
    recorded, kinds, planned = Recorded(path), [], -1
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        kinds.append(record.get("kind"))
        if record.get("kind") == "verdict":
            recorded.verdicts[record["case"], record["backend"]] = record
        elif record.get("kind") == "plan":
            planned = record["total"]
    recorded.whole = {"begin", "plan", "end"} <= set(kinds) and planned == len(recorded.verdicts)
    return recorded


def best(folder: Path) -> Recorded:
    """The results file of a folder that is whole, or that has most verdicts."""
    files = [read(path) for path in sorted(folder.rglob("*.jsonl"))]
    return max(files, key=lambda file: (file.whole, len(file.verdicts)), default=Recorded(folder / "none.jsonl"))


def place(fault: Fault, tokens: int = 4) -> str:
    """The descriptor of the case with a fault: a random one if the fault is in plans(), which exact ones do not ask."""
    return f"t{tokens}-{SIZES}-{'random' if fault.where == 'plans' else 'exact'}"


# -- one fault --------------------------------------------------------------------------------------------------------
def new_folder(root: Path, name: str, rows: dict[str, str]) -> Path:
    """A folder for one run, with the rows of its cases."""
    path = root / re.sub(r"\W+", "-", name)[:100]
    path.mkdir(parents=True)
    (path / MAP).write_text(json.dumps(rows))
    return path


def plain(name: str, root: Path) -> Cell:
    """`pytest` on a case with the fault and two without, on two backends."""
    fault = FAULTS[name]
    at = place(fault)
    folder = new_folder(root, f"plain {name}", {BEFORE: "", at: name, AFTER: ""})
    words = [CASES, "--device=cpu", f"--case-timeout={LIMIT}", f"--results={folder / 'results.jsonl'}"]
    ended = warm.command(warm.pytest_run([*words, *backends()]), folder, PATIENCE)
    recorded = best(folder)
    cell = Cell(name, "plain", code=ended.code)
    judge(cell, fault, recorded, at)
    cell.problems += lost(recorded, [BEFORE, at, AFTER], [at])
    cell.problems += ending(cell.code, any_red(recorded) or fault.group == litter.FILES, recorded, folder)
    cell.problems += output_problems(ended.text, ended.late) + left_over(folder)
    return cell


def beyond(name: str, root: Path) -> Cell:
    """`pytest` on a case that ends pytest itself: the exit code and `summary` are not green, and nothing is lost."""
    at = place(FAULTS[name])
    folder = new_folder(root, f"beyond {name}", {BEFORE: "", at: name, AFTER: ""})
    words = [CASES, "--device=cpu", f"--case-timeout={LIMIT}", f"--results={folder / 'results.jsonl'}"]
    ended = warm.command(warm.pytest_run([*words, *backends()]), folder, PATIENCE)
    recorded = best(folder)
    cell = Cell(name, "plain", "no verdict", ended.code)
    cell.problems += lost(recorded, [BEFORE], [])
    if ended.code == 0:
        cell.problems.append("exit code 0")
    if warm.command(warm.harness(["summary", str(recorded.path)]), folder, name="summary.log").code == 0:
        cell.problems.append("summary is green")
    cell.problems += output_problems(ended.text, ended.late)
    return cell


def run(name: str, root: Path) -> Cell:
    """`moe-harness run` on the case with the fault."""
    at = place(FAULTS[name])
    folder = new_folder(root, f"run {name}", {at: name})
    words = ["run", at, "--backend", FAULTY, "--json", "--case-timeout", LIMIT]
    ended = warm.command(warm.harness(words), folder, PATIENCE)
    cell = Cell(name, "run", code=ended.code)
    lines = [line for line in ended.text.splitlines() if line.startswith("{")]
    recorded = Recorded(folder, {(at, "faulty"): json.loads(lines[-1])} if lines else {})
    judge(cell, FAULTS[name], recorded, at)
    if len(lines) != 1:
        cell.problems.append(f"{len(lines)} records, not 1: {tail(ended.text)}")
    if ended.code != int(any_red(recorded)):
        cell.problems.append(f"exit code {ended.code}")
    cell.problems += output_problems(ended.text, ended.late) + left_over(folder)
    return cell


def fuzz(name: str, root: Path) -> Cell:
    """`moe-harness fuzz`, which reaches the problem with the fault among others without one."""
    fault = FAULTS[name]
    descriptor = next(case for case in fuzzed() if ("-exact" in case) == (fault.where != "plans"))
    folder = new_folder(root, f"fuzz {name}", {descriptor: name})
    ended = warm.command(warm.harness([*fuzz_words(FAULTY), "--case-timeout", LIMIT]), folder, PATIENCE)
    cell = Cell(name, "fuzz", code=ended.code)
    about = re.search(r"^(t\d+-h\S+) (failed|crashed|hung): ", ended.text, re.MULTILINE)
    finished = about is not None or "nothing found" in ended.text
    cell.status = about[2] if about else "passed" if finished else "none"
    if cell.status not in fault.statuses:
        cell.problems.append(f"{cell.status}, not {' or '.join(fault.statuses)}: {tail(ended.text)}")
    if about and Case.parse(about[1]).problem != Case.parse(descriptor).problem:
        cell.problems.append(f"blames {about[1]}")
    if ended.code != int(about is not None):
        cell.problems.append(f"exit code {ended.code}")
    cell.problems += output_problems(ended.text, ended.late) + left_over(folder)
    return cell


@cache
def fuzzed() -> list[str]:
    """The single calls that the search of fuzz_words() asks, but for the first, as long as all pass."""
    asked: list[Case] = []

    class Passing:
        def run(self, case: Case) -> Verdict:
            asked.append(case)
            return Verdict(str(case), "passing", "cpu", "passed")

    search(Passing(), Space(), seed=SEED, seconds=60, most=BYTES, examples=EXAMPLES)  # type: ignore[arg-type]
    return [str(case) for case in asked[1:] if case.scenario == "once" and case.problem.tokens]


def fuzz_words(spec: str) -> list[str]:
    """The command of a short search."""
    return ["fuzz", "--backend", spec, "--seed", str(SEED), "--examples", str(EXAMPLES), "--bytes", str(BYTES)]


def unloadable(what: str, way: str, root: Path) -> Cell:
    """A backend that cannot be loaded: one line and the exit code of wrong usage, and nothing has run."""
    folder = new_folder(root, f"{way} {what}", {AT: ""})
    (folder / f"{MODULE}.py").write_text(HEAD + LOADING[what])
    tests = [CASES, "--device=cpu", f"--backend={SPEC}", f"--results={folder / 'results.jsonl'}"]
    if way in ("plain", "-n 2"):
        function = warm.pytest_run([*tests, *(["-n", "2"] if way == "-n 2" else [])])
    elif way == "verify":
        function = warm.harness(["verify", "--device=cpu", f"--backend={SPEC}", "--jobs=2"])
    elif way == "run":
        function = warm.harness(["run", AT, "--backend", SPEC])
    else:
        function = warm.harness(fuzz_words(SPEC))

    def with_module() -> int:
        sys.path.insert(0, str(folder))
        return function()

    ended = warm.command(with_module, folder, PATIENCE)
    cell = Cell(what, way, "usage error", ended.code)
    expected = 2 if way in ("run", "fuzz") else 4
    if ended.code != expected or "Traceback" in ended.text or "broken" not in ended.text:
        cell.problems.append(f"exit code {ended.code}, not {expected}: {tail(ended.text)}")
    cell.problems += output_problems(ended.text, ended.late)
    return cell


# -- all faults in one run --------------------------------------------------------------------------------------------
def all_rows(names: Iterable[str]) -> dict[str, str]:
    """The rows of a run with all of these faults, each between two cases without one."""
    rows = {f"t1-{SIZES}-exact": ""}
    for i, name in enumerate(names, 1):
        rows |= {place(FAULTS[name], 2 * i): name, f"t{2 * i + 1}-{SIZES}-exact": ""}
    return rows


def batch(way: str, names: list[str], root: Path) -> list[Cell]:
    """One run with all of these faults, `-n 2` or `verify`."""
    rows = all_rows(names)
    folder = new_folder(root, f"{way} {names[0]} and {len(names) - 1}", rows)
    if way == "-n 2":
        words = ["-m", "pytest", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", "-rN", "-n", "2"]
        words += ["--dist=worksteal", "--device=cpu", f"--results={folder / 'results.jsonl'}", *backends()]
        words += [f"--case-timeout={LIMIT_COLD}", CASES]
    else:
        words = ["-m", "harness", "verify", "--device=cpu", "--jobs=2", *backends(), "--"]
        words += ["-m", "faults", f"--case-timeout={LIMIT_COLD}", CASES]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment() | {FOLDER: str(folder)}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            code = process.wait(PATIENCE_OF_ALL)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    text = (folder / "log").read_text(errors="replace")
    recorded = best(folder)
    at = {name: descriptor for descriptor, name in rows.items() if name}
    cells = [Cell(name, way, code=code) for name in names]
    for cell in cells:
        judge(cell, FAULTS[cell.fault], recorded, at[cell.fault])
    files = any(FAULTS[name].group == litter.FILES for name in names)
    cells[0].problems += lost(recorded, list(rows), list(at.values()))
    cells[0].problems += ending(code, any_red(recorded) or files, recorded, folder)
    cells[0].problems += output_problems(text, late) + left_over(folder)
    return cells


# -- judging ----------------------------------------------------------------------------------------------------------
def backends() -> list[str]:
    """Options of pytest for both backends."""
    return [f"--backend={FAULTY}", f"--backend={HONEST}"]


def judge(cell: Cell, fault: Fault, recorded: Recorded, descriptor: str) -> None:
    """Put the verdict on the case with the fault into its cell."""
    record = recorded.verdicts.get((descriptor, "faulty"), {})
    cell.status = record.get("status", "none")
    if cell.status not in fault.statuses:
        reason = f" ({record['reason'][:160]})" if record.get("reason") else ""
        cell.problems.append(f"{cell.status}{reason}, not {' or '.join(fault.statuses)}")
    if fault.notes and not record.get("notes"):
        cell.problems.append("no note of it in the record")
    if len(json.dumps(record)) > LOG // 4:
        cell.problems.append(f"a record of {len(json.dumps(record))} bytes")


def lost(recorded: Recorded, cases: list[str], faulty: list[str]) -> list[str]:
    """What other cases than those with a fault have lost: their verdict, or its being right."""
    lines = []
    for case in cases:
        for backend in ("faulty", "honest"):
            if backend == "faulty" and case in faulty:
                continue
            record = recorded.verdicts.get((case, backend))
            if record is None:
                lines.append(f"lost: {case} on {backend}")
            elif record["status"] != "passed":
                lines.append(f"{case} on {backend}: {record['status']} ({record['reason'][:160]})")
    return lines


def ending(code: int, red: bool, recorded: Recorded, folder: Path) -> list[str]:
    """What is wrong with the run's exit code, with the end of its file, and with what `summary` says of it."""
    lines = [] if code == int(red) else [f"exit code {code}, not {int(red)}"]
    if not recorded.whole:
        return [*lines, f"no whole results file ({len(recorded.verdicts)} verdicts)"]
    summary = warm.command(warm.harness(["summary", str(recorded.path)]), folder, name="summary.log")
    if summary.code != int(any_red(recorded)):
        lines.append(f"summary ends with {summary.code}: {tail(summary.text)}")
    return lines + output_problems(summary.text, summary.late)


def any_red(recorded: Recorded) -> bool:
    """Whether a verdict is red."""
    return any(record["status"] in FAILED for record in recorded.verdicts.values())


def output_problems(text: str, late: bool) -> list[str]:
    """What is wrong with the output of a command."""
    lines = ["it did not end"] if late else []
    lines += [f"{len(text)} bytes of output"] if len(text) > LOG else []
    if found := ALIVE.search(text):
        lines.append(f"printed as it is: {found[0]!r}")
    return lines + (["an internal error of pytest"] if "INTERNALERROR" in text else [])


def left_over(folder: Path) -> list[str]:
    """The processes that faults have left behind and that still run."""
    path = folder / PIDS
    pids = path.read_text().split() if path.exists() else []
    return [f"process {pid} still runs" for pid in pids if _runs(pid)]


def _runs(pid: str) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


def tail(text: str) -> str:
    """The end of an output, in one line."""
    return " | ".join(text.split("\n")[-4:])[-300:]
