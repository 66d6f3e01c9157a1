"""What an objective assumes of the student's past, and what the config says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eopd.pipeline.provenance import other_teacher
from tests.pipeline.plan_case import make_settings

LIGHTNING = {"objective": {"name": "lightning_opd"}}


@pytest.mark.parametrize("named", [None, "t", "./x/../t"])
def test_nothing_is_said_of_the_same_teacher_or_of_none(named: str | None) -> None:
    assert other_teacher(make_settings(train=LIGHTNING, student={"path": "s", "sft_teacher": named})) is None


def test_another_teacher_is_named(tmp_path: Path) -> None:
    student = {"path": "s", "sft_teacher": str(tmp_path)}
    warning = other_teacher(make_settings(train=LIGHTNING, student=student))
    assert warning is not None
    assert "lightning_opd" in warning
    assert f"student.sft_teacher names {tmp_path}" in warning
    assert other_teacher(make_settings(student=student)) is None  # eopd assumes nothing
