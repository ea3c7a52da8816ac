"""Random sequences of calls, swaps, conversions, shared scratch objects and errors under prepared layers.

Whoever keeps something between two calls (an instance, a scratch object, a buffer, a converted weight) is right until
something changes that it did not look at. No list of scenarios has them all: each row is a few sequences, drawn from
everything that the backend promises and follows (harness/scenarios/stateful/sequences.py), and another seed is other sequences.
"""

from harness.problem.families import sweep

FAMILY = "sequences"
ROWS = {
    **sweep("t5-h64-i32-e4-k2-bf16-exact-s{s}-sequence.calls", "plain layers, conversions among them", s=(0, 1)),
    **sweep("t5-h64-i32-e4-k2-bf16-kn-exact-s{s}-sequence.calls", "what a cached instance keeps", s=(0, 1)),
    "t5-h72-i40-e4-k2-bf16-e4m3.block.none-kn-bias-exact-sequence.calls": "scales, biases and ragged blocks under an instance",
    "t5-h64-i32-e4-k2-bf16-e4m3.channel.token-exact-sequence.calls": "scales that were converted once",
    "t5-h64-i32-e4-k2-bf16-bias-ep2.1-kn-exact-sequence.calls": "expert_map and biases",
    "t2-h64-i32-e16-k2-bf16-exact-sequence.calls": "from one path to the other, around the low-latency threshold",
    "t20-h64-i32-e4-k2-bf16-exact-sequence.calls": "several chunks; more rows than a scratch object has",
    "t5-h64-i32-e4-k2-fp32-gelu-random-sequence.calls": "activations and scales that an exact fill cannot tell apart",
}  # fmt: skip


def test_sequences(check):
    check()
