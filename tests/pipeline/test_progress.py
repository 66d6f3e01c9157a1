"""Events of a worker in another process, as who started it shows them."""

from __future__ import annotations

from pathlib import Path

from eopd.pipeline.progress import EventProgress, Replay
from eopd.stages.job import NullProgress


class Heard(NullProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_an_event_that_was_cut_short_stops_nothing(tmp_path: Path) -> None:
    """A disk that ran full took half of an event; what comes after it is heard."""
    events, heard = tmp_path / "events.jsonl", Heard()
    worker, replay = EventProgress(events), Replay(events, heard)
    worker.line("first")
    replay.catch_up()
    with events.open("ab") as file:
        file.write(b'{"advance": 12, "figu')
    worker.line("second")
    worker.end("full", "no space left")
    replay.close()
    assert heard.lines == ["first", "second"]
    assert replay.end == ("full", "no space left")
