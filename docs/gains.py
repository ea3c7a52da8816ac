"""Measure the gain of three optimizations of our own kernels on this GPU: PYTHONPATH=. python3 docs/gains.py

    the low-latency path            against the aligned path, on layers that take it
    permutation scratch             against buffers that are allocated at every call
    the cached instance             against one that is built at every call

Each pair is measured 30 times, in turns. A line gives both medians, and the median of the ratio with its 95 % interval
(scipy's bootstrap over the 30 pairs). "device": events inside a replayed graph, cold L2, rotated inputs. "host": time
until the call returns. "eager": the time of 50 calls in a row, launched from Python, divided by 50, as in a model
without graphs.
"""

import time
from functools import partial

import numpy as np
import torch
from scipy.stats import bootstrap

from harness.device import Device, start
from harness.perf.timing.clock import Clock, Stopwatch
from harness.problem.case import Case
from harness.run.case import run_case

ROUNDS = 30


class Eager:
    """Calls in a row, with the interface of a Clock."""

    def __init__(self, call):
        self.call = call

    def sample(self, metric, count):
        times = []
        for _ in range(count):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(50):
                self.call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begun) / 50 * 1e6)
        return times


def compare(what, metric, slow, fast):
    """Print one line: both medians, and the share of the slow one's time that the fast one saves."""
    pairs = np.array(
        [
            [one.sample(metric, 1)[0] for one in ((slow, fast) if n % 2 else (fast, slow))][:: 1 if n % 2 else -1]
            for n in range(ROUNDS)
        ]
    )
    saved = (1 - pairs[:, 1] / pairs[:, 0]) * 100
    low, high = bootstrap((saved,), np.median, method="percentile", random_state=0).confidence_interval
    a, b = np.median(pairs, 0)
    print(
        f"{what:62} {metric[:-3]:7} {a:9.1f} {b:9.1f}   saves {np.median(saved):5.1f} % ({low:.1f} to {high:.1f})",
        flush=True,
    )


def main():
    device = Device("cuda")
    start({"cuda"})
    from kernels.cached import CachedFusedMoE, TritonCachedMoE
    from kernels.triton.backend import TritonAlignedMoE, TritonMoE, TritonPermuteMoE
    from kernels.triton.permute import MoEPermuteScratch, moe_permute

    def stopwatch(case, backend):
        verdict = run_case(case, backend, device)
        assert verdict.status == "passed", verdict.reason  # a wrong kernel has no speed
        return Stopwatch(case, backend, device)

    def permuted(x, ids, scratch):
        return moe_permute(x, ids, 128, scratch=scratch).hidden_states

    class WithScratch(TritonPermuteMoE):
        def prepare(self, problem, layer):
            return super().prepare(problem, layer, self.make_scratch(problem, layer.w13.device))

    class BuiltEveryCall(TritonCachedMoE):
        def prepare(self, problem, layer):
            def call(hidden_states, topk_weights, topk_ids):
                out = torch.empty_like(hidden_states)
                CachedFusedMoE(layer).apply(out, hidden_states, topk_weights, topk_ids)
                return out

            return call

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds a call")
    print(f"{'':62} {'':7} {'without':>9} {'with':>9}")
    layers = {
        "Qwen3-30B-A3B bf16": "h2048-i768-e128-k8-bf16",
        "Qwen3-30B-A3B fp8": "h2048-i768-e128-k8-bf16-e4m3.block.group",
        "DeepSeek-V3 fp8, TP 8": "h7168-i256-e256-k8-bf16-e4m3.block.group",
    }
    for name, layer in layers.items():
        for tokens in (1, 2, 4):
            case = Case.parse(f"t{tokens}-{layer}-random")
            pair = stopwatch(case, TritonAlignedMoE()), stopwatch(case, TritonMoE())
            for metric in ("device_us", "host_us"):
                compare(f"low-latency path: {name}, {tokens} tokens", metric, *pair)
    for tokens in (1, 4, 16, 64, 256, 1024, 4096):
        x = torch.randn(tokens, 2048, dtype=torch.bfloat16, device="cuda")
        ids = torch.rand(tokens, 128, device="cuda").topk(8).indices.int()
        scratch = MoEPermuteScratch(tokens, 8, 128, device="cuda", hidden_size=2048, hidden_dtype=torch.bfloat16)
        calls = [partial(permuted, x, ids, None), partial(permuted, x, ids, scratch)]
        clocks = [Clock([call], device, deterministic=False) for call in calls]
        for metric in ("device_us", "host_us"):
            compare(f"permutation scratch: moe_permute, {tokens} tokens of Qwen3-30B-A3B", metric, *clocks)
        compare(f"permutation scratch: moe_permute, {tokens} tokens of Qwen3-30B-A3B", "eager_us", *map(Eager, calls))
    for tokens in (1, 16):
        case = Case.parse(f"t{tokens}-h2048-i768-e128-k8-bf16-random")
        pair = stopwatch(case, TritonPermuteMoE()), stopwatch(case, WithScratch())
        compare(f"permutation scratch: the whole layer, {tokens} tokens", "host_us", *pair)
        case = Case.parse(f"t{tokens}-h2048-i768-e128-k8-bf16-kn-random")
        pair = stopwatch(case, BuiltEveryCall()), stopwatch(case, TritonCachedMoE())
        compare(f"cached instance: Qwen3-30B-A3B, {tokens} tokens", "host_us", *pair)


main()
