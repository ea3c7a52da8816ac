"""Measure how many bits the fp8 tensor core keeps. Run on a GPU: python3 docs/fp8_accumulator.py

One instruction sums a product of 1 and a product of 2^-j. The largest j that changes the sum is the number of fraction
bits that are kept below the largest product. harness/device.py declares this number for the device.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[None, :] * K + k[:, None])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, max_num_imprecise_acc=K))


def kept_bits(rows: int) -> int:
    """The largest j <= 18 for which 1 + 2^-j is not 1 in a tile of this many rows (e4m3 has no product below 2^-18)."""
    kept = 0
    for j in range(1, 19):
        a, b = torch.zeros(rows, 64), torch.zeros(64, 64)
        a[:, 0], b[:, 0] = 1.0, 1.0
        a[:, 1], b[:, 1] = 2.0 ** -(j // 2), 2.0 ** -(j - j // 2)
        a, b = (t.to(torch.float8_e4m3fn).cuda() for t in (a, b))
        out = torch.empty(rows, 64, device="cuda")
        _dot[(1,)](a, b, out, rows, 64, 64)
        if out[0, 0].item() != 1.0:
            kept = j
    return kept


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    for rows in (16, 32, 64, 128):
        print(f"tile of {rows:3} rows: {kept_bits(rows)} fraction bits")
