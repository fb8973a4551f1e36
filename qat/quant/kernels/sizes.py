"""Constants shared by the kernel launcher and the matmul selection, importable without Triton."""

FEW_ROWS = 64
"""Matmuls of this many rows or fewer have their own tiles, and are timed separately."""
