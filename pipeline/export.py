"""Trained students of a run as model folders: finding them in the store and copying them out."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from eopd.pipeline.errors import RunError
from eopd.pipeline.inputs import token_names
from eopd.pipeline.run import Run
from eopd.stages.models.model_config import GENERATION_FILE, stop_ids_in, write_stop_ids
from eopd.storage.errors import StoreError
from eopd.storage.files import naming_full_disks
from eopd.storage.identity import code_files, model_files, tokenizer_files
from eopd.storage.paths import METRICS_FILE, TRAINING_FILE, WEIGHTS


@dataclass(frozen=True)
class Student:
    round: int  # 0: the first student, R: the one that training round R - 1 made
    last: int  # the run's last one
    folder: Path
    files: tuple[Path, ...]  # the model and its tokenizer
    stop_ids: tuple[int, ...] = ()  # where this run's responses end

    @property
    def has_own_ends(self) -> bool:
        """True if generation from ``folder`` ends at other ids than this run's sampling and evaluation."""
        return bool(self.stop_ids) and set(stop_ids_in(self.folder)) != set(self.stop_ids)

    def __str__(self) -> str:
        trained = f"trained in round {self.round - 1}" if self.round else "before any training"
        return f"student {self.round} of {self.last} ({trained})"


def newest(run: Run) -> int:
    """Return the last trained round. Raises RunError if no round is trained yet."""
    for round_ in range(run.settings.rounds, 0, -1):
        if _is_there(run, round_):
            return round_
    raise RunError(
        f"{run.settings.name} has no student of its own yet",
        remedy="`eopd run CONFIG` trains them; --round 0 is the first student, before any training",
    )


def find_student(run: Run, round_: int) -> Student:
    """Return the student at the start of round ``round_``; a student in a bucket is downloaded first.

    Raises:
        RunError: there is no such round, it is not trained yet, or its weights were pruned.
        StoreError: its files are damaged, or cannot be fetched.
    """
    last = run.settings.rounds
    if round_ > last:
        raise RunError(f"{run.settings.name} has the students 0 to {last}, and no student {round_}")
    facts, code = run.facts.student, []
    if run.experiment.student_model.trust_remote_code:
        code = [*code_files(facts.tokenizer_folder), *code_files(facts.folder)]
    if round_ == 0 and facts.other is None:
        contents = [*model_files(facts.folder), *tokenizer_files(facts.tokenizer_folder), *code]
        generation = facts.folder / GENERATION_FILE
        files = (*contents, *([generation] if generation.exists() else []))
        return Student(0, last, facts.folder, files, run.facts.ordered_stop_ids)
    checkpoint = run.plan.policy(round_)
    assert checkpoint is not None
    artifact = run.artifact(checkpoint)
    if round_ == 0 and not artifact.is_committed(WEIGHTS):
        assert facts.other is not None
        raise RunError(f"student 0 is student {facts.other.round} of the run {facts.other.run}, which is not there")
    if not artifact.is_committed(WEIGHTS):
        there = ", ".join(str(other) for other in range(1, last + 1) if _is_there(run, other)) or "none"
        if WEIGHTS in artifact.pruned():
            raise RunError(
                f"the weights of student {round_} were pruned (train.keep_checkpoints: "
                f"{run.settings.train.keep_checkpoints}); those that are there: {there}",
                setting="train.keep_checkpoints",
                remedy="A run over another store, with train.keep_checkpoints: null, keeps all",
            )
        raise RunError(
            f"student {round_} is not trained yet; those that are there: {there}",
            remedy=f"`eopd run CONFIG` trains them, `eopd train CONFIG --round {round_ - 1}` this one",
        )
    folder = artifact.part_folder(WEIGHTS)
    files = (*code, *_model_files(folder))  # the generation config that was saved wins
    return Student(round_, last, folder, files, run.facts.ordered_stop_ids)


def ends_of(run: Run, student: Student) -> str:
    """Describe where responses end in this run and in generation from the student's folder."""
    names = token_names(run.facts.student.tokenizer_folder)
    ends = ", ".join(f"{number} {names[number]}" if number in names else str(number) for number in student.stop_ids)
    if not student.has_own_ends:
        return f"responses end at {ends}"
    own = stop_ids_in(student.folder)
    return (
        f"this run's responses end at {ends}, but {GENERATION_FILE} of this folder names {own}: pass the ids as stop "
        "tokens, or use --to, whose copy names them all"
    )


def where_students_are(run: Run) -> str:
    """Describe where the run's last student lies, or why its folder cannot be named.

    None is fetched from a bucket for that.
    """
    last = run.settings.rounds
    artifact = run.artifact(run.plan.job("train", last - 1).output)
    if not artifact.folder.is_dir():
        return f"student {last} of {last} lies in a bucket ({artifact}); `eopd student RUN --to FOLDER` fetches it"
    try:
        student = find_student(run, last)
    except (RunError, StoreError) as error:  # nothing that the run was to do has failed
        return f"no folder of student {last} of {last}: {error}"
    return f"{student}: {student.folder}; `eopd student RUN --to FOLDER` copies it"


def copy_student(student: Student, target: Path) -> None:
    """Copy the model and its tokenizer to ``target``, atomically and with the run's stop ids.

    Raises:
        RunError: there is something at ``target``.
        StoreFull, StoreUnwritable: it cannot be written.
    """
    refuse_content(target)
    beside = target.resolve().with_name(f".{target.resolve().name}.{secrets.token_hex(8)}")
    try:
        with naming_full_disks(target):
            beside.mkdir(parents=True)
            for file in student.files:
                shutil.copyfile(file, beside / file.name)
            if student.has_own_ends:
                write_stop_ids(beside, student.stop_ids)
            os.replace(beside, target.resolve())
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_content(target: Path) -> None:
    """Raise RunError if there is something at ``target`` other than an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(
            f"--to {target}: there is something already",
            setting="--to",
            file=target,
            remedy="name a folder that is new or empty",
        )


def _is_there(run: Run, round_: int) -> bool:
    return run.artifact(run.plan.job("train", round_ - 1).output).is_committed(WEIGHTS)


def _model_files(folder: Path) -> list[Path]:
    """List the files of a checkpoint's weights part that belong to the model."""
    own = (METRICS_FILE, TRAINING_FILE)
    return [path for path in sorted(folder.iterdir()) if path.name not in own and not path.is_symlink()]
