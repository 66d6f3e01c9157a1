"""The number of threads for decoding on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eopd.stages.models import threads
from eopd.stages.models.threads import WEIGHT_BYTES_PER_THREAD, DecodingThreads, torch_threads

LARGE = 100 * WEIGHT_BYTES_PER_THREAD


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, "WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(threads, "_cpu_quota", lambda: 2**16)
    with torch_threads(4):
        yield


def others_use(monkeypatch: pytest.MonkeyPatch, cores: float) -> None:
    monkeypatch.setattr(threads._Usage, "of_others_since", lambda *_: cores)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


@pytest.mark.parametrize(
    ("busy", "count"), [(0.0, 4), (0.2, 4), (0.3, 3), (1.0, 3), (1.9, 2), (3.0, 1), (3.9, 1), (4.0, 1)]
)
def test_a_thread_for_every_free_core(monkeypatch: pytest.MonkeyPatch, busy: float, count: int) -> None:
    others_use(monkeypatch, busy)
    assert DecodingThreads(None, LARGE).count() == count


def test_the_load_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = DecodingThreads(None, LARGE)
    others_use(monkeypatch, 3.0)
    assert chosen.count() == 1
    others_use(monkeypatch, 0.0)
    assert chosen.count() == 4


@pytest.mark.parametrize(("weight_bytes", "count"), [(0, 1), (2.9, 2), (3, 3), (50, 4)])
def test_a_small_model_takes_fewer(monkeypatch: pytest.MonkeyPatch, weight_bytes: float, count: int) -> None:
    others_use(monkeypatch, 0.0)
    assert DecodingThreads(None, int(weight_bytes * WEIGHT_BYTES_PER_THREAD)).count() == count


def test_a_number_of_the_user_s_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    others_use(monkeypatch, 4.0)
    assert DecodingThreads(7, 0).count() == 7


def test_never_more_than_torch_or_the_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    others_use(monkeypatch, 0.0)
    with torch_threads(2):
        assert DecodingThreads(None, LARGE).count() == 2
    monkeypatch.setattr(threads, "_cpu_quota", lambda: 3)
    assert DecodingThreads(None, LARGE).count() == 3
    assert torch.get_num_threads() == 4


def test_busy_seconds_are_those_of_the_cores_in_question(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 999 50 1 2 3 0 0\ncpu1 7 0 0 1 0 0 0 0 0 0\nintr 1 2\n")
    ticks = threads.os.sysconf("SC_CLK_TCK")
    assert threads._busy_seconds([0], stat) == pytest.approx(156 / ticks)
    assert threads._busy_seconds([0, 1], stat) == pytest.approx(163 / ticks)
    assert threads._busy_seconds([0], tmp_path / "none") == 0.0


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 2**16), ("250000 100000", 2), ("50000 100000", 1)])
def test_the_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    monkeypatch.undo()  # the real function
    limit = tmp_path / "cpu.max"
    limit.write_text(text + "\n")
    assert threads._cpu_quota(limit) == cores
    assert threads._cpu_quota(tmp_path / "none") == 2**16
