"""A real language model on a laptop; its processes wait for threads as those of `eopd` do."""

import os

from eopd.pipeline.worker import ENVIRONMENT

os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported
