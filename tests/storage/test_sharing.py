"""One cache, many processes: some die, some race, some find the disk full. Nothing that is committed is lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from eopd.storage import paths
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import StoreFull, StoreUnwritable
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule
from eopd.storage.verification import verify
from tests.raises import raises

from .making import dense, header, rows_of, scores

WORKER = """
import sys, time
from pathlib import Path
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.claims import claimed_parts
from eopd.storage.teacher_cache import write_part
from eopd.storage.teacher_record import HeadRule
from tests.storage.making import dense, header, rows_of

artifact = Artifact(Path(sys.argv[1]), Identity("scores", 1, 24, {"test": 8}))
print("ready", flush=True)
for part in claimed_parts(artifact, range(24)):
    with artifact.write_part(part) as folder:
        print(part, flush=True)
        time.sleep(0.1)  # so that a kill finds something half done
        write_part(folder, rows_of(dense(part, [30, 9], 60), HeadRule()), header(HeadRule(), 60))
"""


def test_eight_processes_fill_one_cache_while_three_are_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    workers = [
        subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    try:
        killed = []
        for worker in workers[:3]:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            started = worker.stdout.readline()  # it is inside write_part now, or everything was done already
            killed.append(started)
            worker.send_signal(signal.SIGKILL)
        assert any(line.strip().isdigit() for line in killed), "nothing was killed in the middle of a part"
        for worker in workers[3:]:
            worker.communicate(timeout=120)
            assert worker.returncode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    artifact = Artifact(tmp_path, Identity("scores", 1, 24, {"test": 8}))
    assert artifact.is_complete()
    assert verify(tmp_path) == []
    cache = TeacherCache(artifact)
    for part in range(24):
        np.testing.assert_array_equal(cache.read_part(part).token_ids, dense(part, [30, 9], 60).tokens)


def test_two_workers_whose_bytes_differ(tmp_path: Path) -> None:
    """A part scored twice on different machines: the first commit stands, the second is dropped without harm."""
    artifact = Artifact(tmp_path, Identity("scores", 1, 1))
    first, second = (rows_of(dense(seed, [20], 60), HeadRule()) for seed in (1, 2))
    with artifact.write_part(0) as slow:
        write_part(slow, second, header(HeadRule(), 60))
        with Artifact(tmp_path, artifact.identity).write_part(0) as fast:
            write_part(fast, first, header(HeadRule(), 60))
    np.testing.assert_array_equal(TeacherCache(artifact).read_part(0).token_ids, first.token_ids)
    assert len([name for name in os.listdir(artifact.folder) if paths.data_part(name)]) == 1
    assert verify(tmp_path) == []


def test_readers_in_several_processes(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path, parts=3)
    pids = []
    for seed in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                rng = np.random.default_rng(seed)
                cache = TeacherCache(artifact)
                for _ in range(20):
                    part, row = int(rng.integers(3)), int(rng.integers(4))
                    low, high = written[part].response_offsets[row : row + 2]
                    records = cache.read([(part, row)])
                    assert np.array_equal(records.token_ids, written[part].token_ids[low:high])
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]


def fill(artifact: Artifact) -> None:
    rows = rows_of(dense(0, [800], 500), HeadRule())
    with artifact.write_part(1) as folder:
        write_part(folder, rows, header(HeadRule(), 500))


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    """On a file system of 128 kB where we may mount one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; the file size limit is tested below")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        artifact = Artifact(small, Identity("scores", 1, 2))
        with artifact.write_part(0) as folder:
            write_part(folder, rows_of(dense(0, [5], 50), HeadRule()), header(HeadRule(), 50))
        (small / "ballast").write_bytes(bytes(60_000))
        with raises(StoreFull, "no space left"):
            fill(artifact)
        assert artifact.committed() == {0}
        assert TeacherCache(artifact).read_part(0).tokens == 5
        assert verify(small) == []
        (small / "ballast").unlink()
        fill(artifact)
        assert artifact.is_complete()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_file_size_limit_is_named_and_loses_nothing(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Identity("scores", 1, 2))
    with artifact.write_part(0) as folder:
        write_part(folder, rows_of(dense(0, [5], 50), HeadRule()), header(HeadRule(), 50))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
            fill(artifact)
        except StoreFull:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert artifact.committed() == {0}
    assert not [name for name in os.listdir(artifact.folder) if name.startswith("part-00001.")]


def test_a_store_without_permission_is_named() -> None:
    """As another user where we are root, who may write anywhere."""
    with tempfile.TemporaryDirectory() as store:
        os.chmod(store, 0o555)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                fill(Artifact(Path(store), Identity("scores", 1, 2)))
            except StoreUnwritable as error:
                code = 0 if "Check its owner and permissions" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert os.listdir(store) == []
        os.chmod(store, 0o755)


def test_opening_a_cache_of_many_parts_reads_nothing(tmp_path: Path) -> None:
    """Opening costs one listing, whatever the number of parts; a part is opened when it is read."""
    artifact = Artifact(tmp_path, Identity("scores", 1, 2_000))
    with artifact.write_part(0) as folder:
        write_part(folder, rows_of(dense(0, [5], 50), HeadRule()), header(HeadRule(), 50))
    for part in range(1, 2_000):
        (artifact.folder / paths.marker_name(part)).touch()
    cache = TeacherCache(Artifact(tmp_path, artifact.identity))
    assert cache.artifact.missing() == []
    assert cache.coverage.head == HeadRule()  # of the first marker: the others are empty, and reading one would fail
    assert cache.read([(0, 0)]).tokens == 5
    assert len(cache._parts) == 1
