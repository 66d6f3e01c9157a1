"""A disk that fills up in mid-run: a message, nothing committed is lost, and on it goes once there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import World, checksums, commit_times, eopd


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 400 kB: room for rollouts and scores, not for a checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_and_loses_nothing(world: World, undisturbed: str, small_disk: Path) -> None:
    config = world.config("full", store=str(small_disk))
    result = eopd("run", config, check=False)
    assert result.returncode == 1
    assert "no space left" in result.stderr
    assert "run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    kept = commit_times(small_disk)
    assert kept

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    eopd("run", config)
    after = commit_times(small_disk)
    assert {name: after[name] for name in kept if "progress" not in name} == {
        name: time for name, time in kept.items() if "progress" not in name
    }
    assert checksums(small_disk) == checksums(world.store(undisturbed))
