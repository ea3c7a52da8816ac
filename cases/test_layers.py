"""The whole layer: every tile edge, dtype, activation, routing and kind of id, varied one at a time around one case."""

from harness.problem.families import sweep

FAMILY = "layers"
ROWS = {
    **sweep("t{t}-h256-i128-e8-k2-bf16", "numbers of rows around the tiles of M", t=(1, 2, 15, 16, 17, 31, 32, 33, 63, 65)),
    **sweep("t{t}-h128-i64-e4-k2-bf16", "more rows per expert than the largest tile of M", t=(127, 129, 200)),
    **sweep("t9-h{h}-i128-e4-k2-bf16", "hidden sizes around the tiles of K and N", h=(64, 80, 112, 136, 192, 248, 264, 384)),
    **sweep("t9-h128-i{i}-e4-k2-bf16", "intermediate sizes around the tiles", i=(16, 32, 48, 72, 96, 120, 136, 192, 200)),
    **sweep("t3-h{h}-i32-e4-k2-bf16-{q}", "hidden sizes of several tiles in the kernels between the GEMMs", h=(512, 520, 768), q=("", "e4m3.channel.token")),
    **sweep("t3-h64-i{i}-e4-k2-bf16-{q}", "intermediate sizes of several tiles in those kernels", i=(256, 264, 520, 768), q=("", "e4m3.channel.token")),
    **sweep("t3-h520-i264-e4-k2-bf16-{q}", "one scale for all of those tiles", q=("e4m3.tensor.tensor", "e4m3.tensor.static")),
    **sweep("t12-h256-i128-e{e}-k2-bf16", "expert counts around powers of two", e=(2, 3, 7, 15, 16, 17)),
    **sweep("t6-h128-i64-e{e}-k2-bf16", "many experts, most of them empty", e=(31, 33, 64, 100, 128, 257)),
    **sweep("t12-h256-i128-e16-k{k}-bf16", "every top_k in use by models", k=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)),
    **sweep("t17-h256-i192-e8-k2-{d}", "dtypes", d=("fp16", "fp32")),
    **sweep("t33-h320-i136-e5-k2-{d}", "dtypes with tails in every dimension", d=("bf16", "fp16", "fp32")),
    **sweep("t5-h256-i128-e8-k2-{d}-extreme", "rows of zeros, tiny values, huge values, NaN", d=("bf16", "fp16", "fp32")),
    **sweep("t21-h192-i128-e8-k2-{d}-bias-extreme", "edges of the format, with biases", d=("bf16", "fp16", "fp32")),
    **sweep("t21-h256-i128-e8-k2-bf16-{q}-extreme", "edges of fp8: amax of a zero row, outliers, NaN in one row",
            q=("e4m3.tensor.static", "e4m3.tensor.tensor", "e4m3.channel.token", "e4m3.channel.none", "e4m3.block.group", "e5m2.block.none")),
    **sweep("t16-h256-i128-e8-k2-{d}-{a}", "activations", d=("bf16", "fp16", "fp32"),
            a=("gelu", "gelu_tanh", "swigluoai", "relu2", "swigluoai-limit128")),
    **sweep("t16-h256-i128-e8-k2-bf16-{a}-limit{c}", "a clamp that changes values", a=("", "gelu", "swigluoai"), c=(1, 2.5)),
    **sweep("t16-h256-i128-e8-k2-bf16-{a}-limit128", "a clamp that changes the gates of the exact fill", a=("", "gelu", "gelu_tanh")),
    **sweep("t16-h256-i128-e8-k{k}-{d}-bias", "biases are added once per slot, before the router weight", k=(1, 2, 6), d=("bf16", "fp32")),
    **sweep("t16-h256-i128-e8-k2-bf16-{a}-bias", "biases before each activation", a=("gelu", "swigluoai", "swigluoai-limit128", "relu2")),
    **sweep("t17-h128-i64-e8-k1-{d}-once.fine_weights", "router weights that do not fit in 16 bits",
            d=("bf16", "fp16", "fp32", "bf16-bias-kn", "bf16-ep2.1-invalid", "bf16-e4m3.block.group", "bf16-e4m3.channel.none-kn")),
    **sweep("t24-h256-i128-e8-k2-bf16-{r}", "distributions of tokens over experts", r=("balanced", "skewed", "one", "half", "duplicate")),
    **sweep("t24-h256-i128-e8-k2-{d}-{r}", "ids of -1: skipped, and their memory is never read", d=("bf16", "fp32"), r=("invalid", "nobody")),
    **sweep("t24-h256-i128-e8-k2-{d}-beyond", "ids out of range: skipped too", d=("bf16", "fp32-ids64", "bf16-ids64-ep2.1", "bf16-ep4.0s-bias", "bf16-e4m3.tensor.tensor")),
    **sweep("t24-h256-i128-e8-k2-bf16-{r}-bias", "a slot without an expert adds no bias", r=("invalid", "nobody", "half")),
    **sweep("t24-h256-i128-e8-k2-bf16-{q}-{r}", "scales of rows without an expert", q=("e4m3.block.group", "e4m3.tensor.tensor"),
            r=("invalid", "one", "half", "nobody")),
    **sweep("t20-h256-i128-e8-k2-bf16-ep{p}-{r}", "expert_map of each rank, contiguous and strided",
            p=("2.0", "2.1", "4.0", "4.3", "8.5", "2.1s", "4.2s"), r=("", "skewed")),
    **sweep("t20-h256-i128-e8-k2-bf16-ep4.{p}-{r}", "expert_map with ids of -1, with no local token, with all tokens local",
            p=(0, 3), r=("invalid", "remote", "one", "duplicate", "balanced")),
    **sweep("t20-h256-i128-e8-k2-bf16-{q}-ep4.{p}-bias", "expert_map with scales and biases of local experts",
            q=("", "e4m3.block.group", "e4m3.channel.token", "e4m3.tensor.tensor"), p=(0, 3)),
    **sweep("t17-h256-i128-e8-k2-bf16-{o}", "int64 ids; row stride of hidden_states larger than the row",
            o=("ids64", "padded", "ids64-padded-invalid", "ids64-ep2.1")),
    **sweep("t17-h256-i128-e8-k2-{d}-kn", "the transposed layout without scales", d=("bf16", "fp16", "fp32")),
    **sweep("t17-h192-i96-e8-k2-bf16-kn-{o}", "the transposed layout with other options", o=("bias", "ep2.1", "swigluoai", "relu2", "invalid", "padded")),
    **sweep("t0-h256-i128-e8-k2-{d}", "no tokens", d=("bf16", "bf16-e4m3.block.group", "bf16-kn")),
    **sweep("t40-h256-i128-e8-k2-{d}-repeat.bits", "repeated calls give the same bits", d=("bf16-random", "fp32-random", "bf16-e4m3.block.group-random")),
    **sweep("t40-h256-i128-e8-k2-{d}-repeat.leak", "a call full of NaN does not affect the next call", d=("bf16", "bf16-invalid", "bf16-e4m3.tensor.tensor", "bf16-ep2.1")),
    **sweep("t16-h256-i128-e8-k2-{d}-batch.sizes", "batches that grow and shrink", d=("bf16", "bf16-e4m3.block.group", "fp32")),
    **sweep("t16-h256-i128-e32-k2-{d}-batch.routings", "one routing after another", d=("bf16", "bf16-e4m3.channel.token")),
    **sweep("t16-h256-i128-e8-k2-{d}-shared{n}", "shared experts see every token with weight 1", d=("bf16", "fp32"), n=(1, 2)),
    "t3-h256-i128-e512-k10-bf16": "more experts than threads in a block (aiter 4482: experts from 512 on were never scanned)",
    "t2-h64-i32-e1000-k4-bf16": "an expert count far from a power of two",
}  # fmt: skip

GPU_ROWS = {
    **sweep("t512-h1024-i512-e4-k2-{d}-random", "tiles of 64 rows and more, whose matrix instructions differ from those of small batches",
            d=("bf16", "fp16", "fp32", "bf16-e4m3.block.group", "bf16-e4m3.channel.token", "bf16-e4m3.tensor.tensor", "bf16-e5m2.channel.token", "bf16-e4m3.block.none")),
    **sweep("t512-h1024-i512-e4-k2-{d}-exact", "sums of those matrix instructions are exact", d=("bf16-e4m3.block.group", "bf16-e4m3.channel.token", "fp32")),
    "t2048-h512-i128-e64-k8-bf16-random": "more blocks than fit in one wave of the device",
}  # fmt: skip


def test_layers(check):
    check()
