"""Quantization: number formats, quantized layers, the simulated KV cache, and ``prepare``, which applies them."""
