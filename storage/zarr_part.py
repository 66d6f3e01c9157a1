"""One part of the cache as a Zarr v3 group: written whole, opened from metadata that its marker vouches for.

Shards keep a part to a handful of files. Every chunk ends with its CRC32C, which is checked when it is decoded. The
metadata files have no checksum of their own: their hashes are in the marker, and they are compared before they are
believed (docs/cache-format.md).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from eopd.storage.codec import PartArrays
from eopd.storage.errors import DamagedPart
from eopd.storage.markers import REPAIR, Marker
from eopd.storage.zarr_inline import FolderStore, open_array
from eopd.storage.zarr_write import METADATA, write_array, write_attributes

TOKEN_CHUNK = 4_096
ENTRY_CHUNK = 16_384
CHUNKS_PER_SHARD = 512
ARRAYS = ("tokens", "entries")
_CODECS = {"sharding_indexed", "bytes", "blosc", "crc32c"}
_LARGEST_CHUNK = 1 << 27


def write_group(folder: Path, arrays: PartArrays, attributes: Mapping[str, Any]) -> None:
    """Write the arrays of a part and the attributes of its group into an existing empty folder."""
    write_attributes(folder, attributes)
    _write_planes(folder / "tokens", arrays.tokens, TOKEN_CHUNK, 4, ("column", "token"))
    _write_planes(folder / "entries", arrays.entries, ENTRY_CHUNK, 2, ("plane", "entry"))
    write_array(
        folder / "responses",
        arrays.responses,
        chunk=arrays.responses.shape[1],
        chunks_per_shard=1,
        compressor=BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle", typesize=4),
        dimensions=("response", "tokens and entries"),
    )


def _write_planes(folder: Path, planes: NDArray[np.uint8], chunk: int, level: int, names: tuple[str, str]) -> None:
    length = planes.shape[1]
    chunk = max(128, min(chunk, length))
    # Blosc's blocks are one plane each: a plane is compressed by itself, with its own statistics. Bit shuffling
    # costs 2 to 6 % here: symbols are skewed as bytes, and their bits are not
    write_array(
        folder,
        planes,
        chunk=chunk,
        chunks_per_shard=min(CHUNKS_PER_SHARD, -(-max(length, 1) // chunk)),
        compressor=BloscCodec(cname="zstd", clevel=level, shuffle="noshuffle", typesize=1, blocksize=chunk),
        dimensions=names,
    )


class ZarrPart:
    """An opened part: attributes, the table of responses, and its two big arrays to read ranges of.

    Raises:
        DamagedPart: a metadata file is not the one that was committed, or something cannot be decoded.
    """

    def __init__(self, store: Store, marker: Marker, where: str) -> None:
        self.where = where
        self._inline = isinstance(store, FolderStore)
        with naming_damage(where):
            self.attributes: dict[str, Any] = self._metadata(store, marker, METADATA)["attributes"]
            arrays = {
                name: open_array(store, name, self._checked(self._metadata(store, marker, f"{name}/{METADATA}"), name))
                for name in ("responses", *ARRAYS)
            }
            self.responses: NDArray[np.uint32] = self._run(arrays.pop("responses").getitem(slice(None)))
        self._arrays = arrays
        self.chunk = {name: int(array.chunks[1]) for name, array in arrays.items()}
        self.length = {name: int(array.shape[1]) for name, array in arrays.items()}
        self.planes = {name: int(array.shape[0]) for name, array in arrays.items()}

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """[planes, stop - start] of the array ``name``."""
        with naming_damage(self.where):
            found: NDArray[np.uint8] = self._run(self._arrays[name].getitem((slice(None), slice(start, stop))))
        return found

    def _metadata(self, store: Store, marker: Marker, name: str) -> dict[str, Any]:
        stored = self._run(store.get(name, default_buffer_prototype()))
        text = b"" if stored is None else stored.to_bytes()
        if name not in marker.files or hashlib.sha256(text).hexdigest() != marker.files[name]["sha256"]:
            raise DamagedPart(f"{self.where}: the bytes of {name} changed. {REPAIR}")
        found: dict[str, Any] = json.loads(text)
        return found

    def _checked(self, metadata: dict[str, Any], name: str) -> dict[str, Any]:
        """A cache may come from anywhere: only the format's own codecs, and chunks that fit in memory."""
        (sharding,) = metadata["codecs"]
        inner = sharding["configuration"]
        for codec in (sharding, *inner["codecs"], *inner["index_codecs"]):
            if codec["name"] not in _CODECS:
                raise DamagedPart(f"{self.where}: {name} asks for the codec {codec['name']!r}, which no part has")
        chunk = math.prod(inner["chunk_shape"])
        per_shard = math.prod(metadata["chunk_grid"]["configuration"]["chunk_shape"]) // max(chunk, 1)
        if not (0 < chunk <= _LARGEST_CHUNK and per_shard <= _LARGEST_CHUNK):
            raise DamagedPart(f"{self.where}: {name} has chunks of {inner['chunk_shape']}, {per_shard} a shard")
        return metadata

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if not self._inline:
            return sync(coroutine)
        try:
            coroutine.send(None)  # a folder's reads never wait, so the first step is the last
        except StopIteration as done:
            return done.value
        raise AssertionError("a local read waited")


@contextmanager
def naming_damage(where: str) -> Iterator[None]:
    """What Zarr and its codecs raise on bytes that they cannot believe, as DamagedPart."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, IndexError, FileNotFoundError, TypeError, AssertionError) as error:
        raise DamagedPart(f"{where} cannot be decoded ({error}). {REPAIR}") from error
