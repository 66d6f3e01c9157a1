"""The number of threads for decoding on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eopd.stages.models import threads
from eopd.stages.models.threads import WEIGHT_BYTES_PER_THREAD, decoding_threads, torch_threads

LARGE = 100 * WEIGHT_BYTES_PER_THREAD


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, "_cpu_quota", lambda: 2**16)
    with torch_threads(4):
        yield


@pytest.mark.parametrize(("weight_bytes", "count"), [(0, 1), (2.9, 2), (3, 3), (50, 4)])
def test_a_small_model_takes_fewer(weight_bytes: float, count: int) -> None:
    assert decoding_threads(None, int(weight_bytes * WEIGHT_BYTES_PER_THREAD)) == count


def test_a_number_of_the_user_s_holds() -> None:
    assert decoding_threads(7, 0) == 7


def test_never_more_than_torch_or_the_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch_threads(2):
        assert decoding_threads(None, LARGE) == 2
    monkeypatch.setattr(threads, "_cpu_quota", lambda: 3)
    assert decoding_threads(None, LARGE) == 3
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 2**16), ("250000 100000", 2), ("50000 100000", 1)])
def test_the_quota_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    monkeypatch.undo()  # the real function
    limit = tmp_path / "cpu.max"
    limit.write_text(text + "\n")
    assert threads._cpu_quota(limit) == cores
    assert threads._cpu_quota(tmp_path / "none") == 2**16
