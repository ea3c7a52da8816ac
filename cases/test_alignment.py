"""The alignment by itself: pairs sorted by expert, each expert's padded to whole blocks, and every element written.

It goes wrong where pairs or experts end beside a chunk's or a block's edge, where experts have none, where an id or an entry of
the map is no expert's, and where what lies beyond the blocks in use is left as it was (vLLM 35161).
"""

from harness.problem.families import sweep

FAMILY = "alignment"
STAGE = "align"
BLOCKS = ("b1", "b3", "b16", "b64", "b128")
ROUTINGS = ("uniform", "balanced", "skewed", "one", "half", "duplicate", "invalid", "nobody")
ROWS = {
    **sweep("t{t}-h1-i1-e{e}-k2-bf16-random-align.{b}", "pairs around blocks", t=(1, 8, 32, 64, 65), e=(2, 8), b=BLOCKS),
    **sweep("t33-h1-i1-e8-k2-bf16-{r}-random-align.{b}", "every routing", r=ROUTINGS, b=(*BLOCKS, "kept")),
    **sweep("t{t}-h1-i1-e1-k1-bf16-random-align.b16", "one expert with everything", t=(5, 16, 17)),
    **sweep("t25-h1-i1-e{e}-k3-bf16-random-align.{s}", "experts around powers of two, and more of them than pairs",
            e=(3, 15, 16, 17, 31, 33, 60, 64, 65, 128, 160, 257, 513, 1000), s=("b1", "b16", "kept")),
    **sweep("t{t}-h1-i1-e5-k{k}-bf16-random-align.{s}", "pairs around tiles of 128", t=(127, 128, 129), k=(1, 2, 3), s=("b16", "b128")),
    **sweep("t{t}-h1-i1-e6-k1-bf16-{r}random-align.{s}", "pairs around chunks of 1024", t=(1023, 1024, 1025, 2048, 2049), r=("", "invalid-"),
            s=("b3", "b64", "kept")),
    "t16385-h1-i1-e4-k4-bf16-ids64-random-align.b64": "more pairs than 64 chunks of 1024",
    "t2100-h1-i1-e5-k1-bf16-random-align.b16": "three chunks, and a number of experts that is no power of two",
    "t65537-h1-i1-e1-k1-bf16-random-align.b128": "an expert with more pairs than 16 bits count",
    **sweep("t33-h1-i1-e16-k2-bf16-ep{p}-{r}random-align.{s}", "experts of one rank", p=("1.0", "2.0", "2.1", "4.2s", "16.3"), r=("", "ids64-", "invalid-"),
            s=("b3", "b16", "kept", "local")),
    **sweep("t33-h1-i1-e16-k2-bf16-ep4.1-{r}-random-align.{s}", "no pair for this rank, or few", r=("remote", "one", "nobody"), s=("b1", "b16", "kept")),
    **sweep("t40-h1-i1-e{e}-k3-bf16-{o}random-align.out_of_range", "ids that are no expert's", e=(3, 7, 64), o=("", "ep1.0-")),
    **sweep("t20-h1-i1-e8-k2-bf16-{o}random-align.{s}", "sequences, tables and refusals", o=("", "ids64-", "ep2.1-"), s=("strided", "batches", "refuses")),
    **sweep("t0-h1-i1-e{e}-k2-bf16-random-align.{s}", "no pairs at all", e=(2, 300), s=("b1", "b64", "kept")),
}  # fmt: skip


def test_alignment(check):
    check()
