"""Content signals to Semantic IDs: signals, fusion, quantizers, SID codec, training, materialization."""
