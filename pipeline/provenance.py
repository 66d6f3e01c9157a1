"""What is known of where the student comes from, beside what an objective assumes of it."""

from __future__ import annotations

from pathlib import Path

from eopd.pipeline.config import RunSettings

ASSUME_ONE_TEACHER = ("lightning_opd",)


def other_teacher(settings: RunSettings) -> str | None:
    """A warning where the objective takes one teacher for granted and ``student.sft_teacher`` names another."""
    named, teacher = settings.student.sft_teacher, settings.teacher.path
    if settings.train.objective.name not in ASSUME_ONE_TEACHER or named is None or _same(named, teacher):
        return None
    return (
        f"warning: {settings.train.objective.name} assumes that the student's supervised data came from its teacher, "
        f"{teacher}; student.sft_teacher names {named}. The advantages then hold what the two disagree on, too."
    )


def _same(one: str, other: str) -> bool:
    """Equal names, or names of one folder."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
