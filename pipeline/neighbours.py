"""The other runs that use a store. Each notes its resolved config in ``<store>/.runs`` when it is started.

A run may be deleted at any time: a note whose config is gone is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.config import ConfigError, load_config
from eopd.stages.job import NullProgress
from eopd.storage import paths
from eopd.storage.files import create_exclusively, sha256_text

if TYPE_CHECKING:
    from eopd.pipeline.runner import Runner

NAME_LENGTH = 16


def register(runner: Runner) -> None:
    """Note in the store that this run uses it."""
    config = str(runner.paths.config.resolve())
    note = runner.store / paths.RUNS / sha256_text(config)[:NAME_LENGTH]
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        create_exclusively(note, config + "\n")
    if runner.facts.digests is not None:
        runner.facts.digests.save()  # the store may be there only now: workers need not hash the models again


def configs(store: Path) -> list[Path]:
    """Resolved configs of the runs that use ``store`` and still exist."""
    notes = sorted((store / paths.RUNS).glob("*"))
    found = [Path(note.read_text(encoding="utf-8").strip()) for note in notes if not note.name.startswith(".")]
    return [config for config in found if config.is_file()]


def sharing_checkpoints(runner: Runner) -> Iterator[tuple[Path, Runner | str]]:
    """Other runs that may plan the same checkpoints, each with its plan, or with why that cannot be made."""
    from eopd.pipeline.planning import plan_run
    from eopd.pipeline.runner import Runner

    ours = runner.settings
    for config in configs(runner.store):
        if config == runner.paths.config.resolve():
            continue
        try:
            settings = load_config(str(config))
            # both are in a checkpoint's key: where they differ, no checkpoint is the same, and no plan is needed
            if settings.seed != ours.seed or settings.train.semantic() != ours.train.semantic():
                continue
            facts, plan = plan_run(settings)
        except (ConfigError, ValueError) as error:
            yield config, str(error)
            continue
        yield config, Runner(settings, facts, plan, NullProgress())
