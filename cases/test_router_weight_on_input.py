"""Router weight on input (Llama-4): x * w before GEMM 1 and before quantization; the bias is not weighted, nor the output.

SGLang PR 22654, vLLM PR 43694: the weight was applied twice, or never; vLLM's functional and modular paths disagree as
soon as there is a bias. The order here is the modular one. top_k > 1 has no meaning and is refused (family errors).
"""

from harness.problem.families import sweep

FAMILY = "router_weight_on_input"
ROWS = {
    **sweep("t{t}-h256-i128-e8-k1-{d}-win", "dtypes and batch sizes", t=(1, 7, 33), d=("bf16", "fp16", "fp32")),
    **sweep("t17-h256-i128-e8-k1-{d}-win-bias", "the bias comes after the weight", d=("bf16", "fp16", "fp32")),
    **sweep("t9-h256-i128-e8-k1-bf16-{f}.{s}-win-{o}", "before quantization: the weighted row sets the scale", f=("e4m3",),
            s=("tensor.none", "tensor.static", "tensor.tensor", "tensor.token", "channel.token", "block.none", "block.group"), o=("", "bias", "kn")),
    **sweep("t9-h256-i128-e8-k1-bf16-{a}-win", "the activation of a weighted input is not the weighted activation",
            a=("gelu", "gelu_tanh", "swigluoai", "swigluoai-limit128-bias", "relu2", "limit2")),
    **sweep("t20-h256-i128-e8-k1-bf16-win-ep{p}-{o}", "with expert_map", p=("2.0", "2.1", "4.3s"), o=("", "bias", "invalid", "remote")),
    **sweep("t20-h256-i128-e8-k1-bf16-win-{r}", "routings", r=("skewed", "one", "half", "invalid", "nobody")),
    **sweep("t20-h320-i136-e8-k1-bf16-win-{o}", "tails, padded rows, the other layout", o=("", "padded", "kn", "kn-bias", "ids64")),
    **sweep("t14-h256-i128-e8-k1-{d}-win-extreme", "weighting rows of zeros, NaN and huge values", d=("bf16", "fp32", "bf16-e4m3.block.group")),
    **sweep("t9-h256-i128-e8-k1-{d}-win-{l}-win.no_extra_tensor", "no copy of hidden_states: the seed of PR 22654 multiplies out of place",
            d=("bf16", "fp16", "bf16-e4m3.block.group", "bf16-e4m3.tensor.token", "bf16-e4m3.tensor.static", "bf16-e4m3.block.none"), l=("nk", "kn")),
    **sweep("t1-h256-i128-e8-k1-bf16-win-{l}-win.no_extra_tensor", "nor on the low-latency path", l=("nk", "kn")),
    **sweep("t9-h256-i128-e8-k1-{d}-win-repeat.bits", "hidden_states are not mutated: the second call is the first", d=("bf16-random", "bf16-e4m3.block.group-random")),
    **sweep("t9-h256-i128-e16-k1-{d}-win-batch.sizes", "batches that grow and shrink", d=("bf16", "bf16-e4m3.tensor.token")),
}  # fmt: skip


def test_router_weight_on_input(check):
    check()
