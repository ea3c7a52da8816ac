"""moe-harness: any fused Mixture-of-Experts kernel against the oracle, on any device."""
