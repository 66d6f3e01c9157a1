"""Temporary files of processes that were killed: found and removed by the next run, and nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from eopd.pipeline.processes import LOCK, TORCH_CACHE, sweep, temporary_folder

HOLD = """
import sys, tempfile
from eopd.pipeline.processes import temporary_folder
with temporary_folder() as folder:
    tempfile.mkstemp(prefix="vllm_dist_")
    print(folder, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv(TORCH_CACHE, raising=False)
    return tmp_path


@contextmanager
def holder() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that works in a temporary folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_s_folder_goes_with_the_next_run_and_a_living_one_s_stays(base: Path) -> None:
    with holder() as (killed, left), holder() as (_, used):
        killed.kill()
        killed.wait()
        assert list(left.glob("vllm_dist_*"))
        with temporary_folder() as own:
            assert not left.exists()
            assert used.exists()
            assert Path(tempfile.gettempdir()) == own
            assert os.environ["TMPDIR"] == str(own)
            assert os.environ[TORCH_CACHE].startswith(f"{base}/torchinductor_")
            tempfile.mkdtemp()
        assert not own.exists()
    assert Path(tempfile.gettempdir()) == base
    assert TORCH_CACHE not in os.environ


def test_a_child_shares_its_parent_s_folder(base: Path) -> None:
    with temporary_folder() as own:
        with holder() as (child, shared):
            assert shared == own
            sweep(base)
            assert own.exists()
            child.communicate("\n")
            assert child.returncode == 0
        with temporary_folder() as same:
            assert same == own
        assert own.exists(), "whoever made it removes it"
    assert not own.exists()


def test_a_child_that_outlives_its_parent_keeps_the_folder(base: Path) -> None:
    with ExitStack() as outliving:
        with temporary_folder() as own:
            outliving.enter_context(holder())
        sweep(base)
        assert own.exists()
    sweep(base)
    assert not own.exists()


def test_what_is_not_known_to_be_ours_is_left_alone(base: Path) -> None:
    unlocked, elsewhere = base / "eopd-unlocked", base / "elsewhere"
    for folder in (unlocked, elsewhere):
        folder.mkdir()
    (elsewhere / LOCK).touch()
    (base / "eopd-link").symlink_to(elsewhere)
    (base / "eopd-linked-lock").mkdir()
    (base / "eopd-linked-lock" / LOCK).symlink_to(elsewhere / LOCK)
    (base / "eopd-file").touch()
    before = sorted(base.rglob("*"))
    sweep(base)
    assert sorted(base.rglob("*")) == before
