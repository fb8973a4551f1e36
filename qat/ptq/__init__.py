"""Post-training quantization: RTN, GPTQ and SmoothQuant."""
