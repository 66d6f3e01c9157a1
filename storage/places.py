"""Store locations as people write them: a folder, or the URL of a bucket, of a folder in one, or of a dataset on the
Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from eopd.storage.errors import StoreError
from eopd.storage.hub import SCHEME, HubDataset

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket


def is_bucket(place: str) -> bool:
    """True if ``place`` is a URL of anything but a local folder."""
    return "://" in place and not place.startswith("file://")


def open_place(place: str) -> Path | Bucket:
    """Open a folder (its path, or file://path), a bucket or a dataset (hf://), without accessing it.

    Raises:
        StoreError: obstore is not installed, or cannot open such a URL; a file:// URL names another machine.
    """
    if place.startswith(SCHEME):
        return HubDataset.at(place)
    if is_bucket(place):
        from eopd.storage.remote import open_bucket  # Zarr: only where there is a bucket

        return open_bucket(place)
    if not place.startswith("file://"):
        return Path(place)
    url = urlsplit(place)
    if url.netloc not in ("", "localhost"):
        raise StoreError(
            f"{place} names a machine, {url.netloc}: the folder /team/store is file:///team/store", file=place
        )
    return Path(unquote(url.path))
