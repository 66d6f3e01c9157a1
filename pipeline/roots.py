"""What the runs of a store refer to: what `eopd store gc --runs` keeps.

A run refers to all that its plan names, and to the resumable states of its trainings. Its plan is made where it was
started, since a resolved config names folders as they were given. The runs are those in the folder that is named, and
those that the store itself knows of (``pipeline.neighbours``), wherever they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from eopd.pipeline.config import ConfigError, RunSettings, load_config
from eopd.pipeline.neighbours import configs
from eopd.pipeline.planning import plan_run
from eopd.pipeline.runner import states_of
from eopd.storage.errors import StoreError
from eopd.storage.listing import keys
from eopd.storage.places import is_bucket, open_place

Root = tuple[str, str]
"""(kind, key)"""


def roots(runs: Path, store: Path) -> dict[Path, set[Root]]:
    """Of every run that uses ``store``: its config, and what it refers to.

    Raises:
        ValueError: none of the runs below ``runs`` uses the store, none has anything in it, one only reads it, or one
            cannot be planned; says which.
    """
    store = store.resolve()
    known = {config.resolve() for config in configs(store)}
    below = {config.resolve() for config in runs.glob("*/config.yaml")}
    found: dict[Path, set[Root]] = {}
    for config in sorted(known | below):
        with _naming(config):
            settings = load_config(str(config))
        base = _started_in(config, settings)
        folders = [open_place(place) for place in settings.read_only_stores if not is_bucket(place)]
        if store in [(base / folder).resolve() for folder in folders]:
            raise ValueError(
                f"{store} is only read by {config}: what others made in it is not this run's to remove. Collect it "
                "where its own runs are, or leave out --runs to remove left-overs of killed jobs only"
            )
        if (base / settings.store).resolve() == store:
            with _naming(config):
                found[config] = set(_of_run(settings, base))
        elif config in known and not Path(settings.store).is_absolute():
            raise ValueError(
                f"{config} uses {store}, and names it {settings.store}: run `eopd store gc` in the folder that this is "
                "relative to"
            )
    if not below & found.keys():
        raise ValueError(f"no run below {runs} uses {store}: nothing tells what of it is still wanted")
    if not any(some.intersection(keys(store)) for some in found.values()):
        raise ValueError(
            f"nothing in {store} is of a run below {runs}: were its models or prompts changed? If nothing in it is "
            "wanted, remove the folder"
        )
    return found


def _started_in(config: Path, settings: RunSettings) -> Path:
    """The folder that a run's relative paths start from: ``config`` is <that>/<runs>/<name>/config.yaml."""
    folder, runs = config.parent.parent, Path(settings.runs)
    depth = len(runs.parts)
    if not runs.is_absolute() and folder.parts[len(folder.parts) - depth :] == runs.parts:
        return Path(*folder.parts[: len(folder.parts) - depth])
    return Path.cwd()


def _of_run(settings: RunSettings, base: Path) -> Iterator[Root]:
    with contextlib.chdir(base):
        jobs = plan_run(settings)[1].jobs
    for job in jobs:
        named = (job.output, job.side, states_of(job) if job.stage == "train" else None)
        yield from ((identity.kind, identity.key) for identity in named if identity is not None)


@contextlib.contextmanager
def _naming(config: Path) -> Iterator[None]:
    try:
        yield
    except (ConfigError, StoreError) as error:
        raise ValueError(
            f"what {config} refers to cannot be told: {error}. Mend that; or, if nothing of this run is wanted any "
            f"more, remove {config.parent}"
        ) from error
