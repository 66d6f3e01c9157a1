"""The other runs that use a store. Each notes in the store when it is started (``storage.notes``) its resolved config
and the folder that it was started in: what relative paths in the config are relative to.

A run may be deleted at any time: a note whose config is gone is passed over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.config import load_config
from eopd.stages.job import NullProgress
from eopd.storage import paths
from eopd.storage.errors import DamagedPart, StoreError
from eopd.storage.fingerprints import Digests
from eopd.storage.notes import notes, write_note
from eopd.storage.places import is_bucket
from eopd.storage.untrusted import kind_of

if TYPE_CHECKING:
    from eopd.pipeline.runner import Runner


def register(runner: Runner) -> None:
    """Note in the store that this run uses it."""
    write_note(runner.store, runner.paths.config.resolve(), Path.cwd())
    if runner.facts.digests is not None:
        runner.facts.digests.save()  # the store may be there only now: workers need not hash the models again


def configs(store: Path) -> dict[Path, Path | None]:
    """Resolved configs of the runs that use ``store`` and still exist, as far as can be seen, and where each was
    started; None in an older note.

    Raises:
        DamagedPart: a note that cannot be read, so that the run behind it is not known.
    """
    found: dict[Path, Path | None] = {}
    for name, note in notes(store):
        if isinstance(note, DamagedPart):
            raise DamagedPart(
                f"{store / paths.RUNS / name} cannot tell which run uses the store: {note}. `eopd store verify "
                "--repair` sets it aside, and the next start of the run writes it again"
            )
        if not _is_gone(note.config):
            found[note.config] = note.started
    return found


def _is_gone(config: Path) -> bool:
    """One that another user does not let us see may be there."""
    try:
        os.stat(config)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def sharing_checkpoints(runner: Runner) -> Iterator[tuple[Path, Runner | str]]:
    """Other runs that may plan the same checkpoints, each with its plan, or with why that cannot be made."""
    from eopd.pipeline.planning import plan_run
    from eopd.pipeline.runner import Runner

    ours, store = runner.settings, runner.store.resolve()
    digests = Digests.of_store(store)
    try:
        known = configs(store)
    except DamagedPart as error:
        yield store / paths.RUNS, str(error)
        return
    for config, started in known.items():
        if config == runner.paths.config.resolve():
            continue
        try:
            if not config.is_file():
                raise ValueError(f"{config} is {kind_of(config)}")
            settings = load_config(str(config))
            # both are in a checkpoint's key: where they differ, no checkpoint is the same, and no plan is needed
            if settings.seed != ours.seed or settings.train.semantic() != ours.train.semantic():
                continue
            with contextlib.chdir(started or Path.cwd()):  # its models and prompts are named relative to that
                behind = [place if is_bucket(place) else os.path.abspath(place) for place in settings.read_only_stores]
                settings = settings.model_copy(update={"store": str(store), "read_only_stores": behind})
                facts, plan = plan_run(settings, digests=digests)
        except (ValueError, StoreError, OSError) as error:
            yield config, str(error)
            continue
        yield config, Runner(settings, facts, plan, NullProgress())
