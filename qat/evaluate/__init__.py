"""Measurements: perplexity, KL to the teacher, and the paper's tasks."""
