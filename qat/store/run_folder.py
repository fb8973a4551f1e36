"""Names in the folder of a training run."""

SETTINGS, CHECKPOINTS, LOG, TENSORBOARD, FINAL = "settings.json", "checkpoints", "log.jsonl", "tensorboard", "final"
"""Its settings, its checkpoints, one JSON line per step, the same for TensorBoard, and the trained student."""

LATEST = "latest"
"""The file among the checkpoints that names the latest."""

STUDENT_PREFIX = "student."
"""Begin of a weight's name in a checkpoint, which is of the student and its loss."""
