"""Training data for LLM-QAT: the teacher writes it."""
