"""The paper's tables and claims: how they are drawn and judged."""
