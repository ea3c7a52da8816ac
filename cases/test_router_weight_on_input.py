"""Router weight on the input (Llama-4): x * w before quantization and GEMM 1; neither bias nor output is weighted.

SGLang PR 22654, vLLM PR 43694: the weight was applied twice or never. vLLM's functional and modular paths disagree if
the layer has a bias; these cases follow the modular one. top_k > 1 has no meaning and must raise (family errors).
"""

from harness.problem.families import sweep

FAMILY = "router_weight_on_input"
ROWS = {
    **sweep("t{t}-h256-i128-e8-k1-{d}-win", "dtypes and batch sizes", t=(1, 7, 33), d=("bf16", "fp16", "fp32")),
    **sweep("t17-h256-i128-e8-k1-{d}-win-bias", "the bias is added after the weight", d=("bf16", "fp16", "fp32")),
    **sweep("t9-h256-i128-e8-k1-bf16-{f}.{s}-win-{o}", "the scale is that of the weighted row", f=("e4m3",),
            s=("tensor.none", "tensor.static", "tensor.tensor", "tensor.token", "channel.token", "block.none", "block.group"), o=("", "bias", "kn")),
    **sweep("t9-h256-i128-e8-k1-bf16-{a}-win", "activations that do not commute with the weight",
            a=("gelu", "gelu_tanh", "swigluoai", "swigluoai-limit128-bias", "relu2", "limit2")),
    **sweep("t20-h256-i128-e8-k1-bf16-win-ep{p}-{o}", "with expert_map", p=("2.0", "2.1", "4.3s"), o=("", "bias", "invalid", "remote")),
    **sweep("t20-h256-i128-e8-k1-bf16-win-{r}", "routings", r=("skewed", "one", "half", "invalid", "nobody")),
    **sweep("t20-h320-i136-e8-k1-bf16-win-{o}", "tails, padded rows, the transposed layout", o=("", "padded", "kn", "kn-bias", "ids64")),
    **sweep("t14-h256-i128-e8-k1-{d}-win-extreme", "weighted rows of zeros, NaN and huge values", d=("bf16", "fp32", "bf16-e4m3.block.group")),
    **sweep("t9-h256-i128-e8-k1-{d}-win-{l}-win.no_extra_tensor", "no copy of hidden_states (the first version of PR 22654 multiplied out of place)",
            d=("bf16", "fp16", "bf16-e4m3.block.group", "bf16-e4m3.tensor.token", "bf16-e4m3.tensor.static", "bf16-e4m3.block.none"), l=("nk", "kn")),
    **sweep("t1-h256-i128-e8-k1-bf16-win-{l}-win.no_extra_tensor", "no copy of hidden_states on the low-latency path", l=("nk", "kn")),
    **sweep("t9-h256-i128-e8-k1-{d}-win-repeat.bits", "hidden_states are not changed: the second call repeats the first", d=("bf16-random", "bf16-e4m3.block.group-random")),
    **sweep("t9-h256-i128-e16-k1-{d}-win-batch.sizes", "batches that grow and shrink", d=("bf16", "bf16-e4m3.tensor.token")),
}  # fmt: skip


def test_router_weight_on_input(check):
    check()
