"""ci/annotate.py: escaping, GitHub's limit, and the line of a case. What is gathered: tests/ci/test_gather.py."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

from harness import device
from harness.base.processes import ROOT
from harness.ci import annotate
from harness.ci.annotate import Annotation, commands, location
from harness.problem import families
from harness.results.verdict import Verdict


@pytest.mark.parametrize(
    "annotation, line",
    [
        (Annotation("plain"), "::error::plain"),
        (Annotation("a", "warning", file="c.py"), "::warning file=c.py::a"),
        (Annotation("100%\r\nof a: b, c::d", title="a: b, 5%\nc", file="a,b.py", line=3),
         "::error file=a%2Cb.py,line=3,title=a%3A b%2C 5%25%0Ac::100%25%0D%0Aof a: b, c::d"),
        (Annotation("::stop-commands::x"), "::error::::stop-commands::x"),
    ],
)  # fmt: skip
def test_a_command_is_one_line_whatever_the_text(annotation, line):
    assert annotation.command() == line and "\n" not in line


@pytest.mark.parametrize("count, last", [(10, "::error::9"), (11, "::error::and 2 more: see the job's summary")])
def test_what_github_would_drop_is_counted(count, last):
    lines = commands([Annotation(str(n)) for n in range(count)] + [Annotation("w", "warning")])
    errors = [line for line in lines if line.startswith("::error")]
    assert len(errors) == 10 and errors[-1] == last and lines[-1] == "::warning::w"


def red(case, status="failed", nodeid="", **more):
    return Verdict(case, "mine", "cuda", status, reason="off\nby one", **more).record() | {"nodeid": nodeid}


def test_failures_of_one_line_are_one_annotation():
    where = "cases/test_low_latency.py::test_low_latency[x]"
    cases = [f"t4-h128-i64-e64-k{k}-bf16-extreme" for k in (1, 2)]
    many = [red(f"t3-h{h}-i48-e32-k2-bf16-random", nodeid=where) for h in (80, 136, 320)]
    found = annotate.failures([*many, red("t1-h64"), red("t1-h64", "passed"), *(red(c, "mistrusted") for c in cases)])
    assert [(a.file, bool(a.line)) for a in found] == [("cases/test_low_latency.py", True), ("", False)]
    assert found[0].title == "failed: mine on cuda"
    assert found[0].text == (
        "off by one (and 2 more cases of this line)\n"
        "python3 -m harness run t3-h80-i48-e32-k2-bf16-random --backend mine --device cuda"
    )


# -- where a case stands ----------------------------------------------------------------------------------------------
def really(module, monkeypatch):
    """{case: lines} of a family: where its descriptor, or the template that sweep() made that of, is written."""
    made: list[tuple[str, int]] = []
    sweep = families.sweep

    def told(template, why, **values):
        rows, line = sweep(template, why, **values), sys._getframe(1).f_lineno
        made.extend((descriptor, line) for descriptor in rows)
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(families, "sweep", told)
        runpy.run_path(module.__file__)
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Constant) and re.fullmatch(r"t\d+-h\d[^{}]*-k\d[^{}]*", str(node.value)):
            made.append((node.value, node.lineno))
    found: dict[str, set[int]] = {}
    for descriptor, line in made:
        for case in families.expand(descriptor):
            found.setdefault(str(case), set()).add(line)
    return found


def test_a_row_that_is_made_of_options_is_where_rows_begins():
    name = "cases/test_pairs.py"
    pairs = next(module for module in families.families() if module.FAMILY == "pairs")
    case = families.rows(pairs, on_cpu=True)[0].case
    line = location({"case": str(case), "nodeid": f"{name}::test_pairs[{case}:mine:cpu]"})[1]
    assert (ROOT / name).read_text().splitlines()[line - 1] == "ROWS = pairwise("


def test_every_case_of_the_battery_is_found(monkeypatch):
    device.start({"cpu"})
    count, wrong = 0, []
    for module in families.families():
        name = f"cases/{Path(module.__file__).name}"
        for case, lines in really(module, monkeypatch).items():
            count += 1
            found = location({"case": case, "nodeid": f"{name}::test_x[{case}:mine:cpu]"})
            if found not in {(name, line) for line in lines}:
                wrong.append((case, found, lines))
    assert count > 1000 and all(name and line for _, (name, line), _ in wrong)
    # Of two templates that differ in what is computed only, and fit as well, the first is taken.
    assert len(wrong) < 0.01 * count, wrong[:5]


def test_a_seed_that_was_chosen_changes_nothing():
    name = "cases/test_low_latency.py"
    both = [location({"case": f"t3-h80-i48-e32-k2-bf16-random{s}", "nodeid": f"{name}::x"}) for s in ("", "-s7")]
    assert both[0] == both[1] and both[0][1]


@pytest.mark.parametrize("nodeid", ["", "cases/none.py::x", "::", "/etc::x"])
def test_no_place_is_made_up(nodeid):
    assert location({"case": "t1-h64-i64-e4-k2-bf16-exact", "nodeid": nodeid}) == ("", 0)


def test_a_case_that_no_row_makes_has_the_file_only():
    record = {"case": "t1-h1-i1-e3-k3-fp32-exact", "nodeid": "cases/test_low_latency.py::x"}
    assert location(record) == ("cases/test_low_latency.py", 0)


def test_rows_as_they_are_written(tmp_path):
    (tmp_path / "mine.py").write_text(
        'ROWS = {\n    "t1-h64-i64-e4-k2-bf16": "spelt out",\n'
        '    **sweep("t{t}-h64-i64-e4-k2-{d}-{o}", "", t=(2, 3), d=("bf16",), o=("", "bias-kn")),\n'
        '    **sweep("t{t}-h" + SIZE + "-i64-e4-k2-fp16", "", t=SOME),\n'
        '    **sweep(f"t{{t}}-h{h}-i64-e4-k2-fp32-{{o}}", "", t=(1, 2), o=("", "kn")),\n}\n'
    )

    def line(case):
        return location({"case": case, "nodeid": "mine.py::test[x]"}, tmp_path)[1]

    assert line("t1-h64-i64-e4-k2-bf16-exact") == line("t1-h64-i64-e4-k2-bf16-random-s3") == 2
    assert line("t2-h64-i64-e4-k2-bf16-random") == line("t3-h64-i64-e4-k2-bf16-bias-kn-random") == 3
    assert line("t4-h64-i64-e4-k2-bf16-random") == 0
    assert line("t9-h128-i64-e4-k2-fp16-exact") == 4 and line("t9-h128-i64-e4-k2-fp16-kn-exact") == 0
    assert line("t1-h32-i64-e4-k2-fp32-kn-exact") == line("t1-h32-i64-e4-k2-fp32-exact") == 5
