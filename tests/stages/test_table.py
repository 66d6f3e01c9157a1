"""Stages that other packages bring and that are refused when the table is made."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from eopd.stages import table
from eopd.stages.judge.stage import JudgeStage
from eopd.storage.errors import InputError
from tests.raises import raises


class Misnamed(JudgeStage):
    name = "Two Words"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("nowhere:Stage", "cannot be loaded .*nowhere"),
        ("pathlib:Path", "no subclass"),
        (f"{__name__}:Misnamed", "name 'Two Words'.* lower-case"),
        (f"{__name__}:JudgeStage", "name 'judge', which another stage has"),
    ],
)
def test_a_stage_of_another_package_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, problem: str
) -> None:
    entry = EntryPoint("theirs", value, table.GROUP)
    monkeypatch.setattr(table, "entry_points", lambda group: [entry])
    monkeypatch.setattr(table, "STAGES", list(table.STAGES))
    with raises(InputError, f"the stage theirs = {value}.*{problem}", remedy="uninstall an unknown package"):
        table._add_installed()
