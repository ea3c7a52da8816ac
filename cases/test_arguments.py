"""The same arguments in other memory: slices of larger buffers, as engines pass them; an output that the call
allocates.

vLLM PR 16198: torch.compile produced router weights with strides that the kernel did not expect. PR 26378: without
`out` the kernel overwrote its input.
"""

from harness.problem.families import sweep

FAMILY = "arguments"
ROWS = {
    **sweep("t{t}-h72-i40-e5-k2-{d}-arguments.own_output", "the call allocates its output", t=(0, 17),
            d=("bf16", "fp32-kn", "bf16-e4m3.channel.token")),
    **sweep("t3-h72-i40-e24-k2-{d}-arguments.own_output", "on the low-latency path", d=("bf16", "bf16-kn")),
    **sweep("t9-h72-i40-e5-k1-bf16-win-{o}-arguments.own_output", "with the router weight on the input", o=("", "e4m3.tensor.token")),
    **sweep("t{t}-h72-i40-e5-k3-{d}-arguments.strided_out", "row stride of the output larger than the row", t=(1, 17), d=("bf16", "fp32-kn")),
    **sweep("t{t}-h72-i40-e5-k3-{d}-arguments.neighbours", "input and output are the halves of one buffer", t=(1, 17), d=("bf16", "fp32-kn")),
    **sweep("t{t}-h72-i40-e{e}-k3-{d}-arguments.strided_routing", "topk_ids and topk_weights are slices of wider tensors, on either path",
            t=(1, 17), e=(6, 40), d=("bf16", "bf16-ids64-kn")),
    **sweep("t9-h72-i40-e6-k1-bf16-{o}-arguments.strided_routing", "topk_ids and topk_weights with one column", o=("win", "ep2.1", "invalid-kn")),
    **sweep("t9-h136-i72-e4-k2-{d}-{l}-bias-arguments.strided_layer", "weights, scales and biases are slices of larger tensors",
            d=("bf16-e4m3.block.none", "bf16-e4m3.channel.token"), l=("nk", "kn")),
    "t2-h72-i40-e16-k2-fp16-bias-arguments.strided_layer": "on the low-latency path",
}  # fmt: skip


def test_arguments(check):
    check()
