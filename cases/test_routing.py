"""The router alone: the chosen experts and their weights, for logits of every kind and shape.

Past bugs: logits that are negative, NaN, -inf, equal or so small that their scores underflow (flashinfer 2822, vLLM
39391, sglang 30079, 31017), a bias that hides the scores (flashinfer 3875), groups (vLLM 24146, sglang 3705), one of
several kernels for different sizes (aiter 4247). The fill `extreme` has 18 kinds of rows of logits, in turn.
"""

from harness.problem.families import sweep

FAMILY = "routing"
STAGE = "route"
PLAIN = ("softmax", "softmax_renorm", "topk_softmax", "sigmoid", "sigmoid_renorm", "scaling", "scaling_sigmoid")
BIASED = ("softmax_bias", "grouped_bias", "grouped_bias12", "grouped_negative")
FEW = ("softmax_renorm", "topk_softmax", "sigmoid", "grouped_bias")
BIASES = ("", "_bias", "_bias12", "_negative")
GROUPS = ((2, 1), (2, 2), (3, 2), (4, 1), (4, 3), (5, 2), (8, 1), (8, 4), (8, 7), (8, 8))
ROWS = {
    **sweep("t36-h1-i1-e16-k4-{d}-{f}-route.{w}", "every method, two rows of each kind of logits",
            d=("bf16", "fp32"), f=("random", "extreme"), w=(*PLAIN, *BIASED, "grouped")),
    **sweep("t36-h1-i1-e16-k4-fp16-extreme-route.{w}", "logits in fp16", w=FEW),
    **sweep("t18-h32-i8-e{e}-k4-{d}-exact-route.{w}", "scores far apart", e=(12, 64), d=("bf16", "fp32"), w=("softmax", "sigmoid", "grouped_bias")),
    **sweep("t1-h1-i1-e9-k3-{d}-extreme-s{s}-route.{w}", "each kind of logits as the only row", d=("bf16", "fp32"), s=range(18),
            w=("softmax_renorm", "grouped_bias")),
}  # fmt: skip
for e in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 60, 64, 65, 127, 128, 129, 160, 256, 384, 512, 513, 896):
    ROWS |= sweep(f"t{{t}}-h1-i1-e{e}-k{min(e, 8)}-{{d}}-route.{{w}}", "expert counts around powers of two and of released models",
                  t=(18,), d=("bf16-extreme", "fp32-random-padded"), w=FEW)  # fmt: skip
for k in range(1, 11):
    ROWS |= sweep(f"t18-h1-i1-e{{e}}-k{k}-fp32-extreme-route.{{w}}", "every top_k up to all experts", e=(k, k + 1, 40),
                  w=("topk_softmax", "sigmoid_renorm", "grouped_bias"))  # fmt: skip
for n, m in GROUPS:
    ROWS |= sweep(f"t18-h1-i1-e{n}-k{m}-fp32-extreme-route.groups{n}_{m}{{b}}", "groups of one expert", b=("", "_bias"))
    for size in (3, 8):
        ROWS |= sweep(f"t36-h1-i1-e{n * size}-k{min(6, m * size)}-{{d}}-route.groups{n}_{m}{{b}}", "groups, some of odd sizes",
                      d=("bf16-random", "fp32-extreme"), b=BIASES)  # fmt: skip
ROWS |= {
    **sweep("t20-h1-i1-e{e}-k{k}-bf16-random-route.groups8_4_bias", "groups of released models", e=(160, 256), k=(6, 8)),
    **sweep("t36-h1-i1-e{e}-k2-fp32-{f}-route.groups{g}_softmax", "groups ranked by their best softmax score", e=(24, 56), f=("random", "extreme"), g=("4_2", "8_3")),
    **sweep("t{t}-h1-i1-e8-k2-bf16-{f}-route.{w}", "rows per program with few experts", t=(2, 127, 128, 129, 255, 256, 257, 600),
            f=("random", "extreme"), w=("softmax_renorm", "grouped_bias")),
    **sweep("t{t}-h1-i1-e16-k4-bf16-{f}-route.{w}", "every method on small and large batches, which may use different kernels",
            t=(1, 6, 70, 300), f=("random", "extreme"), w=(*PLAIN, *BIASED, "groups4_3_bias")),
    **sweep("t{t}-h1-i1-e128-k3-fp32-random-route.{w}", "rows per program with many experts", t=(1, 2, 7, 8, 9, 15, 16, 17, 33, 65), w=FEW),
    **sweep("t{t}-h1-i1-e600-k2-bf16-random-route.{w}", "rows per program with very many experts", t=(1, 2, 3, 5), w=FEW),
    **sweep("t36-h1-i1-e{e}-k3-{d}-extreme-padded-route.{w}", "row stride of the logits larger than the row", e=(7, 8, 60), d=("bf16", "fp32"),
            w=("softmax_renorm", "sigmoid", "grouped_negative")),
    **sweep("t{t}-h1-i1-e{e}-k4-{d}-route.{s}", "other options of a router", t=(1, 33), e=(12, 64), d=("bf16-random", "fp32-extreme"),
            s=("id_map", "fused_shared", "scale_later", "num_valid_tokens", "repeat", "batches")),
    **sweep("t300-h1-i1-e8-k2-bf16-random-route.{s}", "other options, in several programs", s=("id_map", "fused_shared", "scale_later", "num_valid_tokens", "repeat")),
    **sweep("t5-h1-i1-e{e}-k2-{d}-random-route.refuses", "invalid arguments", e=(7, 8), d=("bf16", "fp32")),
    **sweep("t9-h32-i16-e{e}-k2-bf16-random-route.layer", "the layer accepts the output of the router", e=(8, 128)),
}  # fmt: skip


def test_routing(check):
    check()
