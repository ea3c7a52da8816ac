"""The time of a call: pytest cases -m "cuda and perf" [--benchmark-json=PATH]. Runs only if -m names perf.

Each case is judged first, in the same process: an incorrect kernel gets no time. The layers are those of
cases/test_real_layers.py, DeepSeek-V3 as one of its eight tensor-parallel ranks.
"""

import pytest

from harness.perf.timing.benchmark import device_clock
from harness.problem.families import TIMED, sweep

FAMILY = TIMED
GPU_ROWS = {
    **sweep("t{t}-h4096-i14336-e8-k2-bf16-random", "Mixtral-8x7B: decode, small batches, prefill", t=(1, 16, 256, 4096)),
    **sweep("t{t}-h2048-i768-e128-k8-bf16-random", "Qwen3-30B-A3B: the low-latency path at 1 token, then the aligned path", t=(1, 4, 64, 1024, 4096)),
    **sweep("t{t}-h2048-i768-e128-k8-bf16-e4m3.block.group-random", "Qwen3-30B-A3B in fp8", t=(1, 64, 1024)),
    **sweep("t{t}-h7168-i256-e256-k8-bf16-e4m3.block.group-random", "DeepSeek-V3 in fp8, TP 8", t=(1, 8, 64, 1024)),
    **sweep("t{t}-h5120-i8192-e16-k1-bf16-win-random", "Llama-4-Scout: router weight on input", t=(1, 64)),
    **sweep("t{t}-h2048-i768-e128-k8-bf16-kn-random", "the layout of cached instances", t=(1, 64)),
    "t1-h256-i128-e8-k1-bf16-random": "almost no work: the time of launches and of the host",
}  # fmt: skip
CPU_ROWS = {
    **sweep("t{t}-h512-i256-e8-k2-{d}-random", "decode and prefill, scaled down for a CPU", t=(1, 64), d=("bf16", "fp32")),
}  # fmt: skip


@pytest.mark.benchmark(timer=device_clock)
def test_perf(check, benchmark):
    check(benchmark)
