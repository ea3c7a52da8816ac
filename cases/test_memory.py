"""Memory: accesses out of bounds, 32-bit offsets, batches beyond 2^31 elements, padding rows, host synchronization, and
replays of a captured graph.

Every tensor of every call lies between fences of NaN. Offsets overflowed in vLLM, SGLang, TensorRT-LLM, aiter and IPEX
for years, because no test had 2^31 elements. Graphs kept pointers to buffers that a larger batch had reallocated (vLLM
PR 50386).
"""

from harness.problem.families import sweep

FAMILY = "memory"
QUANTS = ("e4m3.block.group", "e4m3.channel.token", "e4m3.tensor.tensor", "e4m3.tensor.static", "e5m2.block.none")
ROWS = {
    **sweep("t13-h200-i72-e5-k3-bf16-{q}-bias-padded-ids64-random", "tails of every operand, with NaN behind each", q=("", *QUANTS)),
    **sweep("t13-h200-i72-e5-k3-bf16-{q}-kn-random", "tails of the transposed operands", q=("bias", "e4m3.block.none")),
    **sweep("t11-h136-i136-e6-k2-{d}-{o}-extreme", "NaN in the first and last columns of neighbouring rows; tails of K",
            d=("bf16", "bf16-e4m3.block.group-ep2.1"), o=("padded", "kn")),
    **sweep("t2-h136-i72-e17-k2-{d}-bias-extreme", "the same on the low-latency path", d=("bf16", "bf16-e4m3.block.group")),
    **sweep("t15-h128-i64-e8-k2-bf16-{q}-random-memory.padding_rows", "padding rows of a batch, with every kind of scale", q=("", *QUANTS)),
    **sweep("t15-h128-i64-e8-k2-{d}-memory.padding_rows", "padding rows on the exact fill", d=("bf16-e4m3.tensor.tensor", "fp32-ep2.0-bias", "bf16-kn-relu2-ids64-padded")),
    **sweep("t15-h128-i64-e8-k1-bf16-{q}-win-memory.padding_rows", "padding rows with the router weight on the input", q=("", "e4m3.tensor.tensor")),
    "t3-h128-i64-e32-k2-bf16-e4m3.tensor.tensor-memory.padding_rows": "on the low-latency path",
    **sweep("t24-h128-i64-e8-k2-{d}-{r}-memory.stale", "stale values of an earlier call in rows that no pair writes",
            d=("bf16", "bf16-e4m3.tensor.tensor", "bf16-e4m3.block.group-kn", "fp32-bias-kn"), r=("invalid", "ep4.1", "half")),
    **sweep("t24-h128-i64-e8-k2-bf16-e4m3.tensor.tensor-{r}-random-memory.stale", "stale scales, which the exact fill cannot distinguish", r=("invalid", "ep4.1")),
    **sweep("t4-h128-i64-e32-k2-{d}-invalid-memory.stale", "stale values on the low-latency path", d=("bf16-kn", "bf16-e4m3.tensor.tensor")),
    **sweep("t9-h128-i64-e8-k2-{d}-memory.no_wait", "no copy to the host and no synchronization",
            d=("fp32-ep2.1", "bf16-kn-bias-ids64-invalid", "bf16-kn-e4m3.block.group", "bf16-e4m3.tensor.tensor", "bf16-e4m3.tensor.static")),
    "t4-h128-i64-e32-k1-bf16-win-memory.no_wait": "on the low-latency path",
}  # fmt: skip

CPU_ROWS = {
    # 264 rows of 128 elements, 528 of 64, 8 matrices of 128 x 64: each exceeds 2^15 elements, and no tile does.
    **sweep("t264-h128-i64-e8-k2-bf16-{o}-memory.offsets32", "offsets of rows in every stage, and of experts",
            o=("padded-bias", "kn-e4m3.channel.none", "e4m3.block.group", "e4m3.tensor.tensor-ep2.1-ids64")),
    **sweep("t264-h128-i128-e4-k1-bf16-{o}-memory.offsets32", "one slot per token, longer rows between the stages", o=("win-e4m3.channel.token", "relu2")),
    **sweep("t4-h128-i64-e128-k4-{d}-memory.offsets32", "many experts and few rows: the low-latency path", d=("bf16-kn", "bf16-e4m3.block.group")),
    "t5-h128-i192-e4-k2-bf16-e4m3.block.none-memory.offsets32": "offsets inside one expert: 256 x 128 elements of w13 precede its last tile",
    **sweep("t267-h64-i32-e4-k2-{d}-memory.copies", "several blocks for every expert, and a tail", d=("bf16-e4m3.tensor.tensor", "fp32-kn")),
    "t129-h64-i32-e15-k8-bf16-ep3.1-memory.copies": "over 1024 pairs, counted in chunks; most have no local expert",
}  # fmt: skip

GPU_ROWS = {
    **sweep("t131200-h{h}-i{i}-e8-k8-{d}-memory.copies", "rows between the stages beyond 2^31 elements", h=(64,), i=(1024,), d=("bf16", "bf16-kn", "bf16-e4m3.block.group")),
    **sweep("t131200-h2048-i64-e8-k8-{d}-memory.copies", "slots beyond 2^31 elements", d=("bf16", "bf16-e4m3.tensor.tensor")),
    **sweep("t1048640-h2048-i64-e8-k1-{d}-memory.copies", "hidden_states and the output beyond 2^31 elements; over 65535 blocks of rows", d=("bf16", "bf16-e4m3.channel.token", "bf16-win")),
    "t300000-h64-i32-e8-k8-bf16-memory.copies": "2.4 million pairs: more blocks than the second axis of a grid allows",
    **sweep("t{t}-h256-i128-e8-k2-{d}-memory.graph", "a graph replayed with new inputs, after a larger batch, after new weights",
            t=(5, 33), d=("bf16", "bf16-kn", "bf16-ep2.1", "bf16-e4m3.block.group", "bf16-kn-e4m3.channel.none", "bf16-e4m3.tensor.tensor", "bf16-bias")),
    **sweep("t{t}-h256-i128-e64-k2-{d}-memory.graph", "a graph of the low-latency path; larger batches take the aligned path", t=(1, 8), d=("bf16", "bf16-kn", "bf16-e4m3.block.group")),
}  # fmt: skip


def test_memory(check):
    check()
