"""Random sequences of calls, swaps, conversions, shared scratch objects and errors on prepared layers.

A backend that keeps state between calls (an instance, a scratch object, a buffer, a converted weight) is correct until
a change that it does not check. No list of scenarios covers all changes. Each row runs a few sequences, drawn from all
changes that the backend promises to follow (harness/scenarios/stateful/sequences.py); another seed draws other
sequences.
"""

from harness.problem.families import sweep

FAMILY = "sequences"
ROWS = {
    **sweep("t5-h64-i32-e4-k2-bf16-exact-s{s}-sequence.calls", "plain layers, with conversions", s=(0, 1)),
    **sweep("t5-h64-i32-e4-k2-bf16-kn-exact-s{s}-sequence.calls", "the state of a cached instance", s=(0, 1)),
    "t5-h72-i40-e4-k2-bf16-e4m3.block.none-kn-bias-exact-sequence.calls": "scales, biases and ragged blocks in a cached instance",
    "t5-h64-i32-e4-k2-bf16-e4m3.channel.token-exact-sequence.calls": "scales that are converted once",
    "t5-h64-i32-e4-k2-bf16-bias-ep2.1-kn-exact-sequence.calls": "expert_map and biases",
    "t2-h64-i32-e16-k2-bf16-exact-sequence.calls": "batches on both sides of the low-latency threshold",
    "t20-h64-i32-e4-k2-bf16-exact-sequence.calls": "several chunks; more rows than a scratch object holds",
    "t5-h64-i32-e4-k2-fp32-gelu-random-sequence.calls": "activations and scales that the exact fill cannot distinguish",
}  # fmt: skip


def test_sequences(check):
    check()
