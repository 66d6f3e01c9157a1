"""Retention: which old checkpoints are pruned and what gc keeps, by set arithmetic over the notes of runs
(``storage.notes``).

When a run starts, and whenever it prunes, it writes down every artifact that its plan names and every part of a
checkpoint that it still wants. A copy lies in the run's folder, so that a project can be moved. No run is ever planned
on behalf of another.

A part of a checkpoint is pruned if its run has no more use for it (``Run.unwanted``) and no other run over the store
wants it. The figures of its steps stay, and with LoRA the adapter. A pruned part counts as done; it is rebuilt only if
something missing reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from eopd.pipeline.run import Run
from eopd.storage import garbage as pruning
from eopd.storage import paths
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, InputError
from eopd.storage.notes import Keys, Note, Parts, note_name, notes, write_note
from eopd.storage.paths import (
    ADAPTER_FOLDER,
    METRICS_FILE,
    OPTIMIZER,
    OPTIMIZER_FILE,
    ROUND_START_FILE,
    TRAINING_FILE,
    WEIGHTS,
)
from eopd.storage.places import is_bucket

MEND = (
    "`eopd store verify --repair` sets it aside, and the next start of its run writes it again; remove it if that run "
    "is not wanted any more"
)


def note_of(run: Run) -> Note:
    """Return the note of what the run refers to now."""
    jobs = run.plan.jobs
    # after a kill between a checkpoint's commit and the end of its job, states are left that nothing will read
    scratch = [job.scratch for job in jobs if job.scratch is not None and not run.is_made(job)]
    checkpoints = {(job.output.key, part) for job in jobs if job.is_prunable for part in (WEIGHTS, OPTIMIZER)}
    others = [other.checkpoint for other in run.others().values()]
    read = {(identity.key, WEIGHTS) for identity in others} & run.needed()
    return Note(
        config=run.paths.config.resolve(),
        store=run.store.resolve(),
        read_only=tuple(Path(place).resolve() for place in run.settings.read_only_stores if not is_bucket(place)),
        artifacts={job.key for job in jobs} | {(identity.kind, identity.key) for identity in (*scratch, *others)},
        wanted=(checkpoints - run.unwanted()) | read,
    )


def note(run: Run) -> None:
    """Write the run's note."""
    write_note(run.store, note_of(run), own_copy=run.paths.references)


def notes_of_others(store: Path, own: str = "") -> Iterator[Note]:
    """Return the notes of other runs that use ``store``, except runs whose folder is gone.

    Raises:
        DamagedPart: a note is unreadable, so that what its run refers to is not known.
    """
    for name, one in notes(store):
        if isinstance(one, DamagedPart):
            raise DamagedPart(f"{one}: what its run refers to is not known", file=one.file, remedy=MEND)
        if name != own and not _is_gone(one.config):
            yield one


def _is_gone(config: Path) -> bool:
    """True if the run's config is gone; False if another user does not let us see it."""
    try:
        os.stat(config)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


# -- pruning -------------------------------------------------------------------------------------------------------


def prune_old(run: Run) -> int:
    """Prune parts that no run wants and complete interrupted prunings; returns the bytes freed."""
    going = run.unwanted()
    if not going:
        return 0
    note(run)
    try:
        for other in notes_of_others(run.store, own=note_name(run.paths.config.resolve())):
            going -= other.wanted
    except DamagedPart as error:
        run.progress.line(f"old checkpoints stay: {error}")
        return 0
    freed = sum(pruning.prune(artifact, part, drops) for artifact, part, drops in _prunings(run, going))
    if freed:
        run.progress.line(f"old checkpoints pruned: {freed / 1e6:,.1f} MB freed (train.keep_checkpoints)")
    return freed


def _prunings(run: Run, going: Parts) -> Iterator[tuple[Artifact, int, Callable[[str], bool]]]:
    """Yield (checkpoint, part, files to drop) for every part of ``going`` in the run's own store."""
    for job in run.trained():
        artifact = run.artifact(job.output)
        if not run.is_own(artifact):
            continue
        whole = (artifact.key, WEIGHTS) in going
        if whole:
            yield artifact, WEIGHTS, lambda name: name not in (METRICS_FILE, TRAINING_FILE)
        if (artifact.key, OPTIMIZER) in going and whole:  # averaged weights go too; an adapter is small and stays
            yield artifact, OPTIMIZER, lambda name: not name.startswith(f"{ADAPTER_FOLDER}/")
        elif (artifact.key, OPTIMIZER) in going:
            yield artifact, OPTIMIZER, lambda name: name in (OPTIMIZER_FILE, ROUND_START_FILE)


# -- garbage collection --------------------------------------------------------------------------------------------


def references(store: Path, runs: Path) -> dict[Path, Keys]:
    """Return the artifacts that runs over ``store`` refer to, by the run's config.

    The runs are those that left a note in the store, and those below ``runs``, wherever the project was moved to.

    Raises:
        DamagedPart: a note is unreadable.
        ValueError: no run below ``runs`` uses the store, or one of them only reads it.
    """
    store = store.resolve()
    by_config = {one.config: one.artifacts for one in notes_of_others(store)}
    below: Keys = set()
    for path in sorted(runs.glob(f"*/{paths.REFERENCES}")):
        try:
            own = Note.read(path)
        except DamagedPart as error:
            problem = f"{error}: what its run refers to is not known"
            raise DamagedPart(problem, file=error.file, remedy="Start it, or remove its folder") from error
        if store in own.read_only:
            raise InputError(
                f"{path.parent} only reads {store}",
                setting="--runs",
                file=path.parent,
                remedy="collect that store where its own runs are, or leave out --runs to remove left-overs of "
                "killed jobs only",
            )
        below |= own.artifacts
        by_config.setdefault(path.parent.resolve() / "config.yaml", own.artifacts)
    if not any((store / kind / key).is_dir() for kind, key in below):
        raise InputError(
            f"nothing in {store} belongs to a run below {runs}: were the models or prompts changed?",
            setting="--runs",
            file=runs,
        )
    return by_config
