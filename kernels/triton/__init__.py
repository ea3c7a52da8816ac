"""A fused Mixture-of-Experts layer in Triton: portable, deterministic, free of atomics.

    hidden_states -> (quantize) -> GEMM 1, gathered by expert -> activation -> (quantize) -> GEMM 2 -> combine

Names used throughout: T tokens, K hidden_size, I intermediate_size, E local experts, k top_k. A pair is one (token,
slot) of topk_ids [T, k], numbered token * k + slot; P = T * k counts them. A pair is valid if its id lies in
[0, num_experts) and expert_map, where there is one, does not send it to -1.
"""
