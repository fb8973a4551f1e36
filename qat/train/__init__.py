"""Distillation on DeepSpeed: engines, losses, the loop, checkpoints, and what a run needs."""
