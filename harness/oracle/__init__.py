"""The expected output, its predicted deviation, and the judge. It computes in float64, with reference/ alone."""
