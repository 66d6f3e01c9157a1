"""Folders that `eopd push` uploads to the Hub: a store of one artifact, or a student, each with its card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from eopd.pipeline.cards import dataset_card, student_card
from eopd.pipeline.errors import RunError
from eopd.pipeline.export import Student, copy_student, refuse_content
from eopd.pipeline.run import Run
from eopd.storage import listing, paths
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import MissingArtifact
from eopd.storage.files import naming_full_disks
from eopd.storage.hub import HubDataset
from eopd.storage.markers import file_text
from eopd.storage.sources import filled_parts

CARD = "README.md"
KINDS = ("scores", "rollouts", "student_topk", "verdicts", "evaluations")
"""Kinds of artifacts that make a dataset."""


def artifacts_of(store: Path, name: str, *, rollouts: bool = True) -> list[Artifact]:
    """Return the artifact that ``name`` identifies and, if they are in the store, the rollouts that it belongs to.

    Raises:
        RunError: it is of another kind, is not complete, or its data were pruned. StoreError: there is none.
    """
    artifact = listing.find(store, name)
    assert isinstance(artifact, Artifact)
    if artifact.kind not in KINDS:
        raise RunError(
            f"{artifact.kind}/{artifact.key} is no dataset: `eopd push` takes {', '.join(KINDS)}, and `eopd push "
            "student RUN` a trained model",
            artifact=f"{artifact.kind}/{artifact.key}",
        )
    artifacts = [artifact]
    key = artifact.identity.inputs.get("rollouts")
    if rollouts and key is not None:
        try:
            artifacts.append(listing.open_in(store, "rollouts", key))  # type: ignore[arg-type]
        except MissingArtifact as error:
            raise RunError(
                f"the rollouts of {artifact.kind}/{artifact.key} are not in {store}",
                artifact=f"rollouts/{key}",
                remedy="--no-rollouts pushes without them",
            ) from error
    for one in artifacts:
        whole = len(one.committed())
        if whole < one.parts:
            raise RunError(
                f"{one.kind}/{one.key} has {whole} of its {one.parts} parts",
                artifact=f"{one.kind}/{one.key}",
                remedy="`eopd run CONFIG` makes the others",
            )
    if not any(True for _ in filled_parts(artifact)):
        raise RunError(
            f"every part of {artifact.kind}/{artifact.key} was set aside: there is nothing to push",
            artifact=f"{artifact.kind}/{artifact.key}",
        )
    return artifacts


def check_licence(name: str) -> str:
    """Return ``name`` if it can be a licence in a card. Raises RunError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or name == "other":
        raise RunError(
            f"--license {name!r} is no licence's name on the Hub, such as apache-2.0 or cc-by-4.0",
            setting="--license",
            remedy="For one that has no name there, write the folder with --to, describe the licence in README.md, "
            "and use `hf upload`",
        )
    return name


def write_dataset(
    store: Path,
    artifacts: Sequence[Artifact],
    folder: Path,
    repo: str,
    licence: str,
    place: Callable[[Path, Path], object] = shutil.copyfile,
) -> None:
    """Write a store of ``artifacts`` with its card to ``folder``, after every byte was checked.

    The files keep their names, so that pushing once more sends only what changed.

    Args:
        place: how a file comes to its place (source, target): a copy, or a link for an upload.

    Raises:
        RunError: there is something at ``folder``. DamagedPart; StoreFull, StoreUnwritable.
    """
    refuse_content(folder)
    for artifact in artifacts:
        for part in sorted(artifact.committed()):
            artifact.verify_part(part)
    card = dataset_card(store, artifacts, repo, licence)
    with naming_full_disks(folder):
        for artifact in artifacts:
            target = folder / artifact.kind / artifact.key
            target.mkdir(parents=True)
            (target / paths.IDENTITY).write_text(file_text(artifact.identity.to_json()), encoding="utf-8")
            (target / paths.MANIFEST).write_text(file_text(artifact.manifest_content()), encoding="utf-8")
            for part in sorted(artifact.committed()):
                marker = artifact.marker(part)
                data = paths.data_name(part, marker.nonce)
                names = [marker.file_name, *(f"{data}/{name}" for name in marker.files)]
                if marker.set_aside is not None:
                    (target / paths.set_aside_name(part)).touch()
                for name in names:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    place((artifact.folder / name).resolve(), target / name)
        (folder / CARD).write_text(card, encoding="utf-8")


def refuse_other_content(repo: str, artifacts: Sequence[Artifact]) -> None:
    """Raise RunError if the dataset holds other artifacts, which the new card would not describe."""
    try:
        there = set(listing.keys(HubDataset(repo)))
    except MissingArtifact:
        return
    others = sorted(there - {(artifact.kind, artifact.key) for artifact in artifacts})
    if others:
        raise RunError(
            f"{repo} holds {'/'.join(others[0])}, which the new card would not describe",
            artifact="/".join(others[0]),
            remedy="name another dataset",
        )


def write_student(run: Run, student: Student, folder: Path, repo: str, licence: str) -> None:
    """Copy a student to ``folder`` with its card.

    Raises:
        RunError: there is something at ``folder``. StoreFull, StoreUnwritable.
    """
    refuse_content(folder)
    card = student_card(run, student, repo, licence)
    copy_student(student, folder)
    (folder / CARD).write_text(card, encoding="utf-8")
