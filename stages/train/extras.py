"""Check for optional packages before any work. Imports no torch."""

from __future__ import annotations

import importlib.util

from eopd.stages.train.settings import TrainSettings
from eopd.storage.errors import InputError
from eopd.storage.extras import installing


def require_extras(settings: TrainSettings) -> None:
    """Raise ValueError naming the first package that is not installed, the setting that needs it and the remedy."""
    if settings.lora is not None and importlib.util.find_spec("peft") is None:
        raise InputError(
            "train.lora needs peft, which is not installed",
            setting="train.lora",
            remedy=f"To add it, {installing('peft')}; or unset train.lora",
        )
    for name in settings.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"train.trackers names {name!r}, which is not installed",
                setting="train.trackers",
                remedy=f"To add it, {installing('trackers')}; or leave it out (TensorBoard and metrics.jsonl are "
                "written anyway)",
            )
