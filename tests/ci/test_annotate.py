"""ci/annotate.py: escaping, GitHub's limit, and the file of a case. The gathered summary: tests/ci/test_gather.py."""

import pytest

from harness.ci import annotate
from harness.ci.annotate import Annotation, commands, family_file
from harness.results.verdict import Verdict


@pytest.mark.parametrize(
    "annotation, line",
    [
        (Annotation("plain"), "::error::plain"),
        (Annotation("a", "warning", file="c.py"), "::warning file=c.py::a"),
        (Annotation("100%\r\nof a: b, c::d", title="a: b, 5%\nc", file="a,b.py"),
         "::error file=a%2Cb.py,title=a%3A b%2C 5%25%0Ac::100%25%0D%0Aof a: b, c::d"),
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


def failed(case, status="failed", nodeid="", **more):
    return Verdict(case, "mine", "cuda", status, reason="off\nby one", **more).record() | {"nodeid": nodeid}


def test_failures_of_one_file_are_one_annotation():
    nodeid = "cases/test_low_latency.py::test_low_latency[x]"
    other = "cases/test_errors.py::test_errors[x]"
    many = [failed(f"t3-h{h}-i48-e32-k2-bf16-random", nodeid=nodeid) for h in (80, 136, 320)]
    green = [failed("t1-h64", "passed"), failed("t4-h128", "mistrusted"), failed("t5-h64", "unsupported")]
    annotations = annotate.failures([*many, failed("t2-h64", "crashed", other), failed("t1-h64"), *green])
    assert [a.file for a in annotations] == ["cases/test_low_latency.py", "cases/test_errors.py", ""]
    assert [a.title for a in annotations] == ["failed: mine on cuda", "crashed: mine on cuda", "failed: mine on cuda"]
    assert annotations[0].text == (
        "off by one (and 2 more cases)\n"
        "python3 -m harness run t3-h80-i48-e32-k2-bf16-random --backend mine --device cuda"
    )


@pytest.mark.parametrize(
    "nodeid",
    [
        "", "cases/none.py::x", "::", "/etc::x", "/etc/passwd::x", "cases::x", "../../../../../etc/passwd::x",
        "cases/../README.md::x", "a" * 5000 + "::x", "a\0b::x", "/dev/zero::x", ".::x",
    ],
)  # fmt: skip
def test_no_file_is_invented(nodeid):
    assert family_file({"nodeid": nodeid}) == "" == family_file({})


def test_the_file_is_relative_to_the_repository(tmp_path):
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "test_mine.py").touch()
    assert family_file({"nodeid": "cases/test_mine.py::test_mine[t1-h64:mine:cpu]"}, tmp_path) == "cases/test_mine.py"


def test_a_link_that_leads_out_of_the_checkout_is_not_followed(tmp_path):
    inside = tmp_path / "checkout"
    inside.mkdir()
    (tmp_path / "secret").touch()
    (inside / "link.py").symlink_to(tmp_path / "secret")
    (inside / "circle.py").symlink_to(inside / "circle.py")
    assert family_file({"nodeid": "link.py::x"}, inside) == family_file({"nodeid": "circle.py::x"}, inside) == ""
