"""Kernels under test. Nothing here imports the harness, the reference or the cases."""
