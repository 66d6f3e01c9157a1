"""A real language model on a laptop; its processes wait for threads as those of `eopd` do."""

from eopd.pipeline.worker import set_environment

set_environment()
