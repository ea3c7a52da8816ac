"""The alignment alone: pairs sorted by expert, padded to whole blocks per expert, every element written.

Past bugs: a count of pairs or experts next to the edge of a chunk or block, experts without pairs, ids or map entries
that name no expert, and unwritten elements beyond the blocks in use (vLLM 35161).
"""

from harness.problem.families import sweep

FAMILY = "alignment"
STAGE = "align"
BLOCKS = ("b1", "b3", "b16", "b64", "b128")
ROUTINGS = ("uniform", "balanced", "skewed", "one", "half", "duplicate", "invalid", "nobody")
ROWS = {
    **sweep("t{t}-h1-i1-e{e}-k2-bf16-random-align.{b}", "numbers of pairs around a block", t=(1, 8, 32, 64, 65), e=(2, 8), b=BLOCKS),
    **sweep("t33-h1-i1-e8-k2-bf16-{r}-random-align.{b}", "every routing", r=ROUTINGS, b=(*BLOCKS, "kept")),
    **sweep("t{t}-h1-i1-e1-k1-bf16-random-align.b16", "one expert has all pairs", t=(5, 16, 17)),
    **sweep("t25-h1-i1-e{e}-k3-bf16-random-align.{s}", "expert counts around powers of two, and above the number of pairs",
            e=(3, 15, 16, 17, 31, 33, 60, 64, 65, 128, 160, 257, 513, 1000), s=("b1", "b16", "kept")),
    **sweep("t{t}-h1-i1-e5-k{k}-bf16-random-align.{s}", "numbers of pairs around tiles of 128", t=(127, 128, 129), k=(1, 2, 3), s=("b16", "b128")),
    **sweep("t{t}-h1-i1-e6-k1-bf16-{r}random-align.{s}", "numbers of pairs around chunks of 1024", t=(1023, 1024, 1025, 2048, 2049), r=("", "invalid-"),
            s=("b3", "b64", "kept")),
    "t16385-h1-i1-e4-k4-bf16-ids64-random-align.b64": "more pairs than 64 chunks of 1024 hold",
    "t2100-h1-i1-e5-k1-bf16-random-align.b16": "three chunks; the expert count is not a power of two",
    "t65537-h1-i1-e1-k1-bf16-random-align.b128": "one expert has more pairs than 16 bits can count",
    **sweep("t33-h1-i1-e16-k2-bf16-ep{p}-{r}random-align.{s}", "the experts of one rank", p=("1.0", "2.0", "2.1", "4.2s", "16.3"), r=("", "ids64-", "invalid-"),
            s=("b3", "b16", "kept", "local")),
    **sweep("t33-h1-i1-e16-k2-bf16-ep4.1-{r}-random-align.{s}", "a rank with few pairs or none", r=("remote", "one", "nobody"), s=("b1", "b16", "kept")),
    **sweep("t40-h1-i1-e{e}-k3-bf16-{o}random-align.out_of_range", "ids out of range", e=(3, 7, 64), o=("", "ep1.0-")),
    **sweep("t20-h1-i1-e8-k2-bf16-{o}random-align.{s}", "strided ids, successive batches, rejected arguments", o=("", "ids64-", "ep2.1-"), s=("strided", "batches", "refuses")),
    **sweep("t0-h1-i1-e{e}-k2-bf16-random-align.{s}", "no pairs", e=(2, 300), s=("b1", "b64", "kept")),
}  # fmt: skip


def test_alignment(check):
    check()
