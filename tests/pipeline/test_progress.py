"""Bars and estimates, and events of a worker in another process as the process that started it shows them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from eopd.pipeline import progress
from eopd.pipeline.errors import Outcome
from eopd.pipeline.progress import EventProgress, LineProgress, Replay, seconds_in_hand
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
    worker.end(Outcome("full", "no space left"))
    replay.close()
    assert heard.lines == ["first", "second"]
    assert replay.outcome == Outcome("full", "no space left")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_what_is_left_of_an_estimated_total(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = LineProgress()
    shown.start("rollout", 0)
    clock[0] += 20
    shown.advance(2_000, responses=1_003)
    assert capsys.readouterr().err == "  rollout: 2,000 tokens, 100 tokens/s, responses 1,003\n"
    shown.expect(5_000, 1_000)
    clock[0] += 20
    shown.advance(2_000)
    assert "4,000 of about 5,000 tokens, 100 tokens/s, about 10 s left" in capsys.readouterr().err
    monkeypatch.setattr(progress, "stop_wished", lambda: True)
    shown.expect(8_000, 1_500)
    clock[0] += 20
    shown.advance(500)
    assert "25 tokens/s, stopping in about 40 s" in capsys.readouterr().err  # at the rate of the last 30 seconds


def test_the_wait_for_what_is_in_hand_is_known_through_a_workers_events(tmp_path: Path, clock: list[float]) -> None:
    shown = LineProgress()
    worker, replay = EventProgress(tmp_path / "events.jsonl"), Replay(tmp_path / "events.jsonl", shown)
    worker.start("rollout", 10_000)
    replay.catch_up()
    assert seconds_in_hand() is None
    worker.expect(6_000, 800)
    clock[0] += 10
    worker.advance(400)
    replay.catch_up()
    assert seconds_in_hand() == pytest.approx(20.0)  # 800 at 40 tokens a second
    worker.close()
    replay.close()
    assert seconds_in_hand() is None


def test_a_slow_start_is_forgotten(clock: list[float]) -> None:
    """A model that compiles for a minute before it decodes does not decide what is left."""
    bar = progress._Bar()
    bar.start(10_000)
    clock[0] += 60
    bar.advance(10)
    for _ in range(40):
        clock[0] += 1
        bar.advance(100)
    assert bar.rate == pytest.approx(100, rel=0.05)
    assert bar.seconds_left() == pytest.approx((10_000 - 4_010) / 100, rel=0.05)
