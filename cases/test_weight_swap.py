"""Weights that change after prepare(): the next call must compute with the new values, however they changed.

vLLM PR 42915 keeps an instance that the first call builds. Its review asked what happens after a weight swap and got no
answer.
"""

from harness.problem.families import sweep

FAMILY = "weight_swap"
LAYERS = ("bf16", "bf16-kn", "bf16-e4m3.block.none-kn", "bf16-e4m3.channel.token", "bf16-bias-ep2.1-kn")
WHOLE = ("copy_", "data_copy_", "inference_mode", "data", "parameter", "same_address", "offload", "two_layers", "threads", "released", "dropped")
ROWS = {
    **sweep("t9-h256-i128-e8-k2-{d}-swap.{s}", "all tensors change at once", d=LAYERS, s=WHOLE),
    **sweep("t1-h256-i128-e8-k2-bf16-{l}-swap.{s}", "on the low-latency path", l=("nk", "kn"), s=("copy_", "data", "same_address", "threads")),
    **sweep("t9-h128-i128-e4-k2-bf16-{l}-swap.{s}", "square weights: old and new have the same shapes", l=("nk", "kn"), s=("parameter", "same_address")),
    **sweep("t9-h256-i128-e8-k2-bf16-{q}-random-swap.scales", "only the scales change",
            q=("e4m3.tensor.none-kn", "e4m3.channel.none-kn", "e4m3.block.none-kn", "e4m3.block.group", "e4m3.tensor.static", "e5m2.tensor.none-kn")),
    **sweep("t9-h256-i128-e8-k2-{d}-random-swap.bias", "only the biases change", d=("bf16-bias", "bf16-bias-kn", "fp32-bias", "bf16-e4m3.block.none-bias-kn")),
    **sweep("t9-h256-i128-e8-k2-{d}-random-swap.w2", "only the weights of GEMM 2 change", d=("bf16", "bf16-kn", "bf16-e4m3.block.none-kn")),
    **sweep("t9-h256-i128-e8-k2-bf16-ep{p}-{l}-swap.expert_map", "the expert_map of the rank changes", p=("2.1", "4.0s"), l=("nk", "kn")),
    **sweep("t9-h256-i128-e8-k2-{d}-swap.{s}", "the layer changes its configuration", d=("bf16", "bf16-kn"), s=("dtype", "experts", "top_k")),
    **sweep("t9-h256-i128-e8-k2-{d}-random-swap.activation", "only the activation changes", d=("bf16", "bf16-kn", "bf16-e4m3.block.none-kn")),
    **sweep("t9-h256-i128-e8-k2-{d}-swap.one_build", "unchanged layers are built once", d=("bf16-kn", "bf16-e4m3.block.none-kn")),
}  # fmt: skip


def test_weight_swap(check):
    check()
