"""base/suggest.py: a misspelt word."""

from harness.base.suggest import did_you_mean


def test_a_close_word_is_suggested():
    assert did_you_mean("swap.copi_", ["once", "swap.copy_", "swap.data"]) == "; did you mean 'swap.copy_'?"


def test_a_word_that_is_close_to_none_gets_no_suggestion():
    assert did_you_mean("zzz", ["once", "swap.copy_"]) == "" == did_you_mean("once", [])


def test_a_long_word_is_not_compared():
    assert did_you_mean("x" * 10**7, ["x" * 10**7]) == ""
