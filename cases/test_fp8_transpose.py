"""FP8 transpose shapes: each layout with its weights and scales, at sizes where a wrong transpose has legal shapes.

vLLM PR 40109: weights transposed for one XPU backend reached another one ("Hidden size mismatch 2048 != 384").
"""

from harness.problem.families import sweep

FAMILY = "fp8_transpose"
SCHEMES = (
    "tensor.none", "tensor.static", "tensor.tensor", "tensor.token", "channel.none", "channel.token", "block.none", "block.group",
)  # fmt: skip
SHAPES = {
    "h256-i128": "K == 2I: w13 is square, so a missing or a second transpose keeps every shape legal",
    "h128-i128": "K == I: w2 is square",
    "h192-i96": "neither K nor I is a multiple of 128: ragged blocks, and the gate/up boundary inside a block",
    "h136-i136": "K and I just over a block",
}
ROWS = {
    row: why
    for shape, reason in SHAPES.items()
    for row, why in sweep("t9-" + shape + "-e4-k2-bf16-e4m3.{s}-{l}", reason, s=SCHEMES, l=("nk", "kn")).items()
}
ROWS |= {
    **sweep("t9-{h}-e4-k2-bf16-e5m2.{s}-{l}", "the other weight format, square and ragged", h=("h256-i128", "h192-i96"), s=SCHEMES, l=("nk", "kn")),
    **sweep("t7-h384-i128-e4-k2-fp16-e4m3.{s}-{l}", "fp16 hidden_states", s=SCHEMES, l=("nk", "kn")),
    **sweep("t33-h128-i256-e3-k2-bf16-e4m3.{s}-kn-bias", "biases are added after the scales", s=SCHEMES),
    **sweep("t12-h128-i128-e4-k2-bf16-e4m3.{s}-{l}-ep2.1", "scales of the local experts of a rank", s=("channel.token", "block.group"), l=("nk", "kn")),
    **sweep("t12-h256-i128-e4-k2-bf16-e4m3.block.{a}-{l}-{g}", "interleaved and ungated w13 under block scales",
            a=("none", "group"), l=("nk", "kn"), g=("swigluoai", "relu2")),
    **sweep("t5-h128-i64-e4-k2-bf16-e4m3.block.group-{l}", "2I is one block: gate and up share a scale", l=("nk", "kn")),
    **sweep("t5-h64-i64-e4-k2-bf16-e4m3.{s}-{l}", "each weight fits in one block", s=SCHEMES, l=("nk", "kn")),
    **sweep("t6-h320-i192-e4-k2-bf16-{f}.block.{a}-kn-{r}", "transposed block scales with slots that have no expert",
            f=("e4m3", "e5m2"), a=("none", "group"), r=("invalid", "half")),
}  # fmt: skip


def test_fp8_transpose(check):
    check()
