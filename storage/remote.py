"""Stores in object storage (s3://, gs://, az://, http:// and what else obstore opens): read lazily, filled by copying.

The layout and the commit rule are those of a local store: the marker is put if absent, after the part's files. Reads
ask for the byte ranges of the chunks they need; nothing is downloaded whole. obstore is an optional dependency.

    bucket = open_bucket("s3://team/scores")         # credentials: from the environment, as obstore documents
    cache = TeacherCache(RemoteArtifact(bucket, "scores", key))
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from eopd.storage import paths
from eopd.storage.artifacts import Identity, parse_identity
from eopd.storage.errors import DamagedPart, MissingArtifact, MissingPart, StoreError, StoreUnreadable, StoreUnwritable
from eopd.storage.markers import Marker, parse_marker

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket


def open_bucket(url: str, **options: Any) -> Bucket:
    """A bucket, or a folder of one, by its URL.

    Raises:
        StoreError: obstore is not installed, or cannot open such a URL.
    """
    try:
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise StoreError(f"{url} needs obstore: pip install 'eopd[objectstore]'") from error
    try:
        return obstore.store.from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise StoreError(f"cannot open {url}: {error}") from error


@contextmanager
def naming_refusals(bucket: Bucket, path: str) -> Iterator[None]:
    """What a bucket raises, as StoreErrors that say what to do."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StoreUnwritable(
            f"{bucket} refuses access to {path}. Check the credentials and the bucket's permissions."
        ) from error
    except exceptions.AlreadyExistsError:
        raise
    except (FileNotFoundError, exceptions.NotFoundError):
        raise
    except exceptions.BaseError as error:
        # the rest of the message is obstore's own state, for its developers
        said = str(error).splitlines()[0]
        raise StoreUnreadable(
            f"{bucket} does not answer for {path}: {said}. Check the URL, the network, and the credentials and "
            "endpoint in the environment (s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT)"
        ) from error


def get(bucket: Bucket, path: str) -> bytes:
    """Raises FileNotFoundError, StoreUnwritable (no permission) or StoreUnreadable."""
    import obstore

    with naming_refusals(bucket, path):
        return bytes(obstore.get(bucket, path).bytes())


def put(bucket: Bucket, path: str, content: bytes) -> None:
    """Raises StoreUnwritable (no permission, no such bucket) or StoreUnreadable."""
    import obstore

    with _naming_missing_buckets(bucket), naming_refusals(bucket, path):
        obstore.put(bucket, path, content)


def put_if_absent(bucket: Bucket, path: str, content: bytes) -> bool:
    """Create an object whole or not at all. False when it is there already."""
    import obstore
    from obstore.exceptions import AlreadyExistsError

    try:
        with _naming_missing_buckets(bucket), naming_refusals(bucket, path):
            obstore.put(bucket, path, content, mode="create")
    except AlreadyExistsError:
        return False
    return True


@contextmanager
def _naming_missing_buckets(bucket: Bucket) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StoreUnwritable(f"there is no {bucket}: {error.args[0].splitlines()[0]}") from error


def names(bucket: Bucket, folder: str) -> list[str]:
    """Of the objects directly in ``folder``."""
    import obstore

    with naming_refusals(bucket, folder):
        found = obstore.list_with_delimiter(bucket, prefix=f"{folder}/")
    return [entry["path"].rsplit("/", 1)[-1] for entry in found["objects"]]


def folders(bucket: Bucket, folder: str) -> list[str]:
    """Names of what looks like a folder directly in ``folder``."""
    import obstore

    with naming_refusals(bucket, folder):
        found = obstore.list_with_delimiter(bucket, prefix=f"{folder}/")
    return sorted(prefix.rstrip("/").rsplit("/", 1)[-1] for prefix in found["common_prefixes"])


def keys(bucket: Bucket) -> Iterator[tuple[str, str]]:
    """(kind, key) of every artifact of a bucket, sorted, as ``listing.keys`` of a folder."""
    for kind in paths.KINDS:
        for key in folders(bucket, kind):
            if paths.IDENTITY in names(bucket, f"{kind}/{key}"):
                yield kind, key
            elif kind == "scores":
                yield from ((kind, f"{key}/{coverage}") for coverage in folders(bucket, f"{kind}/{key}"))


class RemoteArtifact:
    """One artifact in a bucket, read-only: a ``ScoreSource``."""

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
            return parse_identity(get(self.bucket, where), self.kind, self.key, where)
        except FileNotFoundError as error:
            raise MissingArtifact(f"there is no {self.kind} artifact {self.key} in {self.bucket}") from error

    def exists(self) -> bool:
        """Raises StoreUnreadable, StoreUnwritable (no permission); DamagedPart, WrongArtifact, NewerSchema."""
        try:
            _ = self.identity
        except MissingArtifact:
            return False
        return True

    @property
    def parts(self) -> int:
        return self.identity.parts

    def committed(self) -> set[int]:
        found = {paths.marker_part(name) for name in names(self.bucket, self.folder)}
        return {part for part in found if part is not None and part < self.parts}

    def hinted(self) -> set[int]:
        """Parts that were committed empty, perhaps: their markers know."""
        found = {paths.set_aside_part(name) for name in names(self.bucket, self.folder)}
        return {part for part in found if part is not None and part < self.parts}

    def pruned(self) -> set[int]:
        """None: what is in a bucket was copied there whole."""
        return set()

    def remains(self, part: int) -> Marker:
        return self.marker(part)

    @property
    def bytes(self) -> int:
        """Of all files of its parts, from one listing."""
        import obstore

        with naming_refusals(self.bucket, self.folder):
            pages = list(obstore.list(self.bucket, prefix=f"{self.folder}/"))
        depth = self.folder.count("/") + 2  # <folder>/part-00003.<nonce>/<file>
        return sum(int(entry["size"]) for page in pages for entry in page if entry["path"].count("/") - depth >= 0)

    def missing(self) -> list[int]:
        return sorted(set(range(self.parts)) - self.committed())

    def is_complete(self) -> bool:
        return len(self.committed()) == self.parts

    def marker(self, part: int) -> Marker:
        where = f"{self.folder}/{paths.marker_name(part)}"
        try:
            text = get(self.bucket, where)
        except FileNotFoundError as error:
            raise MissingPart(f"{self} part {part} is not committed") from error
        return parse_marker(text, self.kind, self.key, part, where)

    def part_store(self, part: int, marker: Marker) -> Store:
        return BucketPart(self.bucket, f"{self.folder}/{paths.data_name(part, marker.nonce)}", marker)


class BucketPart(Store):
    """The files of one committed part in a bucket, as Zarr reads them. Their sizes are the marker's."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, bucket: Bucket, folder: str, marker: Marker) -> None:
        super().__init__(read_only=True)
        self.bucket = bucket
        self.folder = folder
        self.marker = marker
        self._is_open = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPart) and (other.folder, other.marker) == (self.folder, self.marker)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        import obstore

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
                found = await obstore.get_range_async(self.bucket, f"{self.folder}/{key}", start=start, end=end)
        except FileNotFoundError as error:
            raise DamagedPart(f"{self.folder}/{key} is gone from {self.bucket}") from error
        if len(found) != end - start:
            raise DamagedPart(f"{self.folder}/{key} of {self.bucket} is shorter than the {size} bytes of its marker")
        return prototype.buffer.from_bytes(bytes(found))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self.marker.files

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError("read-only")

    async def delete(self, key: str) -> None:
        raise NotImplementedError("read-only")

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError("a part is not listed: its marker names its files")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("a part is not listed: its marker names its files")

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("a part is not listed: its marker names its files")
