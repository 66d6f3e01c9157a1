"""One part of the cache as a Zarr v3 group: written completely, opened from metadata that its marker verifies.

Shards keep a part to a handful of files. Every chunk ends with its CRC32C, which is checked when it is decoded. The
metadata files have no checksum of their own: their hashes are in the marker, and they are compared before they are
believed (docs/format.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict
from zarr.abc.store import Store
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from eopd.storage.codec import PartArrays
from eopd.storage.errors import DamagedPart
from eopd.storage.markers import REPAIR, Marker
from eopd.storage.untrusted import MISFITS, naming, parse_json
from eopd.storage.zarr_inline import FolderStore, open_array
from eopd.storage.zarr_write import METADATA, write_array, write_attributes

TOKEN_CHUNK = 4_096
ENTRY_CHUNK = 16_384
CHUNKS_PER_SHARD = 512
ARRAYS = ("tokens", "entries")
RESPONSES = "responses"
LARGEST_CHUNK = 1 << 26
"""Numbers in a chunk; the table of responses is one chunk."""
MOST_CHUNKS = 1 << 20
LONGEST = 1 << 40
_CODECS = [["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]]
_Shape = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 62)]], Field(min_length=2, max_length=2)]
_ChunkShape = Annotated[list[Annotated[int, Field(ge=1, lt=1 << 62)]], Field(min_length=2, max_length=2)]


class _Grid(TypedDict):
    chunk_shape: _ChunkShape


class _ChunkGrid(TypedDict):
    name: Literal["regular"]
    configuration: _Grid


class _Codec(TypedDict):
    name: str


class _Shards(TypedDict):
    chunk_shape: _ChunkShape
    codecs: list[_Codec]
    index_codecs: list[_Codec]
    index_location: NotRequired[Literal["end"]]


class _Sharding(TypedDict):
    name: Literal["sharding_indexed"]
    configuration: _Shards


class _Array(TypedDict):
    """The metadata of an array that decide what is read and allocated."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: _Shape
    data_type: Literal["uint8", "uint32"]
    fill_value: Literal[0]
    chunk_grid: _ChunkGrid
    codecs: Annotated[list[_Sharding], Field(min_length=1, max_length=1)]
    storage_transformers: NotRequired[Annotated[list[Any], Field(max_length=0)]]


_ARRAY = TypeAdapter(_Array)


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
    """An opened part: attributes, the table of responses, and range access to its two big arrays.

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
                for name in (RESPONSES, *ARRAYS)
            }
            self.responses: NDArray[np.uint32] = self._run(arrays.pop(RESPONSES).getitem(slice(None)))
        self._arrays = arrays
        self.chunk = {name: int(array.chunks[1]) for name, array in arrays.items()}
        self.length = {name: int(array.shape[1]) for name, array in arrays.items()}
        self.planes = {name: int(array.shape[0]) for name, array in arrays.items()}

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Read a range of the array ``name``: [planes, stop - start]."""
        with naming_damage(self.where):
            values: NDArray[np.uint8] = self._run(self._arrays[name].getitem((slice(None), slice(start, stop))))
        return values

    def _metadata(self, store: Store, marker: Marker, name: str) -> dict[str, Any]:
        stored = self._run(store.get(name, default_buffer_prototype()))
        text = b"" if stored is None else stored.to_bytes()
        if name not in marker.files or hashlib.sha256(text).hexdigest() != marker.files[name]["sha256"]:
            raise DamagedPart(f"{self.where}: the bytes of {name} changed. {REPAIR}")
        with naming(f"{self.where}: {name}"):
            metadata: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_python(parse_json(text), strict=True)
        return metadata

    def _checked(self, metadata: dict[str, Any], name: str) -> dict[str, Any]:
        """Check an array's metadata against this format and the memory that its chunks need.

        Raises:
            DamagedPart: they are not; nothing has been allocated by then.
        """
        where = f"{self.where}: {name}/{METADATA}"
        with naming(where):
            _ARRAY.validate_python(metadata, strict=True)
        rows, length = metadata["shape"]
        inner = metadata["codecs"][0]["configuration"]
        names = [[codec["name"] for codec in inner[which]] for which in ("codecs", "index_codecs")]
        if names != _CODECS:
            raise DamagedPart(f"{where} asks for the codecs {names}, where a part has {_CODECS}")
        high, width = inner["chunk_shape"]
        _, shard_width = shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if high != max(rows, 1) or shard != [high, shard_width] or shard_width % width:
            raise DamagedPart(f"{where} divides {rows} x {length} into shards of {shard} and chunks of {[high, width]}")
        if high * width > LARGEST_CHUNK or shard_width // width > MOST_CHUNKS or length > LONGEST:
            raise DamagedPart(f"{where} is too large: {rows} x {length} in chunks of {[high, width]}")
        if metadata["data_type"] != ("uint32" if name == RESPONSES else "uint8") or (name == RESPONSES and length != 2):
            raise DamagedPart(f"{where} is of {metadata['data_type']}, {rows} x {length}")
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
    """Turn errors of Zarr and its codecs about corrupt bytes into DamagedPart."""
    try:
        yield
    except (*MISFITS, FileNotFoundError) as error:
        raise DamagedPart(f"{where} cannot be decoded ({error}). {REPAIR}") from error
