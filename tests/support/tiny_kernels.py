"""Kernels of known behaviour, small enough to be compiled in a test.

This module imports nothing of the harness, because the process that compiles imports this module.
"""

import os

import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y[i] = x[i] for i < n; a grid of cdiv(n, BLOCK)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit(do_not_specialize=["n"])
def unspecialised_kernel(x_ptr, n, BLOCK: tl.constexpr):
    """Like copy_kernel, onto x itself, compiled once whatever n is."""
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c [BLOCK_M, BLOCK_N] fp32 = a [BLOCK_M, K] @ b [K, BLOCK_N]."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (first + k)[None, :])
        b = tl.load(b_ptr + (first + k)[:, None] * BLOCK_N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * BLOCK_N + n[None, :], acc)


@triton.jit
def refused_kernel(x_ptr):
    """Compiles nowhere."""
    tl.static_assert(False, "refused on purpose")


class Deadly:
    """A kernel that ends the process of its compiler, as soon as the compiler looks it up."""

    @property
    def fn(self):
        os._exit(7)


deadly_kernel = Deadly()
