"""Synchronous writer of sharded Zarr v3 arrays, the counterpart of ``storage.zarr_inline``.

Zarr starts a task for every step of every chunk and hops to a thread for every compression. Beside a teacher's forward
pass that costs more than compressing. A part is written whole and once, so its files are put together here: metadata
as the Zarr v3 specification has them, and shards of chunks that go through Zarr's own codecs one after the other.
Like the reader, this calls their synchronous methods, which Zarr does not promise to keep; a test compares every byte
with what Zarr writes.

Letters: P planes, N columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.codec import Codec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.buffer import default_buffer_prototype
from zarr.dtype import parse_dtype

METADATA = "zarr.json"
_EMPTY = np.iinfo(np.uint64).max


def write_attributes(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Make an existing folder a group without arrays."""
    _write_metadata(folder, {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def write_array(
    folder: Path,
    values: NDArray[Any],
    *,
    chunk: int,
    chunks_per_shard: int,
    compressor: BloscCodec,
    dimensions: tuple[str, str],
) -> None:
    """Write ``values`` [P, N] as an array into a new folder.

    Args:
        chunk: columns of a chunk, which has all planes.
        dimensions: names of the two.
    """
    planes, length = values.shape
    bytes_codec = BytesCodec(endian=None if values.itemsize == 1 else "little")
    sharding = ShardingCodec(chunk_shape=(max(planes, 1), chunk), codecs=(bytes_codec, compressor, Crc32cCodec()))
    width = chunk * chunks_per_shard
    folder.mkdir()
    _write_metadata(folder, _array_metadata(values, (max(planes, 1), width), sharding, dimensions))
    if values.size:
        shards = folder / "c" / "0"
        shards.mkdir(parents=True)
        for number, start in enumerate(range(0, length, width)):
            shard = _shard(values[:, start : start + width], chunks_per_shard, sharding)
            (shards / str(number)).write_bytes(shard)


def _write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    (folder / METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")


def _array_metadata(
    values: NDArray[Any], shard_shape: tuple[int, int], sharding: ShardingCodec, dimensions: tuple[str, str]
) -> dict[str, Any]:
    return {
        "shape": values.shape,
        "data_type": values.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [sharding.to_dict()],
        "attributes": {},
        "dimension_names": dimensions,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _shard(values: NDArray[Any], chunks: int, sharding: ShardingCodec) -> bytes:
    """Build a shard: the chunks that ``values`` [P, N] fill, the last one padded with zeros, then their index."""
    width = sharding.chunk_shape[1]
    index = np.full((1, chunks, 2), _EMPTY, np.uint64)
    pieces, end = [], 0
    for number, start in enumerate(range(0, values.shape[1], width)):
        here = values[:, start : start + width]
        chunk = np.zeros(sharding.chunk_shape, values.dtype)
        chunk[:, : here.shape[1]] = here
        pieces.append(_encoded(sharding.codecs, chunk))
        index[0, number] = end, len(pieces[-1])
        end += len(pieces[-1])
    return b"".join([*pieces, _encoded(sharding.index_codecs, index)])


def _encoded(codecs: tuple[Codec, ...], chunk: NDArray[Any]) -> bytes:
    """Encode one chunk with its codecs, without a task for each."""
    spec = _spec(chunk.shape, chunk.dtype)
    array_bytes, *bytes_bytes = codecs
    array = spec.prototype.nd_buffer.from_numpy_array(chunk)
    encoded = array_bytes._encode_sync(array, spec)  # type: ignore[attr-defined]
    for codec in bytes_bytes:
        encoded = codec._encode_sync(encoded, spec)  # type: ignore[attr-defined]
    return encoded.to_bytes()


@lru_cache(maxsize=16)
def _spec(shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArraySpec:
    """Return the chunk specification for codecs, cached: Zarr's search for a data type takes as long as compressing a
    small chunk."""
    config = ArrayConfig(order="C", write_empty_chunks=True)
    return ArraySpec(shape, parse_dtype(dtype, zarr_format=3), 0, config, default_buffer_prototype())
