"""Memory: reads and writes beyond tensors, offsets of 32 bits, batches beyond 2^31 elements, rows of padding, no waiting
for the device, replays of a captured graph.

Every tensor of every call lies between fences of NaN. Offsets overflowed in vLLM, SGLang, TensorRT-LLM, aiter and IPEX
for years, since no test had 2^31 elements; graphs kept what a larger batch had reallocated (vLLM PR 50386).
"""

from harness.problem.families import sweep

FAMILY = "memory"
QUANTS = ("e4m3.block.group", "e4m3.channel.token", "e4m3.tensor.tensor", "e4m3.tensor.static", "e5m2.block.none")
ROWS = {
    **sweep("t13-h200-i72-e5-k3-bf16-{q}-bias-padded-ids64-random", "ragged ends of every operand, NaN behind each", q=("", *QUANTS)),
    **sweep("t13-h200-i72-e5-k3-bf16-{q}-kn-random", "and of their transposes", q=("bias", "e4m3.block.none")),
    **sweep("t11-h136-i136-e6-k2-{d}-{o}-extreme", "NaN in the first and last column of neighbouring rows, tails of K",
            d=("bf16", "bf16-e4m3.block.group-ep2.1"), o=("padded", "kn")),
    **sweep("t2-h136-i72-e17-k2-{d}-bias-extreme", "the same on the low-latency path", d=("bf16", "bf16-e4m3.block.group")),
    **sweep("t15-h128-i64-e8-k2-bf16-{q}-random-memory.padding_rows", "rows that fill up a batch, in every scheme of scales", q=("", *QUANTS)),
    **sweep("t15-h128-i64-e8-k2-{d}-memory.padding_rows", "and exactly", d=("bf16-e4m3.tensor.tensor", "fp32-ep2.0-bias", "bf16-kn-relu2-ids64-padded")),
    **sweep("t15-h128-i64-e8-k1-bf16-{q}-win-memory.padding_rows", "their router weights meet the input", q=("", "e4m3.tensor.tensor")),
    "t3-h128-i64-e32-k2-bf16-e4m3.tensor.tensor-memory.padding_rows": "on the low-latency path",
    **sweep("t24-h128-i64-e8-k2-{d}-{r}-memory.stale", "what an earlier call left in memory, where no pair has written",
            d=("bf16", "bf16-e4m3.tensor.tensor", "bf16-e4m3.block.group-kn", "fp32-bias-kn"), r=("invalid", "ep4.1", "half")),
    **sweep("t24-h128-i64-e8-k2-bf16-e4m3.tensor.tensor-{r}-random-memory.stale", "exact codes do not tell one scale from another", r=("invalid", "ep4.1")),
    **sweep("t4-h128-i64-e32-k2-{d}-invalid-memory.stale", "and on the low-latency path", d=("bf16-kn", "bf16-e4m3.tensor.tensor")),
    **sweep("t9-h128-i64-e8-k2-{d}-memory.no_wait", "no value comes back to the host",
            d=("fp32-ep2.1", "bf16-kn-bias-ids64-invalid", "bf16-kn-e4m3.block.group", "bf16-e4m3.tensor.tensor", "bf16-e4m3.tensor.static")),
    "t4-h128-i64-e32-k1-bf16-win-memory.no_wait": "on the low-latency path",
}  # fmt: skip

CPU_ROWS = {
    # 264 rows of 128 elements, 528 of 64, 8 matrices of 128 x 64: each larger than 2^15, with tiles that stay below.
    **sweep("t264-h128-i64-e8-k2-bf16-{o}-memory.offsets32", "rows of every stage and whole experts",
            o=("padded-bias", "kn-e4m3.channel.none", "e4m3.block.group", "e4m3.tensor.tensor-ep2.1-ids64")),
    **sweep("t264-h128-i128-e4-k1-bf16-{o}-memory.offsets32", "one slot a token, longer rows between the stages", o=("win-e4m3.channel.token", "relu2")),
    **sweep("t4-h128-i64-e128-k4-{d}-memory.offsets32", "many experts, few rows: the low-latency path", d=("bf16-kn", "bf16-e4m3.block.group")),
    "t5-h128-i192-e4-k2-bf16-e4m3.block.none-memory.offsets32": "columns of one expert: 256 x 128 of w13 lie before its last tile",
    **sweep("t267-h64-i32-e4-k2-{d}-memory.copies", "more blocks than one for every expert, and a tail", d=("bf16-e4m3.tensor.tensor", "fp32-kn")),
    "t129-h64-i32-e15-k8-bf16-ep3.1-memory.copies": "over 1024 pairs, which are counted in chunks; most have no expert here",
}  # fmt: skip

GPU_ROWS = {
    **sweep("t131200-h{h}-i{i}-e8-k8-{d}-memory.copies", "rows between the stages beyond 2^31 elements", h=(64,), i=(1024,), d=("bf16", "bf16-kn", "bf16-e4m3.block.group")),
    **sweep("t131200-h2048-i64-e8-k8-{d}-memory.copies", "slots beyond 2^31 elements", d=("bf16", "bf16-e4m3.tensor.tensor")),
    **sweep("t1048640-h2048-i64-e8-k1-{d}-memory.copies", "hidden_states and the output beyond 2^31 elements, over 65535 blocks of rows", d=("bf16", "bf16-e4m3.channel.token", "bf16-win")),
    "t300000-h64-i32-e8-k8-bf16-memory.copies": "2.4 million pairs: more blocks than the second axis of a grid takes",
    **sweep("t{t}-h256-i128-e8-k2-{d}-memory.graph", "replayed with other values, after a larger batch, after new weights",
            t=(5, 33), d=("bf16", "bf16-kn", "bf16-ep2.1", "bf16-e4m3.block.group", "bf16-kn-e4m3.channel.none", "bf16-e4m3.tensor.tensor", "bf16-bias")),
    **sweep("t{t}-h256-i128-e64-k2-{d}-memory.graph", "captured on the low-latency path, with larger batches on the other", t=(1, 8), d=("bf16", "bf16-kn", "bf16-e4m3.block.group")),
}  # fmt: skip


def test_memory(check):
    check()
