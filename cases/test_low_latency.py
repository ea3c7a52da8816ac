"""The low-latency path: taken exactly if there is no expert_map and tokens * top_k * 4 <= num_experts.

vLLM PR 39016: a refactoring lost the path, which cost 3 % (bf16) and 4.4 % (fp8) of tokens/s for months. The trace
shows which path ran; the exact fill shows that both paths compute the same bits.
"""

from harness.problem.families import sweep

FAMILY = "low_latency"
EDGES = [(t, k, 4 * t * k + d) for t, k in ((1, 1), (1, 2), (2, 1), (3, 1), (1, 4), (2, 2), (1, 6), (1, 8), (2, 4), (4, 2)) for d in (-1, 0, 1)]
ROWS = {}
for t, k, e in EDGES:
    if e >= k:
        where = {-1: "one expert too few: aligned", 0: "at the threshold: low latency", 1: "below it: low latency"}[e - 4 * t * k]
        ROWS |= sweep(f"t{t}-h128-i64-e{e}-k{k}-{{d}}", where, d=("bf16", "bf16-e4m3.block.group", "fp32"))
        ROWS |= sweep(f"t{t}-h128-i64-e{e}-k{k}-{{d}}-path.launches", where, d=("bf16", "bf16-e4m3.block.group"))
ROWS |= {
    **sweep("t{t}-h128-i64-e64-k2-bf16-ep{p}-path.launches", "not taken with an expert_map", t=(1, 4), p=("1.0", "2.1")),
    **sweep("t{t}-h128-i64-e64-k4-bf16-{o}-path.launches", "independent of ids, biases and layout",
            t=(1, 4, 5), o=("ids64", "bias", "kn", "invalid", "duplicate")),
    **sweep("t0-h128-i64-e8-k2-{d}-path.launches", "no tokens, no launches", d=("bf16", "bf16-kn", "bf16-e4m3.block.group")),
    **sweep("t3-h{h}-i{i}-e32-k2-{d}", "tails of N and K with one valid row in a tile", h=(80, 136, 320), i=(48, 136), d=("bf16", "fp16")),
    **sweep("t2-h256-i128-e32-k2-bf16-{f}.{s}-{l}", "every scheme on this path", f=("e4m3", "e5m2"),
            s=("tensor.static", "tensor.token", "channel.token", "channel.none", "block.group", "block.none"), l=("nk", "kn")),
    **sweep("t3-h128-i64-e32-k2-bf16-{a}", "every activation on this path",
            a=("gelu", "gelu_tanh", "swigluoai", "swigluoai-limit128-bias", "relu2", "limit2", "bias")),
    **sweep("t4-h128-i64-e32-k2-{d}-{r}", "ids that this path checks itself", d=("bf16", "bf16-e4m3.tensor.tensor"),
            r=("invalid", "beyond", "nobody", "duplicate", "one")),
    **sweep("t4-h128-i64-e32-k2-{d}-extreme", "NaN and zero rows next to other rows", d=("bf16", "bf16-e4m3.block.group")),
    **sweep("t5-h128-i64-e32-k1-{d}-once.fine_weights", "router weights that do not fit in 16 bits", d=("bf16", "fp16-bias")),
    **sweep("t8-h128-i64-e32-k1-bf16-win-{o}", "router weight on input on this path", o=("", "bias", "e4m3.block.group", "kn")),
    **sweep("t4-h128-i64-e64-k4-{d}-repeat.bits", "repeated calls give the same bits", d=("bf16-random", "bf16-e4m3.block.group-random")),
    **sweep("t4-h128-i64-e64-k4-{d}-batch.sizes", "one layer switches between both paths", d=("bf16", "bf16-e4m3.block.group")),
}  # fmt: skip


def test_low_latency(check):
    check()
