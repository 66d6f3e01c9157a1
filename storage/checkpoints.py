"""A checkpoint: two parts, the student's weights and the optimiser's state, and the names of their files.

Producer: ``stages.train``. Readers: every stage that runs the student, ``stages.report`` and ``pipeline.retention``.
"""

CHECKPOINTS = "checkpoints"
"""The kind of these artifacts."""

WEIGHTS, OPTIMIZER = 0, 1
"""Parts of a checkpoint."""

METRICS_FILE = "metrics.jsonl"
TRAINING_FILE = "training.json"
OPTIMIZER_FILE = "optimizer.safetensors"
ROUND_START_FILE = "round_start.safetensors"
ADAPTER_FOLDER = "adapter"
