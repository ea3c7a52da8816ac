"""Every pair of options together: clamps with scales, biases with a map, int64 ids with the router weight on the input.

The other families vary one option at a time. Engines ship combinations and fix them one by one (vLLM added the swiglu
limit to four backends in four PRs: 41986, 42287, 42541, 42855).
"""

from harness.problem.pairwise import pairwise

FAMILY = "pairs"
ROWS = pairwise(
    "two options that no other row combines",
    size=("t9-h136-i72-e6", "t3-h128-i64-e32", "t21-h64-i136-e4"),
    top_k=("k2", "k1", "k4"),
    dtype=("bf16", "fp16", "fp32"),
    quant=("", "e4m3.block.group", "e4m3.channel.token", "e4m3.tensor.static", "e4m3.tensor.tensor", "e5m2.block.none", "e4m3.channel.none"),
    activation=("", "gelu", "swigluoai", "relu2", "gelu_tanh"),
    limit=("", "limit2"),
    bias=("", "bias"),
    on_input=("", "win"),
    layout=("", "kn"),
    ep=("", "ep2.1", "ep2.0s"),
    ids=("", "ids64"),
    padded=("", "padded"),
    routing=("", "invalid", "duplicate", "one"),
    fill=("random",),
)  # fmt: skip


def test_pairs(check):
    check()
