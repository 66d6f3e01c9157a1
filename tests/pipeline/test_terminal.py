"""Text of others on a terminal, and paths that cannot be what they are named for."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.table import Table

from eopd.pipeline.config import ConfigError, parse_settings
from eopd.pipeline.status import PlainConsole
from eopd.pipeline.store_check import check_folders, check_runs_folder, check_store, why_no_folder
from eopd.stages.format import escaped, excerpt, one_line
from tests.raises import raises
from tests.strangers import unprivileged

HOSTILE = "a\x1b[2J\x1b]0;t\x07b\r\x9b1m\u202ec"


def test_what_steers_a_terminal_is_shown() -> None:
    assert escaped("plain é 中 \U0001f600\n\tx") == "plain é 中 \U0001f600\n\tx"
    assert escaped(HOSTILE) == "a\\x1b[2J\\x1b]0;t\\x07b\\r\\x9b1m\\u202ec"
    assert escaped("\x1b[31mred\x1b[0m\x1b[2J", colours=True) == "\x1b[31mred\x1b[0m\\x1b[2J"
    assert one_line("a\nb\tc") == "a\\nb\\tc"
    assert escaped("\ud800") == "\\ud800"


def test_an_excerpt_has_both_ends() -> None:
    text = excerpt("begin" + "x" * 5000 + "end", 100)
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "4,908 characters" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_of_hostile_names_moves_nothing(terminal: bool) -> None:
    output = io.StringIO()
    console = PlainConsole(file=output, width=120, force_terminal=terminal, color_system="standard")
    table = Table.grid()
    table.add_row("name", HOSTILE, style="red")
    console.print(table)
    assert "\\x1b[2J" in output.getvalue()
    assert not any(code in output.getvalue() for code in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e"))


@pytest.mark.parametrize("setting", ["store", "runs"])
@pytest.mark.parametrize("kind", ["device", "file", "below", "loop", "long"])
def test_a_path_that_cannot_be_a_folder_is_named(tmp_path: Path, setting: str, kind: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    place = {
        "device": Path("/dev/null"),
        "file": tmp_path / "file",
        "below": tmp_path / "file" / "store",
        "loop": tmp_path / "loop" / "store",
        "long": tmp_path / ("x" * 300),
    }[kind]
    raw = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"path": "p"}}
    with raises(ConfigError, setting=setting, file=place):
        check_folders(parse_settings({**raw, "store": str(tmp_path / "store"), setting: str(place)}, "test"))
    check_folders(parse_settings({**raw, "store": str(tmp_path / "store")}, "test"))
    if setting == "store":
        assert any(finding.state == "broken" for finding in check_store(place))


RAW = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"path": "p"}}


@pytest.mark.parametrize("setting", ["store", "runs"])
@pytest.mark.parametrize("granted", [True, False])
def test_a_place_where_no_folder_can_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, granted: bool
) -> None:
    """/proc grants root what it then refuses."""
    monkeypatch.setattr(os, "access", lambda *_, **__: granted)
    settings = parse_settings({**RAW, "store": str(tmp_path), setting: "/proc/1/x"}, "test")
    with raises(ConfigError, ": .*/proc/1", setting=setting, file="/proc/1/x"):
        check_folders(settings)
    findings = list(check_store(Path("/proc/1/x"))) if setting == "store" else check_runs_folder(Path("/proc/1/x"))
    assert [(finding.name, finding.state) for finding in findings] == [(setting, "broken")]
    assert findings[0].text.startswith("/proc/1/x cannot be a folder: ")


def test_a_folder_of_others_can_be_looked_at_and_none_is_made_in_it(open_folder: Path) -> None:
    (open_folder / "store").mkdir()
    open_folder.chmod(0o555)
    with unprivileged():
        assert why_no_folder(open_folder / "store") is None
        assert why_no_folder(open_folder / "new" / "store") == f"{open_folder} cannot be written: Permission denied"
    assert [path.name for path in open_folder.iterdir()] == ["store"]


def test_a_read_only_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = SimpleNamespace(f_flag=os.ST_RDONLY, f_blocks=1)
    monkeypatch.setattr(os, "statvfs", lambda _: system)
    assert why_no_folder(tmp_path / "store") == f"{tmp_path} cannot be written: Read-only file system"
    assert why_no_folder(tmp_path) is None


def test_a_file_system_without_a_size_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=0, f_blocks=0))
    assert why_no_folder(tmp_path / "store") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["store", "ls", "--store", "FILE"],
        ["store", "gc", "--store", "FILE/x"],
        ["plan", "quickstart", "--set", "store=FILE"],
        ["status", "FILE/x", "--once"],
        ["report", "nosuch"],
        ["logs", "x" * 400],
        ["run", "quickstart", "--set", "store=/proc/1/x"],
        ["plan", "quickstart", "--set", "runs=/proc/1/x"],
        ["report", "quickstart", "--out", "FILE"],
        ["plan", "\x1b[2J"],
    ],
    ids=" ".join,
)
def test_the_commands_end_in_one_line(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").write_text("x")
    arguments = [word.replace("FILE", str(tmp_path / "file")) for word in command]
    result = subprocess.run(
        [sys.executable, "-m", "eopd.pipeline.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode not in (0, 2)
    assert result.stderr.startswith("eopd: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.rstrip("\n").isprintable()
