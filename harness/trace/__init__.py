"""Observations of one call: launches, operators, memory, transfers; and Triton's interpreter, mended.

`Tracing` (tracing.py) records a call; fence.py lays poison around tensors; sanitizer.py watches interpreted kernels.
"""
