"""The oracle: a naive float64 Mixture-of-Experts layer that imports nothing but torch.

It shares no code with the kernels it judges. Start reading at `naive.py`. `moe.py` is the same layer
stage by stage, with the roundings that a backend declares (`plan.py`). `formats.py` holds the only rounding there is,
`scheme.py` the quantization schemes, `quant.py` their arithmetic, `activation.py` the activations, `routing.py` the
choice of experts.
"""
