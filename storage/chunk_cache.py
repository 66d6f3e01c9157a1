"""Bounded cache of decoded chunks from many parts, and gathering of response ranges from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from eopd.storage.ragged import offsets_of
from eopd.storage.teacher_record import Int64
from eopd.storage.zarr_part import ZarrPart

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
