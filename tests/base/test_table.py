"""The tables that reports are printed with."""

from harness.base.table import aligned, labelled, markdown


def test_columns_are_as_wide_as_their_widest_cell_and_no_line_ends_in_spaces():
    rows = [("name", "n", ""), ("a", "118", "yes")]
    assert aligned(rows) == ["name  n", "a     118  yes"]
    assert aligned(rows, right={1}, gap=1, indent=2) == ["  name   n", "  a    118 yes"]
    assert aligned(rows, widths=(6, 4)) == ["name    n", "a       118   yes"]
    assert aligned([]) == [] and aligned([("alone",)]) == ["alone"]


def test_a_markdown_cell_may_hold_a_bar():
    table = markdown(("case", "n"), [("a|b", "1"), (r"a\|b", "2")], right={1})
    assert table == ["| case | n |", "| --- | ---: |", r"| a\|b | 1 |", r"| a\|b | 2 |"]


def test_values_stand_below_one_another_whatever_their_labels():
    lines = labelled([("plan", "exact"), ("over budget", "max"), ("pattern", "one"), ("pattern", "two"), ("", "three")])
    assert lines == [
        "  plan          exact",
        "  over budget   max",
        "  pattern       one",
        "                two",
        "                three",
    ]
    assert labelled([("a label of twenty two", "x"), ("b", "y")], indent=0) == [
        "a label of twenty two x",
        f"b{'':20} y",
    ]
    assert labelled([]) == []
