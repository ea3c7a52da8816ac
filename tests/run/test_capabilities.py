"""run/capabilities.py: what is declared against what happens, on backends that declare more than they do."""

import json

import pytest

from harness.cli import main
from harness.problem.case import Case
from harness.run import capabilities


def ran(capsys, *arguments):
    code = main(["capabilities", *arguments])
    return code, capsys.readouterr().out


def corners(capsys, name, *wanted):
    words = [f"--corner={corner}" for corner in wanted]
    code, out = ran(capsys, f"--backend=tests.support.pretenders:{name}", "--json", *words)
    return code, {found["corner"]: found for found in map(json.loads, out.splitlines())}


def test_every_corner_is_a_layer_that_can_be_asked_and_a_different_one():
    asked = [capabilities.corner_of(base, c) for base in capabilities.BASES[:1] for c in capabilities.CORNERS]
    assert len({str(Case.parse(text)) for text in asked}) >= len(asked) - 3  # bf16, nk: the base has them


@pytest.mark.parametrize(
    "corner, word, detail",
    [
        ("limit1", "ignored", "clamp missing"),
        ("k1-win", "doubled", "router weight applied twice"),
        ("gelu", "wrong", ""),
        ("bias", "crashed", "RuntimeError: no kernel for biases"),
        ("shared1", "crashed", "the process ended with exit code 3"),
        ("relu2", "right", ""),
    ],
)
def test_a_flag_that_is_accepted_and_not_heeded_is_told_from_one_that_is(capsys, corner, word, detail):
    code, found = corners(capsys, "Pretender", corner)
    assert code == int(word != "right")
    assert found[corner]["word"] == word and detail in found[corner]["detail"]
    assert Case.parse(found[corner]["case"])


def test_what_is_refused_is_not_run_and_no_fault(capsys):
    code, found = corners(capsys, "Honest", "bias", "k1")
    assert code == 0 and found["bias"]["word"] == "refused" and found["k1"]["word"] == "right"


def test_the_table_says_where_a_package_promises_what_its_adapter_refuses(capsys):
    code, out = ran(
        capsys, "--backend=tests.support.pretenders:Honest", "--corner=bias", "--corner=swigluoai", "--corner=k1"
    )
    lines = out.splitlines()
    assert code == 0 and lines[0] == "emulated on cpu" and lines[-1] == "  2 right, 1 refused"
    assert lines[1].split() == ["bias", "refused", "bias:", "none", "here", "!", "the", "package", "accepts", "it"]
    assert lines[3].startswith("  k1 ") and "!" not in lines[3]


def test_a_backend_that_supports_nothing_plain_is_said_to(capsys):
    code, out = ran(capsys, "--backend=tests.support.pretenders:Nothing")
    assert code == 0 and out.splitlines()[-1] == "  it supports no plain layer"


def test_a_backend_that_cannot_run_here_is_an_error_that_says_why(capsys):
    assert main(["capabilities", "--backend=tests.made_up_elsewhere:None"]) == 2
    assert "cannot import" in capsys.readouterr().err
