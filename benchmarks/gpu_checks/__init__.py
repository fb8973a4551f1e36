"""What benchmarks/gpu.py checks: one file for each question, one function for each check."""
