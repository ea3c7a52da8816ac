"""The same arguments in other memory: slices of larger buffers as engines hand them over, and an output of the call's own.

vLLM PR 16198: under torch.compile router weights came with other strides than the kernel took for granted. PR 26378:
without `out` the input was overwritten.
"""

from harness.problem.families import sweep

FAMILY = "arguments"
ROWS = {
    **sweep("t{t}-h72-i40-e5-k2-{d}-arguments.own_output", "nobody gives an output", t=(0, 17),
            d=("bf16", "fp32-kn", "bf16-e4m3.channel.token")),
    **sweep("t3-h72-i40-e24-k2-{d}-arguments.own_output", "on the low-latency path", d=("bf16", "bf16-kn")),
    **sweep("t9-h72-i40-e5-k1-bf16-win-{o}-arguments.own_output", "where the input is weighted", o=("", "e4m3.tensor.token")),
    **sweep("t{t}-h72-i40-e5-k3-{d}-arguments.strided_out", "rows of the output are further apart than they are long", t=(1, 17), d=("bf16", "fp32-kn")),
    **sweep("t{t}-h72-i40-e5-k3-{d}-arguments.neighbours", "input and output are halves of one buffer", t=(1, 17), d=("bf16", "fp32-kn")),
    **sweep("t{t}-h72-i40-e{e}-k3-{d}-arguments.strided_routing", "tables of the router are slices of others, on either path",
            t=(1, 17), e=(6, 40), d=("bf16", "bf16-ids64-kn")),
    **sweep("t9-h72-i40-e6-k1-bf16-{o}-arguments.strided_routing", "a table of one column", o=("win", "ep2.1", "invalid-kn")),
    **sweep("t9-h136-i72-e4-k2-{d}-{l}-bias-arguments.strided_layer", "weights, scales and biases are slices of larger ones",
            d=("bf16-e4m3.block.none", "bf16-e4m3.channel.token"), l=("nk", "kn")),
    "t2-h72-i40-e16-k2-fp16-bias-arguments.strided_layer": "on the low-latency path",
}  # fmt: skip


def test_arguments(check):
    check()
