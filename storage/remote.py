"""Stores in object storage (s3://, gs://, az://, http:// and what else obstore opens): read lazily, filled by copying.

A dataset of the Hugging Face Hub (``storage.hub``) has the methods of an obstore store and is read in the same way.

The layout and the commit rule are those of a local store: the marker is put if absent, after the part's files. Scores
are read by byte ranges of chunks; whole files are copied and checked in pieces and never held in memory. Nothing is
deleted: a repair renames. obstore is an optional dependency.

    bucket = open_bucket("s3://team/scores")         # credentials: from the environment, as obstore documents
    cache = TeacherCache(RemoteArtifact(bucket, "scores", key))
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import (
    DamagedPart,
    MissingArtifact,
    MissingPart,
    StoreError,
    StoreUnreadable,
    StoreUnwritable,
    WrongArtifact,
    installing,
)
from eopd.storage.hub import HubDataset
from eopd.storage.identity import Identity, parse_identity
from eopd.storage.markers import Marker, file_text, marker_text
from eopd.storage.stored import StoredArtifact
from eopd.storage.untrusted import LARGEST_TEXT
from eopd.storage.zarr_inline import PartStore

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

READ_BYTES = 16 << 20
"""Bytes of a large object read in one request, which has to end before the client's timeout."""
WRITE_BYTES = 16 << 20
"""Bytes written in one request; an object of S3 has at most 10,000 such pieces."""


def open_bucket(url: str, **options: Any) -> Bucket:
    """Open a bucket, or a folder of one, by its URL.

    Raises:
        StoreError: obstore is not installed, or cannot open such a URL.
    """
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise StoreError(
            f"{url} needs obstore, which is not installed. To add it, {installing('s3')}", file=url
        ) from error
    try:
        return obstore.store.from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise StoreError(f"cannot open {url}: {error}", file=url) from error


@contextmanager
def naming_refusals(bucket: Bucket, path: str) -> Iterator[None]:
    """Turn a bucket's errors into StoreErrors with remedies."""
    if isinstance(bucket, HubDataset):  # its errors are StoreErrors, and obstore may not be installed
        yield
        return
    from obstore import exceptions

    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StoreUnwritable(
            f"{bucket} refuses access to {path}",
            file=path,
            remedy="Check the credentials and the bucket's permissions.",
        ) from error
    except exceptions.AlreadyExistsError:
        raise
    except (FileNotFoundError, exceptions.NotFoundError):
        raise
    except exceptions.BaseError as error:
        # the rest of the message is obstore's own state, for its developers
        message = str(error).splitlines()[0]
        raise StoreUnreadable(
            f"{bucket} does not answer for {path}: {message}",
            file=path,
            remedy="Check the URL, the network, and the credentials and endpoint in the environment (s3://: "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT)",
        ) from error


def get(bucket: Bucket, path: str) -> bytes:
    """Raises FileNotFoundError, DamagedPart (too large), StoreUnwritable (no permission) or StoreUnreadable."""
    with naming_refusals(bucket, path):
        result = bucket.get(path)
        if (size := result.meta["size"]) > LARGEST_TEXT:
            raise DamagedPart(
                f"{path} of {bucket} has {size:,} bytes, more than the {LARGEST_TEXT:,} of such a file", file=path
            )
        return bytes(result.bytes())


def put(bucket: Bucket, path: str, content: bytes | Iterator[bytes]) -> None:
    """Create an object atomically, in pieces if it is large; an error while iterating the pieces leaves no object.

    Raises:
        StoreUnwritable (no permission, no such bucket) or StoreUnreadable.
    """
    with _naming_missing_buckets(bucket), naming_refusals(bucket, path):
        bucket.put(path, content, chunk_size=WRITE_BYTES, max_concurrency=4)


def put_if_absent(bucket: Bucket, path: str, content: bytes) -> bool:
    """Create an object atomically. Returns False if it exists already."""
    if isinstance(bucket, HubDataset):
        raise bucket.refusal()
    from obstore.exceptions import AlreadyExistsError

    try:
        with _naming_missing_buckets(bucket), naming_refusals(bucket, path):
            bucket.put(path, content, mode="create")
    except AlreadyExistsError:
        return False
    return True


@contextmanager
def _naming_missing_buckets(bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StoreUnwritable(f"there is no {bucket}: {error.args[0].splitlines()[0]}") from error


def has(bucket: Bucket, path: str) -> bool:
    """True if the object exists. Raises StoreUnwritable (no permission) or StoreUnreadable."""
    try:
        with naming_refusals(bucket, path):
            bucket.head(path)
    except FileNotFoundError:
        return False
    return True


def rename(bucket: Bucket, path: str, to: str) -> None:
    """Copy an object, then delete the old one, so that one of the two always exists. A missing object is ignored.

    Raises:
        StoreUnwritable (no permission) or StoreUnreadable.
    """
    with contextlib.suppress(FileNotFoundError), naming_refusals(bucket, path):
        bucket.rename(path, to)


def listed(bucket: Bucket, folder: str) -> tuple[list[str], list[str]]:
    """List the names of objects and apparent folders directly in ``folder`` ("": the root), sorted.

    Raises:
        StoreUnreadable, StoreUnwritable: it does not answer, refuses access, or there is no such bucket.
    """
    with naming_refusals(bucket, folder):
        result = bucket.list_with_delimiter(prefix=f"{folder}/" if folder else None)
    objects = [entry["path"].rsplit("/", 1)[-1] for entry in result["objects"]]
    return sorted(objects), sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in result["common_prefixes"])


def folders(bucket: Bucket, folder: str) -> list[str]:
    """List apparent folders directly in ``folder``."""
    return listed(bucket, folder)[1]


def kinds(bucket: Bucket) -> list[str]:
    """List folders that may hold artifacts of one kind each."""
    return list(filter(paths.is_kind, folders(bucket, "")))


def sizes(bucket: Bucket, folder: str) -> dict[str, int]:
    """Return bytes of every object below ``folder``, by relative path, from one listing."""
    with naming_refusals(bucket, folder):
        pages = list(bucket.list(prefix=f"{folder}/"))
    return {entry["path"].removeprefix(f"{folder}/"): int(entry["size"]) for page in pages for entry in page}


def keys(bucket: Bucket) -> Iterator[tuple[str, str]]:
    """List (kind, key) of every artifact of a bucket, sorted, as ``listing.keys`` does for a folder."""
    return ((kind, key) for kind, key, names in _artifact_folders(bucket) if paths.IDENTITY in names)


def unidentified(bucket: Bucket) -> Iterator[tuple[str, str]]:
    """List (kind, key) of every folder with markers and no identity, as ``listing.unidentified`` does for a folder."""
    for kind, key, names in _artifact_folders(bucket):
        if paths.IDENTITY not in names and any(map(paths.is_of_a_commit, names)):
            yield kind, key


def _artifact_folders(bucket: Bucket) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (kind, key, object names) of every folder that may be an artifact's."""
    for kind in kinds(bucket):
        for key in filter(paths.is_key, folders(bucket, kind)):
            names, inner = listed(bucket, f"{kind}/{key}")
            yield kind, key, names
            if paths.IDENTITY not in names:
                coverages = filter(paths.is_key, (f"{key}/{each}" for each in inner))
                yield from ((kind, coverage, listed(bucket, f"{kind}/{coverage}")[0]) for coverage in coverages)


class RemoteArtifact(StoredArtifact):
    """One artifact in a bucket: a ``ScoreSource``."""

    folder: str

    def __init__(self, bucket: Bucket, kind: str, key: str) -> None:
        self.bucket = bucket
        self.kind = kind
        self.key = key
        self.folder = f"{kind}/{key}"

    def __repr__(self) -> str:
        return f"{self.folder} of {self.bucket}"

    @cached_property
    def identity(self) -> Identity:
        where = f"{self.folder}/{paths.IDENTITY}"
        try:
            if not paths.is_key(self.key):  # it may come from another artifact's identity
                raise FileNotFoundError(where)
            return parse_identity(get(self.bucket, where), self.kind, self.key, where)
        except FileNotFoundError as error:
            problem = f"there is no {self.kind} artifact {self.key} in {self.bucket}"
            raise MissingArtifact(problem, **self.place()) from error

    def exists(self) -> bool:
        """Raises StoreUnreadable, StoreUnwritable (no permission); DamagedPart, WrongArtifact, NewerSchema."""
        try:
            _ = self.identity
        except MissingArtifact:
            return False
        return True

    @property
    def size(self) -> int:
        """Bytes of all files of the artifact's parts, from one listing."""
        return sum(size for name, size in sizes(self.bucket, self.folder).items() if "/" in name)

    def names(self) -> list[str]:
        return listed(self.bucket, self.folder)[0]

    def has(self, name: str) -> bool:
        return has(self.bucket, f"{self.folder}/{name}")

    def read(self, name: str) -> bytes:
        return get(self.bucket, f"{self.folder}/{name}")

    def create(self, name: str, text: str) -> bool:
        return put_if_absent(self.bucket, f"{self.folder}/{name}", text.encode())

    def replace(self, name: str, text: str) -> None:
        put(self.bucket, f"{self.folder}/{name}", text.encode())

    def part_names(self, marker: Marker) -> set[str]:
        there = sizes(self.bucket, self._data_folder(marker))
        for name in marker.files:
            self._check_size(marker, name, there.get(name))
        return set(there)

    def pieces(self, marker: Marker, name: str) -> Iterator[bytes]:
        path, size = f"{self._data_folder(marker)}/{name}", int(marker.files[name]["size"])
        for start in range(0, size, READ_BYTES):
            with naming_refusals(self.bucket, path):
                piece = self.bucket.get_range(path, start=start, end=min(start + READ_BYTES, size))
            yield bytes(piece)

    def _data_folder(self, marker: Marker) -> str:
        return f"{self.folder}/{paths.data_name(marker.part, marker.nonce)}"

    def part_store(self, part: int, marker: Marker) -> Store:
        return BucketPart(self.bucket, self._data_folder(marker), marker)


class BucketPart(PartStore):
    """The files of one committed part in a bucket, as Zarr reads them. Sizes come from the marker."""

    def __init__(self, bucket: Bucket, folder: str, marker: Marker) -> None:
        super().__init__()
        self.bucket = bucket
        self.folder = folder
        self.marker = marker

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPart) and (other.folder, other.marker) == (self.folder, self.marker)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        if key not in self.marker.files:
            raise FileNotFoundError(f"{self.folder}/{key}")
        size = int(self.marker.files[key]["size"])
        start, end = 0, size
        if isinstance(byte_range, RangeByteRequest):
            start, end = byte_range.start, byte_range.end
        elif isinstance(byte_range, SuffixByteRequest):
            start = max(size - byte_range.suffix, 0)
        try:
            with naming_refusals(self.bucket, f"{self.folder}/{key}"):
                data = await self.bucket.get_range_async(f"{self.folder}/{key}", start=start, end=end)
        except FileNotFoundError as error:
            raise DamagedPart(f"{self.folder}/{key} is gone from {self.bucket}", file=f"{self.folder}/{key}") from error
        if len(data) != end - start:
            raise DamagedPart(
                f"{self.folder}/{key} of {self.bucket} is shorter than the {size} bytes of its marker",
                file=f"{self.folder}/{key}",
            )
        return prototype.buffer.from_bytes(bytes(data))

    async def getsize(self, key: str) -> int:
        return int(self.marker.files[key]["size"])

    async def exists(self, key: str) -> bool:
        return key in self.marker.files


# -- copying ----------------------------------------------------------------------------------------------------------

# Copying of artifacts between stores, folders and buckets alike. For `eopd store copy`.
#
# A copy follows the commit rule: files first, their bytes checked against the source's marker on the way, the marker
# last and only if absent. So running an interrupted copy again continues it, and a copy is an artifact like any
# other. A pruned part is copied as it stands: its remains, then its tombstone.


def copy(source: StoredArtifact, target: Path | Bucket, parts: Iterable[int] | None = None) -> list[int]:
    """Copy the parts (all, or those named) that the target lacks; returns the copied parts.

    What the target has pruned it lacks if the source has it whole: the copy is beside its tombstone then, and wins.

    Raises:
        DamagedPart: the source's bytes are not what its marker says; that part is not copied.
        WrongArtifact: the target has the rollouts that these scores are of, with other bytes.
        StoreFull, StoreUnwritable: the target takes no more.
    """
    wanted = source.standing().made if parts is None else set(parts)
    if isinstance(target, Path):
        return _to_folder(source, target, wanted)
    return _to_bucket(source, target, wanted)


def _to_folder(source: StoredArtifact, store: Path, wanted: set[int]) -> list[int]:
    target = Artifact(store, source.identity)
    target.begin()
    copied = []
    for marker in _lacking(source, target, wanted):
        _refuse_other_rollouts(source, marker, lambda kind, key: open_artifact(store, kind, key))
        with target.write_part(marker.part, inputs=marker.inputs, info=marker.info) as folder:
            for name in marker.files:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    file.writelines(source.checked(marker, name))
        copied.append(marker.part)
    target.renew_manifest()
    return copied


def _to_bucket(source: StoredArtifact, bucket: Bucket, wanted: set[int]) -> list[int]:
    target = RemoteArtifact(bucket, source.kind, source.key)
    target.create(paths.IDENTITY, file_text(source.identity.to_json()))
    copied = []
    for marker in _lacking(source, target, wanted):
        _refuse_other_rollouts(source, marker, partial(RemoteArtifact, bucket))
        fresh = replace(marker, nonce=secrets.token_hex(8))
        for name in marker.files:
            path = f"{target.folder}/{paths.data_name(marker.part, fresh.nonce)}/{name}"
            pieces = source.checked(marker, name)
            small = int(marker.files[name]["size"]) <= WRITE_BYTES  # one request instead of three
            put(bucket, path, b"".join(pieces) if small else pieces)
        if fresh.set_aside is not None:
            target.create(paths.set_aside_name(marker.part), "")
        if target.create(fresh.file_name, marker_text(fresh, source.kind, source.key)):
            copied.append(marker.part)
    target.renew_manifest()
    return copied


def _lacking(source: StoredArtifact, target: StoredArtifact, wanted: set[int]) -> Iterator[Marker]:
    """Return the source's markers of parts that the target lacks, or has only pruned while the source has them
    complete."""
    there = target.standing()
    for part in sorted(wanted - there.committed):
        marker = source.remains(part)
        if not (marker.is_pruned and part in there.pruned):
            if isinstance(source, Artifact):
                source.part_names(marker)  # all are there, and plain files
            yield marker


def _refuse_other_rollouts(source: StoredArtifact, marker: Marker, there: Callable[[str, str], StoredArtifact]) -> None:
    """Refuse scores for other rollouts: rollouts of one key may differ in bytes between stores (a GPU's do)."""
    scored, key = marker.inputs.get("rollouts"), source.identity.inputs.get("rollouts")
    if scored is None or key is None:
        return
    try:
        marker_there = there("rollouts", key).marker(marker.part)
    except (MissingArtifact, MissingPart):
        return
    if marker_there.checksum != scored:
        raise WrongArtifact(
            f"{source} part {marker.part} was made from other rollouts than the target's: rollouts/{key} has other "
            "bytes there",
            **source.place(marker.part),
            remedy="Score the target's own, or copy to another store together with --inputs",
        )
