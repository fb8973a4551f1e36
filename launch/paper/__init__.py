"""Drawing the paper's tables and judging its claims."""
