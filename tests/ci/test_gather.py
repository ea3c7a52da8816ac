"""ci/gather.py, `moe-harness summary`: what is missing, what fell below its floor, what people are shown."""

import json

import pytest

from harness import cli
from harness.ci import gather, matrix
from harness.results.verdict import Verdict
from tests.support.results_files import write_run

ROWS = """
[a]
runner = "r"
device = "cpu"
floor = {triton = 3}
minutes = 5
shards = 2

[b]
runner = ["self-hosted", "b"]
device = "cuda"
floor = {triton = 1}
minutes = 5
"""


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    (tmp_path / "matrix.toml").write_text(ROWS)
    monkeypatch.setattr(matrix, "PATH", tmp_path / "matrix.toml")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", matrix.ROW, matrix.SHARD):
        monkeypatch.delenv(name, raising=False)
    return matrix.read()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write("a", "1/2", "passed", "failed", first=1): a results file of this row and shard, cases from `first` on."""

    def go(row, shard, *statuses, first=1, name="", reason="off", backend="triton", device="cpu"):
        monkeypatch.setenv(matrix.ROW, row)
        monkeypatch.setenv(matrix.SHARD, shard)
        path = tmp_path / "results" / f"{name or row}-{shard[0]}.jsonl"
        found = [
            Verdict(f"t{tokens}-h64", backend, device, status, "layers", reason if status != "passed" else "")
            for tokens, status in enumerate(statuses, first)
        ]
        write_run(path, [verdict.record() for verdict in found])
        return path

    return go


@pytest.fixture
def go(tmp_path, capsys):
    """go(*words): exit code and the lines printed, of all results there are."""

    def run(*words):
        code = gather.main([str(tmp_path / "results"), *words])
        return code, capsys.readouterr().out.splitlines()

    return run


def test_a_whole_row_is_good(write, go):
    write("a", "1/2", "passed", "passed", "unsupported", reason="quant: no")
    write("a", "2/2", "mistrusted", first=9)
    code, lines = go()
    assert code == 0 and lines[-1] == "good: 3 verdicts executed"
    table = [line.split() for line in lines if line.startswith("a ")]
    assert table == [["a", "2", "of", "2", "2", "0", "1", "1", "3", "3"]]


def test_a_missing_shard_is_named(write, go):
    write("a", "2/2", "passed", "passed", "passed")
    code, lines = go()
    assert code == 1
    assert "a, shard 1/2: no results; its job did not run, or ended before its first verdict" in lines
    assert lines[-1] == "1 problem: 3 verdicts executed"


def test_a_shard_without_a_single_record_is_missing(write, go, tmp_path):
    write("a", "1/2", "passed", "passed", "passed")
    write("a", "2/2")
    assert (tmp_path / "results" / "a-2.jsonl").exists()
    assert go()[0] == 1


def test_the_floor_is_that_of_all_shards(write, go):
    write("a", "1/2", "passed", "unsupported")
    write("a", "2/2", "failed", first=5)
    code, lines = go()
    assert code == 1 and lines[-1] == "1 failed, 1 problem: 2 verdicts executed"
    assert any(line.startswith("a, floor: triton executed 2 verdicts, at least 3 are due") for line in lines)


def test_a_plan_is_what_must_be_there(write, go, rows):
    write("a", "1/2", "passed", "passed", "passed")
    write("a", "2/2", "passed", first=7)
    assert go("--plan", json.dumps(matrix.jobs([rows["a"]])))[0] == 0
    code, lines = go("--plan", json.dumps(matrix.jobs(rows.values())))
    assert code == 1 and "b, shard 1/1: no results; its job did not run, or ended before its first verdict" in lines
    assert any(line.startswith("b, floor: triton executed 0 verdicts, at least 1 are due") for line in lines)


def test_nothing_at_all_is_red(go, tmp_path, rows, capsys):
    (tmp_path / "results").mkdir()
    code, lines = go("--plan", json.dumps(matrix.jobs(rows.values())))
    assert code == 1 and lines[-1] == "5 problems: 0 verdicts executed"
    assert gather.main([str(tmp_path / "results")]) == 2  # without a plan: nothing says what should be there
    assert "must have *.jsonl files" in capsys.readouterr().err


@pytest.mark.parametrize("plan", ["", "{}", "[]", "null", '{"rows": {"include": [{}]}}'])
def test_a_plan_that_is_none(write, tmp_path, capsys, plan):
    write("a", "1/2", "passed")
    assert gather.main([str(tmp_path / "results"), "--plan", plan]) == 2
    assert "must be what `matrix --json` prints" in capsys.readouterr().err


def test_a_job_that_was_run_again_counts_once_and_last(write, go):
    write("a", "1/2", "failed", "passed", "passed", name="first")
    write("a", "2/2", "passed", first=7)
    assert go()[0] == 1
    path = write("a", "1/2", "passed", "passed", "passed", name="again")
    later = {"run": "later", "time": "2999-01-01T00:00:00+0000"}
    lines = [json.loads(line) | later for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, lines = go()
    assert code == 0 and lines[-1] == "good: 4 verdicts executed"


def test_a_row_that_is_not_in_the_file(write, go):
    write("old", "1/1", "passed")
    code, lines = go()
    assert code == 1 and "old: matrix.toml has no such row" in lines


def test_results_that_no_row_made_are_shown(write, go, tmp_path, monkeypatch):
    path = write("a", "1/2", "passed")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k not in ("row", "shard")}) + "\n" for r in records)
    )
    code, lines = go()
    assert code == 0 and any(line.startswith("(no row)") for line in lines)


def test_what_was_left_out_is_said(write, go):
    path = write("b", "1/1", "passed")
    path.write_text(path.read_text() + path.read_text()[:40])
    code, lines = go()
    assert code == 0 and "cut off" in lines[0]  # the run has an end: it lacks nothing
    path.write_text(path.read_text() + '\n{"schema": 4}\n')
    code, lines = go()
    assert code == 1 and f"1 record not valid, left out: {path}:6: schema=4: valid is 1 to 3" in lines[-2]


def test_a_run_that_was_killed_is_red_although_all_of_its_verdicts_are_green(write, go):
    path = write("b", "1/1", "passed", "passed")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    code, lines = go()
    assert code == 1 and lines[-1] == "1 problem: 1 verdict executed"
    assert lines[-2].startswith("b, shard 1/1, run ") and "1 of 2 planned cases without a verdict" in lines[-2]


def test_a_run_that_executed_nothing_is_red(write, go, monkeypatch):
    path = write("b", "1/1", "unsupported", reason="quant: no")
    path.write_text(path.read_text().replace('"row": "b", ', ""))
    code, lines = go()
    assert code == 1 and "no verdict was executed: nothing was tested" in lines


def test_a_row_of_very_many_shards_is_one_line(write, go):
    write("a", "1/9999", "passed", "passed", "passed")
    code, lines = go()
    missing = "a, 9998 of 9999 shards, 2/9999, 3/9999, 4/9999 and 9995 more: no results"
    assert code == 1 and sum("9999" in line for line in lines if missing not in line) == 1  # that of the table
    assert any(line.startswith(missing) for line in lines)
    path = write("a", "1/2", "passed")
    path.write_text(path.read_text().replace('"1/2"', '"1/100000000"'))
    assert any("shard='1/100000000': valid is" in line for line in go()[1])


# -- for people -------------------------------------------------------------------------------------------------------
def test_in_a_job_of_github_s(write, go, tmp_path, monkeypatch):
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    write("a", "1/2", "failed", reason="off by 100%")
    code, lines = go("--markdown", str(tmp_path / "own.md"))
    errors = [line for line in lines if line.startswith("::error")]
    assert code == 1 and len(errors) == 3 and lines[0].startswith("::stop-commands::")
    assert errors[0].startswith("::error::a, shard 2/2: no results") and errors[1].startswith(
        "::error::a, floor: triton"
    )
    line = "python3 -m harness run t1-h64 --backend triton --device cpu"
    assert errors[2] == f"::error file=cases/test_layers.py,title=failed%3A triton on cpu::off by 100%25%0A{line}"
    assert page.read_text() == "before\n" + (tmp_path / "own.md").read_text()


def test_a_record_gives_no_command_to_github(write, go, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    commands = "::error::mine\n::add-mask::x\n##[error]x\x1b[2J\u202e"
    path = write("b", "1/1", "failed", "unsupported", reason=commands, backend="\n::mine")
    path.write_text(path.read_text().replace('"reason": "', '"reason": "\\u001b[1m::error::raw\\n'))
    code, lines = go()
    token = lines[0].removeprefix("::stop-commands::")
    assert code == 1 and len(token) == 32 and lines.count(f"::{token}::") == 1
    shown = lines[1 : lines.index(f"::{token}::")]
    assert not [line for line in shown if line.strip().startswith("::") or "##[" in line or "\x1b" in line]
    rest = lines[len(shown) + 2 :]
    assert rest and all(line.startswith(("::error::", "::error file=", "::error title=")) for line in rest)
    assert not any("::mine" in line.partition("::error")[0] for line in rest)
    again = go()[1][0]
    assert again.startswith("::stop-commands::") and again != lines[0]


def test_elsewhere_there_are_no_commands_of_github_s(write, go):
    write("a", "1/2", "failed")
    assert not any(line.startswith("::") for line in go()[1])


def test_the_page(write, go, tmp_path):
    write("a", "1/2", "failed", "passed", "passed", reason="a|b <img src=x> `c` *d* & ````")
    write("a", "2/2", "unsupported", first=9, reason="quant: ```` | <script>")
    go("--markdown", str(tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("## moe-harness: 1 failed: 3 verdicts executed\n")
    assert "| row | shards | passed | failed |" in text and "| a | 2 of 2 | 2 | 1 | 0 | 1 | 3 | 3 |" in text
    assert "  ```\n  python3 -m harness run t1-h64 --backend triton --device cpu\n  ```\n" in text
    shown = text.partition("<details>")[0]
    assert r"a\|b &lt;img src=x&gt; \`c\` \*d\* &amp; \`\`\`\`" in shown and "<" not in shown
    block = text.partition("<details>")[2]  # the fence is longer than any that is told of
    assert block.count("\n`````\n") == 2 and "<script>" in block.split("\n`````\n")[1]


def test_a_page_of_many_failures_stays_short(write, go, tmp_path):
    write("b", "1/1", *["failed"] * 2000, reason="x" * 1000)
    assert go("--markdown", str(tmp_path / "page.md"))[0] == 1
    text = (tmp_path / "page.md").read_text()
    assert "- and 1950 more, in the results files" in text and len(text) < 100_000  # GitHub shows 1 MiB


def test_the_command(write, tmp_path, capsys):
    write("b", "1/1", "passed")
    assert cli.main(["summary", str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out.endswith("good: 1 verdict executed\n")
    assert cli.main(["summary", str(tmp_path / "none")]) == cli.main(["summary", str(tmp_path), "--plan", "x"]) == 2
