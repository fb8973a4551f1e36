"""Distillation on DeepSpeed: engines, losses, the loop, checkpoints, and the plan of a run's needs."""
