"""Fast small reads for Zarr: a store and a codec pipeline, the two places where Zarr can be extended.

Zarr starts a task for every step of every chunk, hops to a thread for every read and every decompression, and reads
a shard's index for every access. For the chunks of this cache (30 kB) that is most of the time. ``FolderStore`` reads
where it is called, and ``InlinePipeline`` keeps the indices of shards, reads adjacent chunks at once and decodes
them in place. Both only ever read; what they return is what Zarr returns.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import Codec
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, ShardingCodec
from zarr.core.buffer import Buffer, BufferPrototype, NDBuffer, default_buffer_prototype
from zarr.core.codec_pipeline import BatchedCodecPipeline
from zarr.registry import register_pipeline
from zarr.storage import StorePath

from eopd.storage.untrusted import open_plain

_EMPTY = np.iinfo(np.uint64).max
_BLOSC_HEADER = 16
MOST_TIMES = 1 << 14
"""Decoded bytes of a chunk for each stored one. Chunks of this size that are all zero have under 1,000."""


class PartStore(Store):
    """Read-only base of the stores of a part's files. Nothing is listed: the part's marker names its files."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self) -> None:
        super().__init__(read_only=True)
        self._is_open = True

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError("read-only")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("read-only")

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError("a part is not listed")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("a part is not listed")

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("a part is not listed")


class FolderStore(PartStore):
    """A read-only folder without threads. A missing key is an error, since no part has missing chunks."""

    def __init__(self, folder: Path, files: Collection[str] | None = None) -> None:
        """``files``: the only ones that are read, by their paths in the folder (default: all)."""
        super().__init__()
        self.folder = str(folder)
        self.files = files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FolderStore) and other.folder == self.folder

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        handle = open_plain(self._path(key))
        try:
            if isinstance(byte_range, RangeByteRequest):
                data = os.pread(handle, byte_range.end - byte_range.start, byte_range.start)
            else:
                size = os.fstat(handle).st_size
                start = max(size - byte_range.suffix, 0) if isinstance(byte_range, SuffixByteRequest) else 0
                assert byte_range is None or isinstance(byte_range, SuffixByteRequest)
                data = os.pread(handle, size - start, start)
        finally:
            os.close(handle)
        return prototype.buffer.from_bytes(data)

    async def getsize(self, key: str) -> int:
        return os.stat(self._path(key)).st_size

    def _path(self, key: str) -> str:
        if self.files is not None and key not in self.files:
            raise FileNotFoundError(f"{self.folder}/{key} is not of the part")
        return f"{self.folder}/{key}"

    async def exists(self, key: str) -> bool:
        return os.path.exists(f"{self.folder}/{key}")


@dataclass(frozen=True)
class InlinePipeline(BatchedCodecPipeline):
    """Pipeline that reads ranges [all planes, start:stop] of sharded arrays directly and leaves the rest to Zarr."""

    indices: dict[str, NDArray[np.uint64]] = field(default_factory=dict, compare=False, repr=False)

    async def read(self, batch_info: Iterable[Any], out: NDBuffer, drop_axes: tuple[int, ...] = ()) -> None:
        items = list(batch_info)
        codec = self.array_bytes_codec
        if not isinstance(codec, ShardingCodec) or len(codec.chunk_shape) != 2 or drop_axes:
            await super().read(items, out, drop_axes)
            return
        whole = out.as_numpy_array()
        for getter, spec, selection, out_selection, _ in items:
            planes, columns = selection
            start, stop, step = columns.indices(spec.shape[1])
            assert step == 1
            assert planes.indices(spec.shape[0])[:2] == (0, codec.chunk_shape[0])
            await self._read_shard(codec, getter, spec, start, stop, whole[out_selection])

    async def _read_shard(
        self, codec: ShardingCodec, getter: StorePath, spec: Any, start: int, stop: int, out: NDArray[np.uint8]
    ) -> None:
        index = await self._index(codec, getter, spec)
        width = codec.chunk_shape[1]
        first, last = start // width, -(-stop // width)
        places, sizes = (index[first:last, i] for i in (0, 1))
        if (places == _EMPTY).any():
            raise ValueError(f"{getter.path} lacks chunks")
        low, high = int(places.min()), int((places + sizes).max())
        prototype = default_buffer_prototype()
        stored = await getter.get(prototype, RangeByteRequest(low, high))
        if stored is None or len(stored) != high - low:
            raise ValueError(f"{getter.path} is shorter than its index says")
        chunk_spec, chunk_bytes = codec._get_chunk_spec(spec), math.prod(codec.chunk_shape) * out.itemsize
        for i, chunk in enumerate(range(first, last)):
            place = int(places[i]) - low
            planes = _decoded(codec.codecs, stored[place : place + int(sizes[i])], chunk_spec, chunk_bytes)
            here = slice(max(start, chunk * width), min(stop, (chunk + 1) * width))
            out[:, here.start - start : here.stop - start] = planes[
                :, here.start - chunk * width : here.stop - chunk * width
            ]

    async def _index(self, codec: ShardingCodec, getter: StorePath, spec: Any) -> NDArray[np.uint64]:
        index = self.indices.get(getter.path)
        if index is None:
            per_shard = codec._get_chunks_per_shard(spec)
            suffix = SuffixByteRequest(codec._shard_index_size(per_shard))
            chunks_end = await getter.store.getsize(getter.path) - suffix.suffix
            stored = await getter.get(default_buffer_prototype(), suffix)
            if stored is None:
                raise FileNotFoundError(getter.path)
            index = _decoded(codec.index_codecs, stored, codec._get_index_chunk_spec(per_shard))[0]
            _check_index(index[index[:, 0] != _EMPTY], chunks_end, getter.path)
            self.indices[getter.path] = index
        return index


def _check_index(index: NDArray[np.uint64], end: int, where: str) -> None:
    """Raise ValueError unless positions and sizes [N, 2] of a shard's chunks lie before ``end``."""
    places, sizes = index.T
    if not len(index):
        return
    # each of them first: sums of larger numbers wrap around
    if max(end, 0) < max(places.max(), sizes.max()) or max((places + sizes).max(), sizes.sum()) > end:
        raise ValueError(f"the index of {where} names chunks beyond the {end} bytes that are there")


def _check_compressed(stored: Buffer, size: int) -> None:
    """Raise ValueError unless a Blosc buffer decodes to ``size`` bytes: Blosc allocates what its header states."""
    header = stored[:_BLOSC_HEADER].to_bytes()
    decoded, compressed = (int.from_bytes(header[at : at + 4], "little") for at in (4, 12))
    if (decoded, compressed) != (size, len(stored)) or size > MOST_TIMES * compressed:
        raise ValueError(f"a chunk of {len(stored)} bytes claims to be {compressed}, and {decoded} decoded, not {size}")


def _decoded(codecs: tuple[Codec, ...], stored: Buffer, spec: Any, size: int = 0) -> NDArray[Any]:
    """Decode one chunk of ``size`` bytes with its codecs, without a task for each."""
    array_bytes, *bytes_bytes = codecs
    for inner in reversed(bytes_bytes):
        if isinstance(inner, BloscCodec):
            _check_compressed(stored, size)
        stored = inner._decode_sync(stored, spec)  # type: ignore[union-attr]
    decoded: NDBuffer = array_bytes._decode_sync(stored, spec)  # type: ignore[union-attr]
    return decoded.as_numpy_array()


register_pipeline(InlinePipeline)
_PIPELINE = f"{InlinePipeline.__module__}.{InlinePipeline.__qualname__}"


def open_array(store: Store, name: str, metadata: dict[str, Any]) -> zarr.AsyncArray[Any]:
    """Open the array ``name`` of a group whose ``zarr.json`` is already read and checked."""
    with zarr.config.set({"codec_pipeline.path": _PIPELINE}):
        return zarr.AsyncArray(metadata=metadata, store_path=StorePath(store, name))  # type: ignore[arg-type]
