""".github/workflows and .ci/history: what they start exists, nothing untrusted is a script, the scripts work."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from harness import cli
from harness.base.errors import UserError
from harness.base.processes import ROOT
from harness.ci import gather, matrix
from harness.results.verdict import Verdict

yaml = pytest.importorskip("yaml", reason="PyYAML, which transformers brings")
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in FILES}
JOBS = [(file, name, job) for file, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()]
STEPS = [(file, name, step) for file, name, job in JOBS for step in job.get("steps", [])]
SCRIPTS = [(file, name, step["run"]) for file, name, step in STEPS if "run" in step]
#: What a workflow's variables stand for, where a command is to be parsed.
VALUES = {"ROW": "cpu", "SHARD": "1/4", "NAME": "cpu-1of4", "PLAN": "{}", "WHEN": "change", "RUNNERS": "cuda",
          "BASE": "main", "base": "main", "HEAD": "HEAD"}  # fmt: skip


# -- structure --------------------------------------------------------------------------------------------------------
def test_the_workflows_are_there():
    assert set(WORKFLOWS) == {"ci.yml", "nightly.yml", "rows.yml"}
    occasions = {name: set(flow[True]) for name, flow in WORKFLOWS.items()}  # YAML 1.1 reads `on` as true
    assert occasions["ci.yml"] == {"push", "pull_request"} and occasions["nightly.yml"] == {
        "schedule",
        "workflow_dispatch",
    }
    assert occasions["rows.yml"] == {"workflow_call"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_least_permissions(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    text = (ROOT / ".github" / "workflows" / name).read_text()
    assert "secrets." not in text and "pull_request_target" not in text and "token" not in text.lower()
    if name != "rows.yml":
        assert WORKFLOWS[name]["concurrency"]
    own = {job: found["permissions"] for job, found in WORKFLOWS[name]["jobs"].items() if "permissions" in found}
    assert own == ({"verdict": {"contents": "write"}} if name == "nightly.yml" else {})


@pytest.mark.parametrize("file, name, job", JOBS, ids=[f"{file}:{name}" for file, name, _ in JOBS])
def test_every_job_has_a_time_limit(file, name, job):
    assert "timeout-minutes" in job or job["uses"] == "./.github/workflows/rows.yml"


def test_actions_are_github_s_own_and_pinned_to_a_major_version():
    used = {step["uses"] for _, _, step in STEPS if "uses" in step}
    assert used and all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in used), used


@pytest.mark.parametrize("file, name, script", SCRIPTS)
def test_no_expression_stands_in_a_script(file, name, script):
    """Whatever a branch or a title is called, it is a variable's value, never a script's text."""
    assert "${{" not in script
    shell = WORKFLOWS[file]["defaults"]["run"]["shell"]
    assert shell == "bash"  # with -e and pipefail: GitHub's default has no pipefail


def test_every_variable_of_a_script_is_given():
    for file, name, job in JOBS:
        for step in job.get("steps", []):
            given = {**job.get("env", {}), **step.get("env", {})}
            assigned = set(re.findall(r"(?:^|;|then)\s*(\w+)=", step.get("run", ""), re.M)) | {"GITHUB_OUTPUT"}
            assert set(re.findall(r"\$\{?(\w+)", step.get("run", ""))) <= set(given) | assigned, (file, name)


# -- commands ---------------------------------------------------------------------------------------------------------
def commands():
    """Every `python3 -m harness...` of the workflows, as (module, words)."""
    for file, _, script in SCRIPTS:
        for module, rest in re.findall(r"python3? -m (harness[.\w]*)(.*)", script):
            words = re.sub(r"\$(\w+)", lambda found: VALUES[found[1]], re.split(r"\)$| \|\| ", rest)[0])
            yield file, module, shlex.split(words)


def test_every_command_is_one_that_there_is():
    parsers = {"harness": cli._parser(), "harness.ci.matrix": matrix.parser(), "harness.ci.gather": gather.parser()}
    found = list(commands())
    assert {module for _, module, _ in found} == set(parsers)
    assert {words[0] for _, module, words in found if module == "harness"} == {"matrix", "report"}
    for _, module, words in found:
        parsers[module].parse_args(words)  # SystemExit: no such option


def test_a_command_that_there_is_not_would_be_noticed():
    with pytest.raises(UserError, match="unrecognized arguments: --shards"):
        cli._parser().parse_args(["matrix", "cpu", "--shards", "1/2"])


def test_the_comparison_of_a_row_is_a_command_that_there_is():
    rows = [row for row in matrix.read().values() if row.compare is not None]
    assert {row.name for row in rows} >= {"cpu", "cuda"}
    for row in rows:
        cli._parser().parse_args(["compare", "main", "HEAD", *row.compare])


def test_every_row_is_reached():
    occasions = [WORKFLOWS[file]["jobs"]["rows"]["with"]["when"] for file in ("ci.yml", "nightly.yml")]
    rows = matrix.read()
    assert set(occasions) == set(matrix.WHEN)
    assert {name for name, row in rows.items() if set(row.when) & set(occasions)} == set(rows)
    strategy = WORKFLOWS["rows.yml"]["jobs"]["row"]["strategy"]["matrix"]
    plan = matrix.jobs(rows.values())
    assert strategy == "${{ fromJSON(needs.plan.outputs.jobs).rows }}" and plan["rows"]["include"]
    text = (ROOT / ".github" / "workflows" / "rows.yml").read_text()
    assert set(re.findall(r"matrix\.(\w+)", text)) - {"toml"} <= set(plan["rows"]["include"][0])


# -- scripts, run for real --------------------------------------------------------------------------------------------
@pytest.fixture
def shell(tmp_path):
    """shell(script, **variables): run as GitHub would, in an empty directory; (exit code, output)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    (tmp_path / "work").mkdir()
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def go(script, **variables):
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), **variables}
        done = subprocess.run(words, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return go


def script(file, job, start):
    found = [step["run"] for step in WORKFLOWS[file]["jobs"][job]["steps"] if start in step.get("run", "")]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
@pytest.mark.parametrize(
    "variables, rows",
    [
        ({"WHEN": "change", "FORK": "false", "RUNNERS": ""}, {"cpu", "xpu-emulated"}),
        ({"WHEN": "change", "FORK": "false", "RUNNERS": "cuda"}, {"cpu", "xpu-emulated", "cuda"}),
        ({"WHEN": "change", "FORK": "true", "RUNNERS": "cuda"}, {"cpu", "xpu-emulated"}),
        ({"WHEN": "nightly", "FORK": "false", "RUNNERS": "cuda xpu"}, set(matrix.read())),
    ],
)
def test_the_plan(shell, tmp_path, variables, rows):
    output = tmp_path / "output"
    code, text = shell(script("rows.yml", "plan", "harness.ci.matrix"), GITHUB_OUTPUT=str(output), **variables)
    assert code == 0, text
    name, _, plan = output.read_text().partition("=")
    assert name == "jobs" and plan.count("\n") == 1
    assert {job["row"] for job in json.loads(plan)["rows"]["include"]} == rows


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_a_plan_that_fails_is_no_empty_plan(shell, tmp_path):
    code, text = shell(script("rows.yml", "plan", "harness.ci.matrix"), GITHUB_OUTPUT=str(tmp_path / "o"), FORK="false",
                       WHEN="weekly", RUNNERS="")  # fmt: skip
    assert code == 2 and not (tmp_path / "o").exists(), text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
@pytest.mark.parametrize("file", ["ci.yml", "nightly.yml"])
def test_the_verdict_of_nothing_is_red(shell, tmp_path, file):
    page = tmp_path / "page.md"
    plan = json.dumps(matrix.jobs([matrix.read()["xpu-emulated"]]))
    merge = script(file, "verdict", "harness.ci.gather")
    code, text = shell(merge, PLAN=plan, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(page))
    assert code == 1 and "::error::xpu-emulated, shard 1/2: no results" in text, text
    assert page.read_text().startswith("## moe-harness: 3 problems")
    assert shell(merge, PLAN="")[0] == 2  # no plan was made
    good = script(file, "verdict", "NOT_GOOD")
    assert shell(good, NOT_GOOD="false")[0] == 0 and shell(good, NOT_GOOD="true")[0] == 1


@pytest.mark.parametrize("code, ends, warning", [(0, 0, ""), (1, 1, ""), (2, 2, ""), (3, 0, "::warning::")])
def test_what_a_comparison_means(shell, tmp_path, code, ends, warning):
    """What `compare` ends with, and what the job does."""
    work = tmp_path / "work"
    (work / ".venv" / "bin").mkdir(parents=True)
    python = work / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    python.chmod(0o755)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"], ["branch", "base"],
                  ["commit", "-q", "--allow-empty", "-m", "two"]):  # fmt: skip
        subprocess.run([*git, *words], cwd=work, check=True)
    base = subprocess.run([*git, "rev-parse", "base"], cwd=work, capture_output=True, text=True).stdout.strip()
    found, output = shell(script("rows.yml", "compare", "--compare"), ROW="cpu", BASE="base", HEAD="HEAD")
    assert found == ends and f"-m harness matrix cpu --compare {base} HEAD" in output and warning in output
    assert ("::" in output) == bool(warning)


def test_history_keeps_the_last_nights(shell, tmp_path):
    """Against a repository of its own: three nights, two kept; the working tree and other branches stay as they are."""
    work = tmp_path / "work"
    setup = "git init -q --bare ../origin && git init -q . && git remote add origin ../origin && mkdir results empty"
    assert shell(setup) == (0, "")
    record = json.dumps({"schema": 1, **Verdict("t1-h64", "mine", "cpu", "passed").record()}) + "\n"
    for night in range(3):
        (work / "results" / "a.jsonl").write_text(record * (night + 1))
        (work / "results" / "cut.jsonl").write_text("")
        code, text = shell(f"sleep 1; {ROOT / '.ci' / 'history'} results nights{night}", KEEP="2")
        assert code == 0, text
    found = {path.name: [p.read_text().count("\n") for p in sorted(path.iterdir())] for path in work.glob("nights*")}
    assert found == {"nights0": [1], "nights1": [1, 2], "nights2": [2, 3]}
    code, text = shell(
        f"git -C ../origin log --format=%s history && git status --short && {ROOT / '.ci' / 'history'} empty last"
    )
    assert code == 0 and text.splitlines()[0] == "The last nights' results" and text.count("The last nights") == 1
    assert "A " not in text and len(list((work / "last").iterdir())) == 2  # a night without results changes nothing
    assert shell(f"git remote set-url origin nowhere; {ROOT / '.ci' / 'history'} results nights")[0] != 0


# -- other programs that check ----------------------------------------------------------------------------------------
@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint")
def test_actionlint():
    done = subprocess.run(["actionlint", *map(str, FILES)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / ".ci").iterdir()))
def test_shellcheck(path):
    done = subprocess.run(["shellcheck", ROOT / ".ci" / path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
