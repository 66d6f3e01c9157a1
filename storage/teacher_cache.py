"""The teacher cache: parts of scores, written once and read at random by any number of experiments.

``write_part`` encodes one part into a Zarr v3 group; ``TeacherCache`` reads responses of any part in any order, in
bounded memory, and never returns numbers that a checksum does not vouch for.

Letters: S responses, T tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, Required

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from eopd.storage.codec import FORMAT_VERSION, LARGEST_ENTROPY, MAX_ID, RAW_PLANES, Layout, PartArrays
from eopd.storage.coverage import Coverage, Need
from eopd.storage.decode import decode
from eopd.storage.errors import DamagedPart, NewerSchema, WrongArtifact
from eopd.storage.sources import ScoreSource, filled_parts, open_store
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, Int64, TeacherRows, offsets_of, take_ranges
from eopd.storage.zarr_part import ARRAYS, ChunkCache, ZarrPart, naming_damage, write_group

RECORD = "eopd.scores"
DEFAULT_MEMORY = 256 << 20
OPEN_PARTS = 1_024
MOST_STOPS = 1_024
MOST_TOKENS, MOST_ENTRIES = 1 << 24, 1 << 26
"""Most tokens and entries of one response: a part that states more is damaged, and nothing is allocated for it."""
GROUP_TOKENS = 16_384
"""Responses are decoded in groups of about this many tokens: small enough for a processor's cache."""


class _Head(TypedDict, total=False):
    k_max: Annotated[int, Field(lt=MAX_ID)]
    min_prob: Annotated[float, Field(ge=1e-9)]
    full_head_above: Annotated[float, Field(ge=-1.0, allow_inf_nan=False)]
    draws: Literal["none", "beyond_head", "full"]
    n_draws: Annotated[int, Field(ge=0, lt=MAX_ID)]
    seed: int


class _Header(TypedDict, total=False):
    """The types of ``PartHeader``'s fields in JSON."""

    teacher: str
    tokenizer: str
    teacher_context: str
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    head: Required[_Head]
    vocab_size: Annotated[int, Field(ge=1, le=MAX_ID)]
    rollout_checksum: str
    stop_ids: Annotated[list[Annotated[int, Field(ge=0, lt=MAX_ID)]], Field(max_length=MOST_STOPS)]
    engine: str
    engine_version: str
    dtype: str
    extra_k: Annotated[int, Field(ge=0, lt=MAX_ID)]
    has_entropy: bool
    has_sampled: bool
    schema: int


_HEADER = TypeAdapter(_Header)


@dataclass(frozen=True)
class PartHeader:
    """Header of a part, stored as attributes of its group."""

    teacher: str  # fingerprint
    tokenizer: str  # fingerprint of id -> token bytes
    teacher_context: str  # how the teacher's prompt is rendered
    temperature: float
    head: HeadRule
    vocab_size: int
    rollout_checksum: str  # of the rollouts part that was scored
    stop_ids: tuple[int, ...] = ()
    engine: str = ""
    engine_version: str = ""
    dtype: str = ""  # of the teacher's forward pass
    extra_k: int = 0  # ids of the student's own top-k a token
    has_entropy: bool = True  # False: imported from a capture that has none, and estimated
    has_sampled: bool = True  # False: imported, and known only where the head holds the sampled token
    schema: int = FORMAT_VERSION

    @property
    def coverage(self) -> Coverage:
        return Coverage(self.head, self.stop_ids, self.extra_k, self.vocab_size, self.has_entropy, self.has_sampled)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.head, self.stop_ids)

    def to_attributes(self) -> dict[str, Any]:
        return {"record": RECORD, **asdict(self), "stop_ids": list(self.stop_ids)}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], where: str) -> PartHeader:
        """Raises WrongArtifact (no score record), NewerSchema, DamagedPart (a field is missing)."""
        if attributes.get("record") != RECORD:
            raise WrongArtifact(f"{where} is no part of a teacher cache (record {attributes.get('record')!r})")
        schema = attributes.get("schema")
        if not isinstance(schema, int) or schema < 1:
            raise DamagedPart(f"{where} names no schema version (found {schema!r})")
        if schema > FORMAT_VERSION:
            raise NewerSchema(
                f"{where} has cache format {schema}; this eopd reads up to {FORMAT_VERSION}",
                remedy="Upgrade eopd.",
            )
        fields = {name: attributes[name] for name in cls.__dataclass_fields__ if name in attributes}
        try:
            _HEADER.validate_python(fields, strict=True)
            fields["head"] = HeadRule(**fields["head"])
            fields["stop_ids"] = tuple(fields.get("stop_ids", ()))
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedPart(f"{where} has attributes that are no header: {error}") from error


@dataclass(frozen=True)
class Origin:
    """The origin that a reader requires of scores; None accepts any. Fingerprints and names are those of
    ``PartHeader``."""

    teacher: str | None = None
    tokenizer: str | None = None
    teacher_context: str | None = None
    temperature: float | None = None

    def require(self, header: PartHeader, where: str) -> None:
        """Raise WrongArtifact, naming every field that differs."""
        wanted = {name: value for name, value in asdict(self).items() if value is not None}
        other = [
            f"{name.replace('_', ' ')} {getattr(header, name)} (asked for {value})"
            for name, value in wanted.items()
            if getattr(header, name) != value
        ]
        if other:
            raise WrongArtifact(
                f"{where} holds scores of {', '.join(other)}",
                remedy="Score the same rollouts with what is asked for (`eopd score`), which adds an artifact "
                "beside this one",
            )


def write_part(folder: Path, rows: TeacherRows, header: PartHeader) -> None:
    """Write ``rows`` as one part into an existing empty folder (an artifact's staging folder).

    Raises:
        ValueError: the rows disagree with the header, or are no distributions (``encode.encode``).
    """
    from eopd.storage.encode import encode  # compiled: half a second that who only reads need not wait

    if tuple(rows.stop_ids.tolist()) != tuple(header.stop_ids):
        raise ValueError(f"stop_ids of the rows {rows.stop_ids.tolist()} are not the header's {list(header.stop_ids)}")
    layout = header.layout
    columns = [list(column) for column in layout.columns]
    write_group(folder, encode(rows, layout), {**header.to_attributes(), "columns": columns})


class _Part:
    """An opened part, its header and the position of each response."""

    def __init__(self, source: ScoreSource, number: int) -> None:
        store, marker = open_store(source, number)
        self.zarr = ZarrPart(store, marker, f"{source} part {number}")
        self.header = PartHeader.from_attributes(self.zarr.attributes, self.zarr.where)
        self.responses = self.zarr.responses
        self.offsets = {name: offsets_of(self.responses[:, i]) for i, name in enumerate(ARRAYS)}
        for name in ARRAYS:
            if self.offsets[name][-1] != self.zarr.length[name]:
                raise DamagedPart(f"{self.zarr.where}: the table of responses is not that of {name}")
        most = self.responses.max(axis=0, initial=0)
        if (most > (MOST_TOKENS, MOST_ENTRIES)).any():
            raise DamagedPart(
                f"{self.zarr.where}: a response of {most[0]:,} tokens and {most[1]:,} entries is none",
            )
        planes = {"tokens": len(self.header.layout.columns), "entries": 2 + RAW_PLANES}
        if self.zarr.planes != planes:
            raise DamagedPart(f"{self.zarr.where} has {self.zarr.planes} planes, where its header says {planes}")


class TeacherCache:
    """Random access to the scores of one artifact. Cheap to construct: parts are read on demand.

    Args:
        artifact: of kind ``scores``; an ``Artifact`` or anything that is a ``ScoreSource``.
        memory: bytes of decoded chunks that may be kept.
        threads: how many groups of responses are read and decoded at a time.
        origin: what every part has to be of; scores of another teacher, context, tokenizer or temperature are refused.
    """

    def __init__(
        self, artifact: ScoreSource, memory: int = DEFAULT_MEMORY, threads: int = 2, origin: Origin | None = None
    ) -> None:
        self.artifact = artifact
        self.origin = origin
        self.chunks = ChunkCache(memory)
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._parts: OrderedDict[int, _Part] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def coverage(self) -> Coverage:
        """Coverage of all parts, from the first one that holds data. Raises MissingPart if nothing is committed."""
        return self.header(next(filled_parts(self.artifact), 0)).coverage

    def require(self, needs: Sequence[Need]) -> None:
        """Raise NeedNotMet, naming what is missing and the command that adds it."""
        self.coverage.require(needs, repr(self.artifact))

    def header(self, part: int) -> PartHeader:
        return self._part(part).header

    def response_count(self, part: int) -> int:
        return len(self._part(part).responses)

    def token_counts(self, part: int) -> Int64:
        """Return the number of scored tokens of each response [S]."""
        return self._part(part).responses[:, 0].astype(np.int64)

    def read_part(self, part: int) -> TeacherRows:
        """Read all responses of a part, possibly none: a rollout skips prompts that are too long."""
        responses = self.response_count(part)
        if not responses:
            return TeacherRows.without_responses(self.header(part).stop_ids)
        return self.read([(part, row) for row in range(responses)])

    def read(self, responses: Sequence[tuple[int, int]]) -> TeacherRows:
        """Read the rows of ``responses`` (part, row in the part), in this order; repeats are allowed.

        Raises:
            MissingPart, DamagedPart, NewerSchema, WrongArtifact; ValueError: a row that a part does not have.
        """
        if not len(responses):
            return TeacherRows.without_responses(self.coverage.stop_ids)
        wanted = np.asarray(responses, np.int64).reshape(-1, 2)
        parts, rows = wanted[:, 0], wanted[:, 1]
        opened = {int(part): self._part(int(part)) for part in np.unique(parts)}
        table = np.zeros((len(rows), 2), np.uint32)
        starts = {name: np.zeros(len(rows), np.int64) for name in ARRAYS}
        for number, part in opened.items():
            mine = parts == number
            if rows[mine].min() < 0 or rows[mine].max() >= len(part.responses):
                raise ValueError(
                    f"{part.zarr.where} has rows 0 .. {len(part.responses) - 1}, asked for {rows[mine].max()}"
                )
            table[mine] = part.responses[rows[mine]]
            for name in ARRAYS:
                starts[name][mine] = part.offsets[name][rows[mine]]
        groups = self._groups(table[:, 0], [opened[int(part)].header.layout for part in parts])

        def group(bounds: tuple[int, int]) -> TeacherRows:
            some = slice(*bounds)
            here = {int(part): opened[int(part)].zarr for part in np.unique(parts[some])}
            planes = {
                name: self.chunks.gather(here, parts[some], starts[name][some], table[some, i], name)
                for i, name in enumerate(ARRAYS)
            }
            layout = opened[int(parts[some][0])].header.layout
            vocabulary = max(opened[number].header.vocab_size for number in here)
            with naming_damage(f"{self.artifact} (parts {sorted(here)})"):
                rows = decode(PartArrays(table[some], planes["tokens"], planes["entries"]), layout)
                _check_range(rows, vocabulary)
                return rows

        if len(groups) == 1 or self._threads < 2:
            return concatenate([group(bounds) for bounds in groups])
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="teacher-cache")
        return concatenate(list(self._pool.map(group, groups)))

    @staticmethod
    def _groups(tokens: Any, layouts: Sequence[Layout]) -> list[tuple[int, int]]:
        """Yield bounds of runs of responses with one layout and about GROUP_TOKENS tokens."""
        bounds, low, held = [], 0, 0
        for i, count in enumerate(tokens):
            if i > low and (held >= GROUP_TOKENS or layouts[i] != layouts[low]):
                bounds.append((low, i))
                low, held = i, 0
            held += int(count)
        return [*bounds, (low, len(tokens))]

    def _part(self, number: int) -> _Part:
        with self._lock:
            opened = self._parts.get(number)
            if opened is None:
                opened = _Part(self.artifact, number)
                if self.origin is not None:
                    self.origin.require(opened.header, opened.zarr.where)
                self._parts[number] = opened
                if len(self._parts) > OPEN_PARTS:
                    self._parts.popitem(last=False)
            else:
                self._parts.move_to_end(number)
            return opened


def _check_range(rows: TeacherRows, vocabulary: int) -> None:
    """Raise ValueError if a number cannot come from a teacher with a vocabulary of this size."""
    for name in ("token_ids", "head_ids", "draw_ids", "extra_ids"):
        ids = getattr(rows, name)
        if len(ids) and ids.view(np.uint32).max() >= vocabulary:  # negative ones are large
            raise ValueError(f"{name}: id {ids.max()} (or one below 0) in a vocabulary of {vocabulary}")
    for name in ("sampled_logprob", "stop_logprobs", "extra_logprobs"):
        values = getattr(rows, name)
        if values.size and not values.min() >= LOGPROB_FLOOR - 1.0:
            raise ValueError(f"{name}: {values.min()} nats")
    if rows.tokens and not rows.entropy.max() <= LARGEST_ENTROPY:
        raise ValueError(f"entropy: {rows.entropy.max()} nats")


def concatenate(pieces: Sequence[TeacherRows]) -> TeacherRows:
    """Concatenate the responses of several rows.

    Raises:
        ValueError: they have different stop ids.
    """
    if len(pieces) == 1:
        return pieces[0]
    if any(not np.array_equal(piece.stop_ids, pieces[0].stop_ids) for piece in pieces):
        raise ValueError("responses of caches with different stop ids cannot be read together")
    joined: dict[str, Any] = {"stop_ids": pieces[0].stop_ids}
    for name in TeacherRows.__dataclass_fields__:
        values = [getattr(piece, name) for piece in pieces]
        if name.endswith("_offsets"):
            joined[name] = offsets_of(np.concatenate([np.diff(value) for value in values]))
        elif name != "stop_ids":
            joined[name] = np.concatenate(values)
    return TeacherRows(**joined)


# -- joint cache ------------------------------------------------------------------------------------------------------

# The scores of one set of rollouts by several teachers, read as one cache.


_OF_A_TOKEN = {
    "head_offsets": ("head_ids", "head_logprobs"),
    "draw_offsets": ("draw_ids",),
    "extra_offsets": ("extra_ids", "extra_logprobs"),
}


class JointCache:
    """Random access to the scores of several artifacts, each of which holds those of its teacher's prompts.

    Part i of each was scored from part i of the same rollouts; a response is read from the artifact that has tokens of
    it. With one artifact it reads what ``TeacherCache`` reads.
    """

    def __init__(self, artifacts: Sequence[ScoreSource]) -> None:
        assert artifacts
        self.artifacts = tuple(artifacts)
        self.caches = tuple(TeacherCache(artifact) for artifact in artifacts)
        self._filled = tuple(set(filled_parts(artifact)) for artifact in artifacts)
        self._owners: dict[int, Int64] = {}

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.artifacts))

    @cached_property
    def coverage(self) -> Coverage:
        """Coverage of every artifact.

        Raises:
            MissingPart: nothing is committed.
            WrongArtifact: the artifacts have different head rules, by which draws are weighed.
        """
        first = self.caches[0].coverage
        for cache in self.caches[1:]:
            if cache.coverage.head != first.head:
                raise WrongArtifact(
                    f"{cache.artifact} was scored with {cache.coverage.head}, and {self.caches[0].artifact} with "
                    f"{first.head}",
                    setting="score.head",
                    remedy="score both with one score.head to read them together",
                )
        return first

    def require(self, needs: Sequence[Need]) -> None:
        """Raise NeedNotMet, naming what is missing and the command that adds it; WrongArtifact, as ``coverage``."""
        for cache in self.caches:
            cache.require(needs)
        _ = self.coverage

    def parts(self) -> Iterator[int]:
        """Return the parts that hold scores of any teacher, in order."""
        return iter(sorted(set().union(*self._filled)))

    def sources(self, part: int) -> list[ScoreSource]:
        """Return the artifacts that hold scores of a part."""
        return [artifact for artifact, filled in zip(self.artifacts, self._filled, strict=True) if part in filled]

    def token_counts(self, part: int) -> Int64:
        """Return the number of scored tokens of each response [S]."""
        counts = [
            cache.token_counts(part) for cache, filled in zip(self.caches, self._filled, strict=True) if part in filled
        ]
        return np.max(counts, axis=0)

    def read_part(self, part: int) -> TeacherRows:
        """Read all responses of a part, possibly none."""
        if len(self.caches) == 1:
            return self.caches[0].read_part(part)
        return self.read([(part, row) for row in range(len(self.token_counts(part)))])

    def read(self, responses: Sequence[tuple[int, int]]) -> TeacherRows:
        """Read the rows of ``responses`` (part, row in the part), in this order, as ``TeacherCache.read``."""
        if len(self.caches) == 1 or not responses:
            return self.caches[0].read(responses)
        owners = np.asarray([self._owner(part)[row] for part, row in responses])
        pieces, order = [], []
        for number, cache in enumerate(self.caches):
            own = np.flatnonzero(owners == number)
            if len(own):
                pieces.append(cache.read([responses[place] for place in own]))
                order.append(own)
        return in_order(concatenate(pieces), np.argsort(np.concatenate(order)))

    def _owner(self, part: int) -> Int64:
        """Return which cache holds each response of a part [S]; the first that has the part if none has tokens."""
        if part not in self._owners:
            there = [number for number, filled in enumerate(self._filled) if part in filled]
            counts = np.stack([self.caches[number].token_counts(part) for number in there])
            self._owners[part] = np.asarray(there)[counts.argmax(axis=0)]
        return self._owners[part]


def in_order(rows: TeacherRows, order: Int64) -> TeacherRows:
    """Return the responses of ``rows`` in another order: first number ``order[0]``."""
    counts = np.diff(rows.response_offsets)[order]
    tokens = take_ranges(rows.response_offsets[:-1][order], counts)
    taken: dict[str, Any] = {
        name: getattr(rows, name)[tokens]
        for name in ("token_ids", "entropy", "sampled_logprob", "sampled_rank", "stop_logprobs", "tail_logmass")
    }
    for offsets_name, names in _OF_A_TOKEN.items():
        offsets = getattr(rows, offsets_name)
        entries = np.diff(offsets)[tokens]
        places = take_ranges(offsets[:-1][tokens], entries)
        taken |= {name: getattr(rows, name)[places] for name in names}
        taken[offsets_name] = offsets_of(entries)
    return replace(rows, response_offsets=offsets_of(counts), **taken)
