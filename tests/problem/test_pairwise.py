"""Rows in which every two options meet."""

from itertools import combinations, product

from cases import test_pairs
from harness.problem.case import Case, DescriptorError
from harness.problem.pairwise import pairwise

OPTIONS = dict(
    size=("t3-h64-i32-e4", "t5-h64-i32-e6"), top_k=("k1", "k2"), dtype=("bf16", "fp32"), quant=("", "e4m3.block.none"),
    activation=("", "relu2"), limit=("", "limit2"), on_input=("", "win"), ep=("", "ep2.1"), layout=("", "kn"),
)  # fmt: skip


def held(row: str, tokens: str) -> bool:
    return all(token in row.split("-") for token in tokens.split("-") if token)


def absent(row: str, name: str) -> bool:
    return not any(held(row, option) for option in OPTIONS[name] if option)


def meet(row: str, a: tuple[str, str], b: tuple[str, str]) -> bool:
    return all(held(row, option) if option else absent(row, name) for name, option in (a, b))


def possible(pair: dict[str, str]) -> bool:
    for rest in product(*(values for name, values in OPTIONS.items() if name not in pair)):
        chosen = pair | dict(zip((name for name in OPTIONS if name not in pair), rest))
        try:
            Case.parse("-".join(chosen[name] for name in OPTIONS if chosen[name]))
        except DescriptorError:
            continue
        return True
    return False


def test_every_two_options_that_can_meet_do():
    rows = pairwise("why", **OPTIONS)
    for first, second in combinations(OPTIONS, 2):
        for a, b in product(OPTIONS[first], OPTIONS[second]):
            found = any(meet(row, (first, a), (second, b)) for row in rows)
            assert found == possible({first: a, second: b}), (first, a, second, b)


def test_few_rows_hold_many_pairs():
    rows = pairwise("why", **OPTIONS)
    assert len(rows) < 20 < 2 ** len(OPTIONS)
    assert set(rows.values()) == {"why"}


def test_rows_are_descriptors_and_the_same_every_time():
    rows = pairwise("why", **OPTIONS)
    for row in rows:
        Case.parse(row)
    assert list(rows) == list(pairwise("why", **OPTIONS))


def test_what_no_descriptor_can_hold_is_left_out():
    rows = pairwise("why", size=("t3-h64-i32-e4-k2",), dtype=("bf16", "fp32"), quant=("", "e4m3.block.none"))
    assert not any("fp32-e4m3" in row for row in rows)
    assert any("bf16-e4m3" in row for row in rows) and any(row.endswith("fp32") for row in rows)


def test_without_a_valid_row_there_is_none():
    assert pairwise("why", size=("t3-h64-i32-e4-k9",), dtype=("bf16", "fp32")) == {}


def test_the_family_stays_small():
    assert 20 < len(test_pairs.ROWS) < 80
