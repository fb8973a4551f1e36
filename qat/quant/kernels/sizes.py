"""What those who start the kernels and those who choose among products both know, without Triton."""

FEW_ROWS = 64
"""Products of so many rows, or fewer, have tiles of their own, and are timed apart."""
