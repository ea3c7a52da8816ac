"""Relations between outputs, without an expected value: permute, split, repeat, relabel, enlarge, double, pad.

On the exact fill every relation holds bit for bit; on the random fill those do that repeat the same instructions. Also
here: every tile configuration, not only the default of a batch size, and batch invariance.
"""

from harness.problem.families import sweep

FAMILY = "relations"
TOKENS = ("token_order", "batch_parts", "repeated_tokens")
SLOTS = ("slot_order", "zero_weight", "weight_parts", "doubled_weights")
EXPERTS = ("expert_order", "unused_expert", "expert_copies")
SIZES = ("wider_hidden", "wider_intermediate", "hidden_order", "intermediate_order")
SAME = ("layout", "representation")
ROWS = {
    **sweep("t6-h64-i32-e5-k3-bf16-relation.{r}", "the plain layer", r=(*TOKENS, *SLOTS, *EXPERTS, *SIZES, *SAME)),
    **sweep("t9-h80-i24-e6-k2-fp32-relation.{r}", "IEEE float32, tails in every size", r=("batch_parts", "expert_copies", "wider_hidden", "ranks")),
    **sweep("t7-h72-i40-e6-k2-fp16-bias-{a}-relation.{r}", "biases; interleaved gate and up; an activation without up", a=("swigluoai-limit128", "relu2"),
            r=("intermediate_order", "wider_intermediate")),
    **sweep("t5-h128-i136-e4-k2-bf16-e4m3.block.group-relation.{r}", "blocks across the gate/up boundary", r=(*SIZES, "expert_order", "layout")),
    **sweep("t5-h200-i128-e4-k2-bf16-e4m3.block.none-kn-relation.{r}", "transposed scales move with their weights", r=("hidden_order", "intermediate_order", "wider_hidden", "unused_expert")),
    **sweep("t5-h96-i40-e6-k2-bf16-e5m2.channel.token-bias-relation.{r}", "one scale per row", r=("intermediate_order", "wider_intermediate", "expert_copies", "ranks")),
    **sweep("t6-h64-i32-e6-k2-bf16-e4m3.tensor.{a}-relation.{r}", "one scale per batch", a=("tensor", "static"), r=("batch_parts", "ranks")),
    **sweep("t8-h64-i32-e8-k2-bf16-bias-ep2.1s-relation.{r}", "experts of a rank: ids, positions and map change together", r=EXPERTS),
    **sweep("t9-h64-i32-e6-k2-bf16-invalid-relation.{r}", "slots without an expert", r=("token_order", "slot_order", "expert_order", "batch_parts")),
    **sweep("t6-h64-i32-e4-k4-bf16-duplicate-relation.{r}", "a token that has one expert twice", r=("slot_order", "zero_weight", "expert_copies")),
    **sweep("t6-h64-i32-e4-k1-bf16-e4m3.block.group-win-bias-relation.{r}", "router weight on input", r=("token_order", "expert_order", "hidden_order", "ranks")),
    **sweep("t2-h64-i32-e16-k2-bf16-relation.{r}", "on the low-latency path and on the aligned one", r=("batch_parts", "repeated_tokens", "ranks")),
    **sweep("t2-h64-i32-e15-k2-bf16-relation.{r}", "one more expert selects the low-latency path", r=("unused_expert", "expert_copies")),
    **sweep("t17-h64-i32-e4-k2-bf16-relation.{r}", "more rows than a small tile or a chunk holds", r=("token_order", "batch_parts")),
    **sweep("t6-h128-i64-e8-k2-{d}-random-relation.doubled_weights", "a factor of two commutes with every rounding", d=("bf16", "fp32-bias", "bf16-e4m3.block.group")),
    **sweep("t3-h128-i64-e8-k2-{d}-random-relation.unused_nan", "NaN weights of unused experts do not reach the output", d=("bf16", "fp32", "bf16-kn-bias-e4m3.channel.token", "bf16-ep2.1")),
    **sweep("t9-h128-i64-e8-k2-{d}-random-relation.nan_rows", "NaN in padding rows does not reach other rows", d=("bf16-invalid", "fp32-ep4.1", "bf16-kn-bias-invalid-e4m3.block.none", "bf16-invalid-padded-e4m3.channel.token")),
    **sweep("t5-h96-i64-e2-k1-{d}-random-relation.batch_invariant", "the bits of a token do not depend on its batch", d=("bf16", "fp32", "bf16-e4m3.block.group")),
    **sweep("t5-h64-i32-e6-k4-{d}-random-relation.batch_invariant", "the bits of a token do not depend on its batch, with four slots", d=("bf16", "fp32")),
    "t2-h64-i64-e16-k2-bf16-random-relation.batch_invariant": "alone on the low-latency path, in the batch on the aligned one",
    **sweep("t5-h72-i40-e2-k2-{d}-config.all", "every tile configuration, with tails in every dimension", d=("bf16-bias", "fp32", "bf16-e4m3.channel.token")),
    "t5-h136-i72-e2-k1-bf16-e4m3.block.group-kn-config.all": "every tile configuration over two scale blocks",
    "t16-h32-i16-e2-k2-bf16-duplicate-config.all": "several row tiles of the small configurations",
    "t1-h72-i40-e8-k2-bf16-config.all": "every tile configuration on the low-latency path",
}  # fmt: skip

GPU_ROWS = {
    **sweep("t65-h256-i192-e8-k2-{d}-relation.{r}", "tiles of matrix instructions", d=("bf16", "fp16-kn-bias", "bf16-e4m3.block.group", "bf16-e4m3.channel.token"),
            r=(*TOKENS, *SLOTS, *EXPERTS, *SIZES, *SAME, "ranks")),
    **sweep("t65-h256-i192-e8-k2-{d}-random-relation.batch_invariant", "the bits of a token do not depend on its batch",
            d=("bf16", "fp16", "fp32", "bf16-e4m3.block.group", "bf16-e4m3.channel.token", "bf16-e4m3.block.none")),
    **sweep("t300-h512-i384-e4-k2-{d}-random-config.all", "every configuration with full tiles",
            d=("bf16", "fp16-bias", "fp32", "bf16-e4m3.block.group", "bf16-e4m3.channel.token", "bf16-e5m2.block.none-kn", "bf16-e4m3.tensor.tensor")),
}  # fmt: skip


def test_relations(check):
    check()
