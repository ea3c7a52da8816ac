"""results/known_failures.py: a known failure is excused only if it fails as known, and hides nothing else."""

from fnmatch import fnmatchcase

import pytest

from harness import backend
from harness.device import Device
from harness.problem import families as batteries
from harness.results import known_failures
from harness.results.verdict import Verdict
from tests.plugin.test_plugin import row, run, suite

__all__ = ["suite"]  # a fixture
pytest_plugins = ["pytester"]

ENTRY = """
[[known]]
backend = "mine"
cases = "t*-h64-*"
says = "off by"
found = "2026-11-23"
shows = "t2-h64-i64-e4-k2-bf16-exact"
why = "one is added"
"""


def entries(tmp_path, text):
    path = tmp_path / "ledger.toml"
    path.write_text(text)
    return known_failures.read(path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('why = "one is added"', "", "entry 1 has no why"),
        ('says = "off by"', "", "entry 1 has no says"),
        ("says", "sais", "sais: no such field; did you mean 'says'.; valid: backend, cases, says"),
        ('found = "2026-11-23"', "", "needs either issue"),
        ('found = "2026-11-23"', 'issue = "#12"', "issue='#12': must be an address"),
        ("2026-11-23", "yesterday", "found='yesterday': must be a date, such as 2026-11-23: Invalid isoformat"),
        ('"off by"', '"("', r"says='\(': must be a regular expression: missing"),
        ("t2-h64-i64-e4-k2-bf16-exact", "t2-h64", "shows='t2-h64': must be a descriptor: "),
        ('cases = "t*-h64-*"', "cases = [1]", r"cases=\[1\]: must be text or a list of texts"),
        ('why = "one is added"', "why = 1", "why=1: must be text"),
        ("[[known]]", 'status = "red"\n[[known]]', "status: every entry is a table"),
        ('why = "one', 'status = "red"\nwhy = "one', "status='red'; valid: failed, crashed, hung"),
        ("[[known]]", "[[known", "Expected"),
    ],
)
def test_an_entry_that_says_too_little_or_nonsense_is_refused_by_name(tmp_path, old, new, message):
    assert ENTRY.count(old) == 1
    with pytest.raises(known_failures.LedgerError, match=message):
        entries(tmp_path, ENTRY.replace(old, new))


def test_a_ledger_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(known_failures.LedgerError, match="No such file"):
        known_failures.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "more, case, name, device, covered",
    [
        ("", "t2-h64-exact", "mine", "cpu", True),
        ("", "t2-h128-exact", "mine", "cpu", False),
        ("", "t2-h64-exact", "yours", "cpu", False),
        ('but = "*-exact"', "t2-h64-exact", "mine", "cpu", False),
        ('but = "*-exact"', "t2-h64-random", "mine", "cpu", True),
        ('devices = ["xpu"]', "t2-h64-exact", "mine", "cpu", False),
        ('devices = ["xpu"]', "t2-h64-exact", "mine", "xpu (emulated)", True),
    ],
)
def test_which_cases_an_entry_is_about(tmp_path, more, case, name, device, covered):
    (entry,) = entries(tmp_path, ENTRY + more)
    assert entry.covers(case, name, device) == covered


@pytest.mark.parametrize(
    "status, reason, more, after",
    [
        ("failed", "off by one", "", "known"),
        ("failed", "NaN", "", "failed"),
        ("crashed", "off by one", "", "crashed"),
        ("crashed", "off by one", 'status = "crashed"', "known"),
        ("passed", "", "", "failed"),
        ("mistrusted", "few", "", "failed"),
        ("passed", "", 'sometimes = "it reads what nobody wrote"', "passed"),
        ("unsupported", "quant: no", "", "unsupported"),
    ],
)
def test_only_what_fails_as_it_is_known_to_is_known(tmp_path, status, reason, more, after):
    known = entries(tmp_path, ENTRY + more)
    verdict = known_failures.judged(Verdict("t2-h64-exact", "mine", "cpu", status, reason=reason), known)
    assert verdict.status == after
    if after == "known":
        assert verdict.known == "one is added (found here 2026-11-23)" and verdict.reason == reason
    elif status == "failed":
        assert "but otherwise: failed, 'off by'" in verdict.report
    elif after == "failed":
        assert "take the entry out of the ledger" in verdict.reason


def test_a_run_excuses_what_is_known_and_says_so(suite):
    made = suite(1, 2, row(2, "-random"))
    made.makefile(".toml", ledger=ENTRY.replace("t*-h64-*", "t2-*-exact"))
    result = run(made, "--ledger=ledger.toml")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "mine@cpu   1/1/0/0/1 3.25",
            "A fifth number: known failures*",
            "Known failures (cases/ledger.toml), which failed again:",
            "  1  mine@cpu: one is added (found here 2026-11-23)",
            "Executed 3 verdicts*: 1 passed, 1 failed, 1 known.",
        ]
    )
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "xfailed": 1}


def test_a_run_is_red_when_what_is_known_passes(suite):
    made = suite(1)
    made.makefile(".toml", ledger=ENTRY)
    result = run(made, "--ledger=ledger.toml")
    assert result.ret == 1 and result.parseoutcomes() == {"failed": 1}
    result.stdout.fnmatch_lines(["*it passed, but the ledger knows it to fail (found here 2026-11-23: one is added)*"])


def test_a_wrong_ledger_ends_the_run_before_it_begins(suite):
    made = suite(1)
    made.makefile(".toml", ledger=ENTRY.replace("why", "because"))
    result = run(made, "--ledger=ledger.toml")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*--ledger ledger.toml: entry 1: because: no such field*"])


@pytest.mark.parametrize(("spec", "options"), [("mine:Mine", ()), ("mine:Ends", ("--in-process",))])
def test_what_is_known_to_end_the_process_ends_one_of_its_own(suite, spec, options):
    """Made up, it ends the worker; in one process it runs in a new interpreter, where the backend itself ends it."""
    made = suite(6)
    text = ENTRY.replace("mine", spec.partition(":")[2].lower()).replace("off by", "exit code 3")
    made.makefile(".toml", ledger=text + 'status = "crashed"')
    result = run(made, "--ledger=ledger.toml", *options, spec=spec)
    assert result.ret == 0 and result.parseoutcomes() == {"xfailed": 1}


# -- the ledger of this repository ------------------------------------------------------------------------------------
KNOWN = known_failures.read()
EVERY = {
    str(row.case)
    for module in batteries.untimed()
    for device in (Device("cpu"), Device("cuda"))
    for row in batteries.rows(module, device.on_cpu)
}


@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: f"{entry.backend[0]}: {entry.why[:40]}")
def test_every_entry_is_about_cases_that_are_asked(entry):
    assert set(entry.backend) <= {b.name for b in backend.installed()}
    assert all(entry.covers(entry.shows, name, (entry.devices or ("cpu",))[0]) for name in entry.backend)
    for glob in entry.cases + entry.but:
        assert any(fnmatchcase(case, glob) for case in EVERY), f"{glob}: the suite has no such case"
