"""Digests of external files: remembered, believed only of the very same file, and never in the way."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from eopd.storage.files import sha256_text
from eopd.storage.identity import Digests


def test_digests_are_remembered(tmp_path: Path) -> None:
    file, memory = tmp_path / "file", tmp_path / "memory.json"
    file.write_text("one")
    digests = Digests(memory)
    assert digests.of_file(file) == sha256_text("one")
    digests.save()
    memory.write_text(memory.read_text().replace(sha256_text("one"), "remembered"))
    assert Digests(memory).of_file(file) == "remembered"


def test_another_file_of_the_same_size_and_time_is_hashed(tmp_path: Path) -> None:
    """`cp -p` or rsync of other weights in place of the old ones."""
    file = tmp_path / "file"
    for change in ("replaced", "written over"):
        file.write_text("one")
        state = file.stat()
        digests = Digests(memory := tmp_path / f"before it is {change}.json")
        digests.of_file(file)
        digests.save()
        if change == "replaced":
            (tmp_path / "new").write_text("two")
            os.replace(tmp_path / "new", file)
        else:
            file.write_text("two")
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert Digests(memory).of_file(file) == sha256_text("two")


@pytest.mark.parametrize("text", ["[1, 2]", "null", '{"', '{"{file}": 7}', '{"{file}": []}'])
def test_a_memory_of_another_shape_is_empty(tmp_path: Path, text: str) -> None:
    file, memory = tmp_path / "file", tmp_path / "memory.json"
    file.write_text("one")
    memory.write_text(text.replace("{file}", str(file)))
    assert Digests(memory).of_file(file) == sha256_text("one")


def test_looking_leaves_no_folder_behind(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    digests = Digests(tmp_path / "store" / "memory.json")
    digests.of_file(file)
    digests.save()
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    digests.save()
    assert (tmp_path / "store" / "memory.json").is_file()


def test_a_store_that_is_only_read_is_planned_over(tmp_path: Path) -> None:
    store, file = tmp_path / "store", tmp_path / "file"
    store.mkdir()
    file.write_text("one")
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(store)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a read-only file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        digests = Digests(store / "memory.json")
        digests.of_file(file)
        digests.save()
    finally:
        subprocess.run(["umount", str(store)], check=True)
