"""A disk that fills up in mid-run: it pauses with a message, loses nothing, and goes on once there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eopd.pipeline.errors import EXIT_CODES
from tests.end_to_end.world import World, checksums, command, commit_times, environment, eopd


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 400 kB; the tests make it smaller or larger."""
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


@pytest.mark.slow
@pytest.mark.parametrize("size", ["60k", "400k"])  # full among rollouts and scores (pyarrow, Zarr); at a checkpoint
def test_a_full_disk_pauses_the_run_which_goes_on_by_itself(
    world: World, one_round: str, small_disk: Path, size: str
) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
    launcher = {"faults": {"full_poll_seconds": 0.1}}
    config = world.config(f"full-{size}", store=str(small_disk), rounds=1, evaluate=None, launcher=launcher)
    process = subprocess.Popen(command("run", config), env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = ""
    while "bytes free" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    assert "no space left" in told
    assert str(small_disk) in told
    kept = {name: at for name, at in commit_times(small_disk).items() if "progress" not in name}

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    told += process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    assert "going on" in told
    assert "Traceback" not in told
    assert commit_times(small_disk).items() >= kept.items()
    assert checksums(small_disk) == checksums(world.store(one_round))


@pytest.mark.slow
def test_a_disk_without_inodes_pauses_the_run_which_says_so_and_goes_on(
    world: World, one_round: str, small_disk: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=60", small_disk], check=True)
    launcher = {"faults": {"full_poll_seconds": 0.1}}
    config = world.config("no-inodes", store=str(small_disk), rounds=1, evaluate=None, launcher=launcher)
    process = subprocess.Popen(command("run", config), env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = ""
    while "inodes free" not in told:
        line = process.stderr.readline()
        assert line, told
        told += line
    assert "no inodes left while writing" in told
    subprocess.run(["mount", "-o", "remount,nr_inodes=10000", small_disk], check=True)
    told += process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    assert "going on" in told
    assert checksums(small_disk) == checksums(world.store(one_round))


def test_a_stage_by_hand_says_that_the_disk_is_full(world: World, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=20k", small_disk], check=True)
    config = world.config("full-by-hand", store=str(small_disk), rounds=1, evaluate=None)
    result = eopd("rollout", config, check=False)
    assert result.returncode == EXIT_CODES["full"], result.stderr
    assert "no space left" in result.stderr
    assert "run the same command again" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
