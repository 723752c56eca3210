"""Comparison of all quantizers on the same vectors at equal bits; `python -m benchmarks.quantizers`."""
