"""Scratch reuse: the permutation's buffers are allocated once, keep their addresses, and serve every batch.

vLLM PR 43014 pre-allocates them (9 to 14 % of a small permute). Its review noticed a reshape that could copy instead of
alias. Its one test reuses one size once.
"""

from harness.problem.families import sweep

FAMILY = "scratch"
SCENARIOS = ("reuse", "pointers", "sizes", "interleaved", "ids", "hidden_size", "steady", "refuses", "device")
ROWS = {
    **sweep("t{t}-h128-i64-e8-k2-bf16-scratch.{s}", "every scenario at a small and a larger batch", t=(6, 24), s=SCENARIOS),
    **sweep("t9-h128-i64-e8-k{k}-bf16-scratch.{s}", "top_k 1 and 8", k=(1, 8), s=("reuse", "pointers", "sizes", "ids", "refuses")),
    **sweep("t9-h128-i64-e8-k2-{d}-scratch.{s}", "other dtypes", d=("fp16", "fp32"), s=("reuse", "pointers", "sizes", "refuses")),
    **sweep("t9-h128-i64-e8-k2-bf16-{r}-scratch.{s}", "rows without a place and experts without rows",
            r=("invalid", "beyond", "nobody", "half", "one", "duplicate"), s=("reuse", "pointers", "sizes", "interleaved", "ids")),
    **sweep("t9-h128-i64-e8-k2-bf16-ep{p}-scratch.{s}", "local experts only", p=("2.1", "4.2s"),
            s=("reuse", "pointers", "sizes", "interleaved", "steady", "ids")),
    **sweep("t9-h128-i64-e8-k2-bf16-e4m3.block.group-scratch.{s}", "quantized rows", s=("reuse", "sizes", "interleaved", "ids")),
    **sweep("t9-h136-i72-e5-k2-bf16-{o}-scratch.{s}", "tails, padded rows", o=("padded", "bias"), s=("reuse", "pointers", "sizes")),
    **sweep("t{t}-h128-i64-e8-k3-bf16-scratch.sizes", "sizes around tiles of rows", t=(1, 2, 3, 5, 31, 33)),
    **sweep("t4-h64-i32-e300-k2-bf16-scratch.{s}", "more experts than rows", s=("reuse", "pointers", "steady")),
    "t260-h64-i32-e4-k2-bf16-duplicate-scratch.pointers": "over 256 tokens with duplicate ids (flashinfer 3011: rows of the map were never written)",
}  # fmt: skip


def test_scratch(check):
    check()
