"""Every quantizer on the same vectors at equal bits; `python -m benchmarks.quantizers`."""
