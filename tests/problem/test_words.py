"""problem/words.py: a descriptor in words, on the page, in a terminal and in the glossary."""

import re
from dataclasses import fields

import pytest

from harness.problem import words
from harness.problem.case import ACTIVATIONS, FILLS, GRAMMAR, LAYOUTS, ROUTINGS, Case, Problem


def test_the_tokens_of_a_descriptor():
    tokens = "t16-h256-bf16-e4m3.block.group-ep4.1s-ids64-win-skewed-limit7-swap.copy_-what"
    meanings = words.meanings(tokens.split("-"))
    assert meanings["t16"] == ("tokens", "16") and meanings["ids64"] == ("topk_ids", "int64")
    assert meanings["e4m3.block.group"] == ("quantization", "e4m3 weights scaled per block, activations e4m3 per group")
    assert meanings["ep4.1s"] == ("expert parallelism", "rank 1 of 4, experts dealt out in turn")
    assert meanings["win"] == ("router weight on input", "applied on input") and meanings["limit7"] == ("clamp", "7")
    assert meanings["what"] == ("unknown", "what") and meanings["swap.copy_"] == ("scenario", "swap.copy_")
    assert words.defaults()["layout"].startswith("nk") and words.defaults()["topk_ids"] == "int32"


@pytest.mark.parametrize(
    "field, values",
    [("activation", ACTIVATIONS), ("layout", LAYOUTS), ("routing", ROUTINGS), ("fill", FILLS)],
)
def test_every_word_of_the_grammar_has_a_meaning(field, values):
    assert set(words.MEANINGS[field]) == set(values)


def test_the_glossary_has_every_token_of_the_grammar():
    tokens = {token: name for token, name, _ in words.glossary()}
    for rule in GRAMMAR:
        examples = rule.example.split("|")
        assert all(re.fullmatch(rule.pattern, token) for token in examples)
        assert {tokens.pop(token) for token in examples} == {words.NAMES.get(rule.field, rule.field.replace("_", " "))}
    assert tokens == {}
    assert ("win", "router weight on input", "applied on input") in words.glossary()
    assert ("uniform", "routing", "all experts alike (default)") in words.glossary()


def test_a_case_in_words():
    case = Case.parse("t4-h64-i32-e8-k1-bf16-e4m3.block.group-win-kn-ep4.1s-shared2-beyond-exact-s3")
    assert (
        "\n".join(words.in_words(case))
        == """\
  sizes         4 tokens of 64, top 1 of 8 experts of 32
  dtype         bf16, e4m3 weights scaled per block, activations e4m3 per group
  layout        kn: w13 [E, K, 2I], w2 [E, I, K]; w13 is 2x64x64
  activation    silu: silu(g) * u
  topk_ids      int32, beyond: some slots have ids that are no expert's, on either side of the range
  options       router weight on input: applied on input
                expert parallelism: rank 1 of 4, experts dealt out in turn
                shared experts: 2
  fill          exact: every correct kernel gives the same bits; seed 3
  scenario      once: one call"""
    )


@pytest.mark.parametrize("field", [f.name for f in fields(Problem) if f.name in words.OPTIONS])
def test_an_option_is_described_only_if_it_is_set(field):
    name = words.NAMES.get(field, field.replace("_", " "))
    token = {"bias": "bias", "router_weight_on_input": "win", "ep": "ep4.1", "shared_experts": "shared1"}
    plain = "t4-h64-i32-e8-k1-bf16-exact"
    assert f"{name}: " not in "\n".join(words.in_words(Case.parse(plain)))
    assert f"{name}: " in "\n".join(words.in_words(Case.parse(f"{plain}-{token.get(field, field)}")))
