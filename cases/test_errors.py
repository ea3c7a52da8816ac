"""Bad input must raise an error that names the problem, write nothing, and leave the next call correct."""

from harness.problem.families import sweep

FAMILY = "errors"
ALWAYS = (
    "hidden_size", "transposed", "hidden_dims", "hidden_dtype", "hidden_columns", "weights_dtype", "ids_dtype", "ids_shape",
    "ids_tokens", "out_shape", "out_dtype", "w2_shape", "experts", "weight_on_input_top_k", "device",
)  # fmt: skip
ROWS = {
    **sweep("t9-h256-i64-e8-k2-{d}-error.{e}", "each argument in each layout", d=("bf16", "bf16-kn"), e=ALWAYS),
    **sweep("t9-h256-i64-e8-k2-{d}-error.weight_dtype", "weights of the wrong dtype", d=("bf16", "bf16-kn", "fp16", "fp32")),
    **sweep("t9-h256-i64-e8-k2-{d}-error.bias_shape", "a bias that is too short", d=("bf16-bias", "bf16-bias-kn")),
    **sweep("t9-h256-i192-e8-k2-bf16-{q}-error.{e}", "missing scales and scales of the wrong shape",
            q=("e4m3.tensor.none-kn", "e4m3.channel.token", "e4m3.block.group", "e4m3.block.none-kn"),
            e=("scale_missing", "scale_shape", "transposed", "hidden_size")),
    **sweep("t9-h256-i64-e8-k2-bf16-ep2.1-{l}-error.expert_map_length", "an expert_map of the wrong length", l=("nk", "kn")),
    **sweep("t9-h256-i64-e8-k2-bf16-{o}-error.layer_device", "a weight, bias, scale, static scale or map on another device",
            o=("", "bias-kn", "e4m3.channel.none-kn", "e4m3.tensor.static", "ep2.1", "ep2.1-kn")),
    **sweep("t1-h256-i64-e16-k2-bf16-error.{e}", "the low-latency path checks its arguments too", e=("hidden_size", "weights_dtype", "ids_dtype", "out_shape")),
}  # fmt: skip


def test_errors(check):
    check()
