"""Lines that are appended, when a write was cut short."""

from __future__ import annotations

from pathlib import Path

from eopd.storage.jsonl import append_line, read_lines


def test_a_line_cut_short_is_passed_over_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    assert list(read_lines(path)) == []
    append_line(path, {"key": "first"})
    with path.open("ab") as file:
        file.write('{"key": "Gauß'.encode()[:-1])  # a disk ran full within a letter
    assert list(read_lines(path)) == [{"key": "first"}]
    append_line(path, {"key": "second"})
    append_line(path, {"key": "third"})
    assert [row["key"] for row in read_lines(path)] == ["first", "second", "third"]
    assert path.read_bytes().count(b"\n") == 4
