"""One part of the cache as a Zarr v3 group: written completely, opened from metadata that its marker verifies.

Shards keep a part to a handful of files. Every chunk ends with its CRC32C, which is checked when it is decoded. The
metadata files have no checksum of their own: their hashes are in the marker, and they are compared before they are
believed (docs/format.md).
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict
from zarr.abc.codec import Codec
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.dtype import parse_dtype

from eopd.storage.codec import PartArrays
from eopd.storage.errors import DamagedPart
from eopd.storage.markers import REPAIR, Marker
from eopd.storage.teacher_record import Int64, offsets_of
from eopd.storage.untrusted import MISFITS, naming, parse_json
from eopd.storage.zarr_inline import FolderStore, open_array

# -- chunk cache ------------------------------------------------------------------------------------------------------

# Bounded cache of decoded chunks from many parts, and gathering of response ranges from it.


Chunk = NDArray[np.uint8]
Key = tuple[int, str, int]  # part, array, chunk


class ChunkCache:
    """LRU cache of chunks, up to ``memory`` bytes. Thread-safe."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.held = 0
        self._chunks: OrderedDict[Key, Chunk] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Key) -> Chunk | None:
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
            return chunk

    def put(self, key: Key, chunk: Chunk) -> None:
        with self._lock:
            if key in self._chunks:
                return
            self._chunks[key] = chunk
            self.held += chunk.nbytes
            while self.held > self.memory and self._chunks:
                _, dropped = self._chunks.popitem(last=False)
                self.held -= dropped.nbytes

    def gather(
        self, opened: Mapping[int, ZarrPart], parts: Int64, starts: Int64, lengths: NDArray[np.uint32], name: str
    ) -> NDArray[np.uint8]:
        """Return ranges of one array, one after the other in the given order: [planes, N].

        Args:
            opened: the parts, by number.
            parts, starts, lengths: [S] of each range.
        """
        ends = offsets_of(lengths)
        out = np.empty((next(iter(opened.values())).planes[name], int(ends[-1])), np.uint8)
        for number, part in opened.items():
            mine = np.flatnonzero((parts == number) & (lengths > 0))
            if not len(mine):
                continue
            chunks = self._load(number, part, name, starts[mine], starts[mine] + lengths[mine])
            width = part.chunk[name]
            for i in mine:
                at, start, stop = int(ends[i]), int(starts[i]), int(starts[i] + lengths[i])
                for index in range(start // width, -(-stop // width)):
                    low, high = max(start, index * width), min(stop, (index + 1) * width)
                    out[:, at : at + high - low] = chunks[index][:, low - index * width : high - index * width]
                    at += high - low
        return out

    def _load(self, number: int, part: ZarrPart, name: str, starts: Int64, stops: Int64) -> dict[int, Chunk]:
        """Load every chunk of the ranges; missing chunks are read, adjacent ones in one read."""
        width, length = part.chunk[name], part.length[name]
        wanted = sorted(
            {i for a, b in zip(starts, stops, strict=True) for i in range(int(a) // width, -(-int(b) // width))}
        )
        chunks: dict[int, Chunk] = {}
        missing: list[list[int]] = []
        for index in wanted:
            cached = self.get((number, name, index))
            if cached is not None:
                chunks[index] = cached
            elif missing and missing[-1][-1] == index - 1:
                missing[-1].append(index)
            else:
                missing.append([index])
        for run in missing:
            planes = part.read(name, run[0] * width, min((run[-1] + 1) * width, length))
            for i, index in enumerate(run):
                chunk = planes[:, i * width : (i + 1) * width]
                chunks[index] = chunk if len(run) == 1 else chunk.copy()
                self.put((number, name, index), chunks[index])
        return chunks


# -- zarr write -------------------------------------------------------------------------------------------------------

# Synchronous writer of sharded Zarr v3 arrays, the counterpart of ``storage.zarr_inline``.
#
# Zarr starts a task for every step of every chunk and hops to a thread for every compression. Beside a teacher's
# forward pass that costs more than compressing. A part is written whole and once, so its files are put together here:
# metadata as the Zarr v3 specification has them, and shards of chunks that go through Zarr's own codecs one after the
# other. Like the reader, this calls their synchronous methods, which Zarr does not promise to keep; a test compares
# every byte with what Zarr writes.
#
# Letters: P planes, N columns.


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


# -- parts ------------------------------------------------------------------------------------------------------------

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
            raise DamagedPart(f"{self.where}: the bytes of {name} changed", file=name, remedy=REPAIR)
        with naming(f"{self.where}: {name}"):
            metadata: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_python(parse_json(text), strict=True)
        return metadata

    def _checked(self, metadata: dict[str, Any], name: str) -> dict[str, Any]:
        """Check an array's metadata against this format and the memory that its chunks need.

        Raises:
            DamagedPart: they are not; nothing has been allocated by then.
        """
        path = f"{name}/{METADATA}"
        where = f"{self.where}: {path}"
        with naming(where):
            _ARRAY.validate_python(metadata, strict=True)
        rows, length = metadata["shape"]
        inner = metadata["codecs"][0]["configuration"]
        names = [[codec["name"] for codec in inner[which]] for which in ("codecs", "index_codecs")]
        if names != _CODECS:
            raise DamagedPart(f"{where} asks for the codecs {names}, where a part has {_CODECS}", file=path)
        high, width = inner["chunk_shape"]
        _, shard_width = shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        if high != max(rows, 1) or shard != [high, shard_width] or shard_width % width:
            raise DamagedPart(
                f"{where} divides {rows} x {length} into shards of {shard} and chunks of {[high, width]}", file=path
            )
        if high * width > LARGEST_CHUNK or shard_width // width > MOST_CHUNKS or length > LONGEST:
            raise DamagedPart(f"{where} is too large: {rows} x {length} in chunks of {[high, width]}", file=path)
        if metadata["data_type"] != ("uint32" if name == RESPONSES else "uint8") or (name == RESPONSES and length != 2):
            raise DamagedPart(f"{where} is of {metadata['data_type']}, {rows} x {length}", file=path)
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
        raise DamagedPart(f"{where} cannot be decoded ({error})", remedy=REPAIR) from error
