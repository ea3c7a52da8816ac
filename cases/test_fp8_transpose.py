"""FP8 transpose shapes: each backend layout with its weights and scales, where a wrong transpose still has legal shapes.

vLLM PR 40109: weights were transposed for one XPU backend and handed to another ("Hidden size mismatch 2048 != 384").
"""

from harness.problem.families import sweep

FAMILY = "fp8_transpose"
SCHEMES = (
    "tensor.none", "tensor.static", "tensor.tensor", "tensor.token", "channel.none", "channel.token", "block.none", "block.group",
)  # fmt: skip
SHAPES = {
    "h256-i128": "K == 2I: w13 is square, a missing or double transpose keeps every shape legal",
    "h128-i128": "K == I: w2 is square",
    "h192-i96": "neither K nor I a multiple of 128: ragged blocks, and the gate/up boundary falls inside a block",
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
    **sweep("t33-h128-i256-e3-k2-bf16-e4m3.{s}-kn-bias", "biases come after the scales", s=SCHEMES),
    **sweep("t12-h128-i128-e4-k2-bf16-e4m3.{s}-{l}-ep2.1", "scales of local experts", s=("channel.token", "block.group"), l=("nk", "kn")),
    **sweep("t12-h256-i128-e4-k2-bf16-e4m3.block.{a}-{l}-{g}", "interleaved and ungated halves under block scales",
            a=("none", "group"), l=("nk", "kn"), g=("swigluoai", "relu2")),
    **sweep("t5-h128-i64-e4-k2-bf16-e4m3.block.group-{l}", "2I is exactly one block: gate and up share a scale", l=("nk", "kn")),
    **sweep("t5-h64-i64-e4-k2-bf16-e4m3.{s}-{l}", "everything inside one block", s=SCHEMES, l=("nk", "kn")),
    **sweep("t6-h320-i192-e4-k2-bf16-{f}.block.{a}-kn-{r}", "transposed block scales with unserved slots",
            f=("e4m3", "e5m2"), a=("none", "group"), r=("invalid", "half")),
}  # fmt: skip


def test_fp8_transpose(check):
    check()
