"""What the runs of a store refer to: what `eopd store gc --runs` keeps.

A run refers to all that its plan names, and to the resumable states of its trainings. Its plan is made where it was
started, since a resolved config names folders as they were given. The runs are those in the folder that is named, and
those that the store itself knows of (``pipeline.neighbours``), wherever they are; the store's note says where they were
started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from eopd.pipeline.config import ConfigError, RunSettings, load_config
from eopd.pipeline.neighbours import configs
from eopd.pipeline.planning import plan_run
from eopd.pipeline.runner import states_of
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import StoreError
from eopd.storage.fingerprints import Digests
from eopd.storage.listing import keys
from eopd.storage.places import is_bucket, open_place
from eopd.storage.untrusted import kind_of

Root = tuple[str, str]
"""(kind, key)"""


def roots(runs: Path, store: Path) -> dict[Path, set[Root]]:
    """Of every run that uses ``store``: its config, and what it refers to.

    Raises:
        ValueError: none of the runs below ``runs`` uses the store, none has anything in it, one only reads it, or one
            cannot be planned; says which.
    """
    store = store.resolve()
    digests = Digests.of_store(store)
    known = {config.resolve(): started for config, started in configs(store).items()}
    below = {config.resolve(): config.absolute() for config in runs.glob("*/config.yaml")}
    found: dict[Path, set[Root]] = {}
    for config in sorted(known.keys() | below.keys()):
        with _naming(config):
            if config.exists() and not config.is_file():
                raise ConfigError(f"it is {kind_of(config)}")
            settings = load_config(str(config))
            told = _started_in(settings, known.get(config), below.get(config, config), config)
        base = Path.cwd() if told is None else told
        folders = [open_place(place) for place in settings.read_only_stores if not is_bucket(place)]
        if store in [(base / folder).resolve() for folder in folders]:
            raise ValueError(
                f"{store} is only read by {config}: what others made in it is not this run's to remove. Collect it "
                "where its own runs are, or leave out --runs to remove left-overs of killed jobs only"
            )
        if (base / settings.store).resolve() == store:
            with _naming(config, told is not None):
                found[config] = set(_of_run(settings, base, digests))
        elif config in known and not Path(settings.store).is_absolute():
            raise ValueError(
                f"{config} uses {store}, and names it {settings.store}: run `eopd store gc` in the folder that this is "
                "relative to"
            )
    if not below.keys() & found.keys():
        raise ValueError(f"no run below {runs} uses {store}: nothing tells what of it is still wanted")
    if not any(some.intersection(keys(store)) for some in found.values()):
        raise ValueError(
            f"nothing in {store} is of a run below {runs}: were its models or prompts changed? If nothing in it is "
            "wanted, remove the folder"
        )
    return found


def _started_in(settings: RunSettings, noted: Path | None, *configs: Path) -> Path | None:
    """The folder that a run's relative paths start from; None: nothing tells.

    Args:
        noted: what the store's note says.
        configs: names of the run's config; without links the last one, which is <that>/<runs>/<name>/config.yaml.
    """
    if noted is not None and noted.is_dir():
        return noted
    runs = Path(settings.runs)
    if runs.is_absolute():
        return None
    able = [Path.cwd()]
    for folder in (config.parent.parent for config in configs):
        above = len(folder.parts) - len(runs.parts)
        able += [Path(*folder.parts[:above])] if folder.parts[above:] == runs.parts else []
    here = configs[-1].parent.parent
    return next((folder for folder in able if (folder / runs).resolve() == here), None)


def _of_run(settings: RunSettings, base: Path, digests: Digests) -> Iterator[Root]:
    with contextlib.chdir(base):
        jobs = plan_run(settings, digests=digests)[1].jobs
        trainings = [job.output for job in jobs if job.stage == "train"]
        made = {output.key for output in trainings if Artifact(Path(settings.store), output).is_complete()}
    for job in jobs:
        # a kill after a checkpoint's commit leaves the states on the way there, which nothing will read
        trains = job.stage == "train" and job.output.key not in made
        named = (job.output, job.side, states_of(job) if trains else None)
        yield from ((identity.kind, identity.key) for identity in named if identity is not None)


@contextlib.contextmanager
def _naming(config: Path, told: bool = True) -> Iterator[None]:
    """Args:
    told: whether the folder that its relative paths start from is known.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"what {config} refers to cannot be told: {error}. Mend that, or run `eopd store gc` as a user who may "
            "read all that this run names"
        ) from error
    except (ConfigError, StoreError) as error:
        mend = (
            f"Mend that; or, if nothing of this run is wanted any more, remove {config.parent}"
            if told
            else "Mend that, or run `eopd store gc` in the folder that the run was started in"
        )
        raise ValueError(f"what {config} refers to cannot be told: {error}. {mend}") from error
