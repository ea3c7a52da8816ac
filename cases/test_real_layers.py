"""Layers of released models, full size on a GPU and scaled down on the CPU, with decode and prefill batches.

The dimensions are the defaults of the configuration classes of transformers 5 (tests/problem/test_real_layers.py
compares them), except for Qwen2-57B-A14B and GPT-OSS-20B, whose class defaults describe another model of the same
family.
"""

from harness.problem.families import sweep

FAMILY = "real_layers"
#: model: (full-size layer, layer scaled down for the CPU)
LAYERS = {
    "Mixtral-8x7B": ("h4096-i14336-e8-k2-bf16", "h256-i896-e8-k2-bf16"),
    "Qwen3-30B-A3B": ("h2048-i768-e128-k8-bf16", "h128-i48-e128-k8-bf16"),
    "DeepSeek-V3": ("h7168-i2048-e256-k8-bf16-e4m3.block.group", "h448-i128-e64-k8-bf16-e4m3.block.group"),
    "Llama-4-Scout": ("h5120-i8192-e16-k1-bf16-win", "h320-i512-e16-k1-bf16-win"),
    "GPT-OSS-20B": ("h2880-i2880-e32-k4-bf16-swigluoai-bias", "h180-i180-e32-k4-bf16-swigluoai-bias"),
    "OLMoE": ("h2048-i2048-e64-k8-bf16", "h128-i128-e64-k8-bf16"),
    "Qwen2-57B-A14B": ("h3584-i2560-e64-k8-bf16", "h224-i160-e64-k8-bf16"),
}
CPU_ROWS: dict[str, str] = {}
GPU_ROWS: dict[str, str] = {}
for model, (whole, small) in LAYERS.items():
    # GPT-OSS clamps at 7, below the saturation of its gate, so its routings use the random fill.
    fill = "random" if "swigluoai" in whole else "exact"
    CPU_ROWS |= sweep(f"t{{t}}-{small}", f"{model}: decode and prefill", t=(1, 4, 16, 48))
    CPU_ROWS |= sweep(f"t24-{small}-{{r}}", f"{model}: uneven routings", r=("skewed", "one", "half", "balanced"))
    GPU_ROWS |= sweep(f"t{{t}}-{whole}", f"{model}: decode and prefill", t=(1, 64))
    GPU_ROWS |= {f"t1024-{whole}-{fill}": f"{model}: prefill"}
    GPU_ROWS |= sweep(f"t32-{whole}-{{r}}-{fill}", f"{model}: uneven routings", r=("skewed", "one", "half"))


def test_real_layers(check):
    check()
