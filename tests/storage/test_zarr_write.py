"""What is written without Zarr's machinery is, byte for byte, what Zarr writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from eopd.storage.zarr_part import write_array, write_attributes

CHUNK, CHUNKS_PER_SHARD = 128, 3
NAMES = ("plane", "column")


def compressor(values: NDArray[np.unsignedinteger]) -> BloscCodec:
    shuffle = "noshuffle" if values.itemsize == 1 else "bitshuffle"
    return BloscCodec(cname="zstd", clevel=4, shuffle=shuffle, typesize=values.itemsize, blocksize=CHUNK)


def with_zarr(folder: Path, values: NDArray[np.unsignedinteger], attributes: dict[str, object]) -> None:
    group = zarr.create_group(store=folder, attributes=attributes, zarr_format=3)
    planes = max(len(values), 1)
    array = group.create_array(
        "values",
        shape=values.shape,
        chunks=(planes, CHUNK),
        shards=(planes, CHUNK * CHUNKS_PER_SHARD),
        dtype=values.dtype,
        compressors=[compressor(values), Crc32cCodec()],
        filters=None,
        config={"write_empty_chunks": True},
        dimension_names=NAMES,
    )
    array[:] = values


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
@pytest.mark.parametrize("columns", [0, 1, 128, 129, 384, 385, 1000])
@pytest.mark.parametrize("planes", [0, 1, 4])
def test_the_bytes_are_zarrs(tmp_path: Path, planes: int, columns: int, dtype: type[np.unsignedinteger]) -> None:
    values = np.random.default_rng(columns).integers(0, 9, (planes, columns)).astype(dtype)
    values[:, 128:256] = 0  # a chunk that Zarr could leave out
    attributes: dict[str, object] = {"name": "ü", "temperature": 1.0, "nothing": None, "columns": [["head_size", 4]]}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    write_attributes(ours, attributes)
    write_array(
        ours / "values",
        values,
        chunk=CHUNK,
        chunks_per_shard=CHUNKS_PER_SHARD,
        compressor=compressor(values),
        dimensions=NAMES,
    )
    with_zarr(theirs, values, attributes)
    assert files(ours) == files(theirs)
    array = zarr.open_array(ours / "values", mode="r")
    np.testing.assert_array_equal(array[:], values)
