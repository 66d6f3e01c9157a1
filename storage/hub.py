"""Dataset repositories of the Hugging Face Hub as stores: opened by URL, read by byte ranges, filled by `eopd push`.

    hub = HubDataset.at("hf://datasets/USER/NAME@REVISION/FOLDER")     # revision and folder are optional

The address, the token and the retries are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN, `hf auth login`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import unquote, urlsplit

from eopd.storage.errors import MissingArtifact, StoreError, StoreUnreadable, StoreUnwritable

SCHEME = "hf://"
TIMEOUT = 60.0
"""Seconds without a byte after which a request is tried again."""
_URL = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(pr|convert)/[^/]+|[^/]+))?(/(?P<folder>.*))?"
)


class HubDataset:
    """A dataset repository, read-only, with those methods of an obstore store that ``storage.remote`` calls.

    The revision is resolved and its files are listed on the first access, so what is pushed later is not seen.

    Args:
        repo: USER/NAME.
        revision: a branch, a tag or a commit.
        folder: of the repository that is the store; "" for its root.
    """

    def __init__(self, repo: str, revision: str = "main", folder: str = "") -> None:
        self.repo = check_name(repo)
        self.revision = revision
        self.folder = folder.strip("/")
        self._signed: dict[str, str] = {}  # where large files are for an hour: asking there does not count as the Hub

    @classmethod
    def at(cls, url: str) -> HubDataset:
        """Open a repository by its URL, without accessing it. Raises StoreError if it is no such URL."""
        match = _URL.fullmatch(url)
        if match is None:
            raise StoreError(
                f"{url} is no store: a store on the Hub is hf://datasets/USER/NAME[@REVISION][/FOLDER]", file=url
            )
        return cls(match["repo"], unquote(match["revision"] or "main"), match["folder"] or "")

    def __repr__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{SCHEME}datasets/{self.repo}{revision}{f'/{self.folder}' if self.folder else ''}"

    @cached_property
    def commit(self) -> str:
        """The commit that the revision names; it is asked for once."""
        from huggingface_hub import HfApi

        with naming_refusals(repr(self)):
            return str(HfApi().repo_info(self.repo, repo_type="dataset", revision=self.revision).sha)

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of every file of the store, by path."""
        from huggingface_hub import HfApi

        commit = self.commit
        with naming_refusals(repr(self)):
            tree = list(HfApi().list_repo_tree(self.repo, recursive=True, repo_type="dataset", revision=commit))
        prefix = f"{self.folder}/" if self.folder else ""
        sizes = {entry.path: int(entry.size) for entry in tree if hasattr(entry, "size")}  # a folder has none
        return {path.removeprefix(prefix): size for path, size in sizes.items() if path.startswith(prefix)}

    def head(self, path: str) -> dict[str, Any]:
        if path not in self.files:
            raise FileNotFoundError(f"{path} of {self}")
        return {"path": path, "size": self.files[path]}

    def get(self, path: str) -> _Content:
        return _Content(self, self.head(path))

    def get_range(self, path: str, *, start: int, end: int) -> bytes:
        """Return bytes ``start`` to ``end`` of a file; fewer if it ends before."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        if start >= min(end, self.head(path)["size"]):
            return b""
        # identity: a range of compressed bytes would be another range
        wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        options = {"follow_redirects": True, "timeout": TIMEOUT}
        with naming_refusals(repr(self)):
            response = None
            if (signed := self._signed.get(path)) is not None:
                response = http_backoff("GET", signed, headers=wanted, **options)
            if response is None or response.status_code not in (200, 206):  # the signature has expired
                url = hf_hub_url(
                    self.repo, path, subfolder=self.folder or None, repo_type="dataset", revision=self.commit
                )
                response = http_backoff("GET", url, headers={**build_hf_headers(), **wanted}, **options)
                hf_raise_for_status(response)
                if response.url.host != urlsplit(url).hostname:
                    self._signed[path] = str(response.url)
        content: bytes = response.content
        return content if response.status_code == 206 else content[start:end]

    async def get_range_async(self, path: str, *, start: int, end: int) -> bytes:
        import asyncio

        return await asyncio.to_thread(self.get_range, path, start=start, end=end)

    def list(self, prefix: str = "") -> Iterator[Sequence[dict[str, Any]]]:
        yield [self.head(path) for path in self.files if path.startswith(prefix)]

    def list_with_delimiter(self, prefix: str | None = None) -> dict[str, Sequence[Any]]:
        """List the files and apparent folders directly in the folder ``prefix``."""
        start = prefix or ""
        inner = {path: path.removeprefix(start).split("/") for path in self.files if path.startswith(start)}
        return {
            "objects": [self.head(path) for path, names in inner.items() if len(names) == 1],
            "common_prefixes": sorted({start + names[0] for names in inner.values() if len(names) > 1}),
        }

    def put(self, path: str, content: object, **_: object) -> NoReturn:
        raise self.refusal()

    def rename(self, path: str, to: str) -> NoReturn:
        raise self.refusal()

    def refusal(self) -> StoreUnwritable:
        return StoreUnwritable(f"{self} is only read: `eopd push scores/KEY {self.repo}` writes a dataset of the Hub")


class _Content:
    """A file of a repository, as obstore returns one."""

    def __init__(self, hub: HubDataset, meta: dict[str, Any]) -> None:
        self.hub = hub
        self.meta = meta

    def bytes(self) -> bytes:
        return self.hub.get_range(self.meta["path"], start=0, end=self.meta["size"])


def check_name(repo: str) -> str:
    """Return ``repo`` if a repository can be called so. Raises StoreError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise StoreError(f"{repo!r} is no name of a repository: {' '.join(str(error).split())}") from error
    if repo.count("/") != 1:
        raise StoreError(f"{repo!r} is no name of a repository: it must be USER/NAME")
    return repo


def require_token(repo: str) -> None:
    """Raise StoreError if ``repo`` is no name, StoreUnwritable if this machine has no token of the Hub."""
    from huggingface_hub import get_token

    check_name(repo)
    if get_token() is None:
        raise StoreUnwritable(
            f"pushing to {repo} needs a token of the Hub that may write: `hf auth login`, or HF_TOKEN"
        )


def upload(folder: Path, repo: str, kind: Literal["dataset", "model"], *, private: bool, message: str) -> str:
    """Upload a folder as a repository, which is made if there is none; returns the repository's URL.

    Raises:
        StoreUnwritable: there is no token, or it may not write there. StoreUnreadable: the Hub does not answer.
    """
    from huggingface_hub import HfApi

    require_token(repo)
    api = HfApi()
    with naming_refusals(repo, writing=True):
        url = api.create_repo(repo, repo_type=kind, private=True if private else None, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message)
    return str(url)


@contextmanager
def naming_refusals(where: str, *, writing: bool = False) -> Iterator[None]:
    """Turn the errors of huggingface_hub into StoreErrors of one line, with remedies."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise StoreUnreadable(
            f"{where} is gated: ask for access on its page at {endpoint}, then `hf auth login`", file=where
        ) from error
    except errors.RepositoryNotFoundError as error:
        if writing:
            raise StoreUnwritable(_no_right(where, endpoint)) from error
        raise MissingArtifact(
            f"there is no {where} at {endpoint}, or it is private: check the name, then the token (`hf auth login`, "
            "or HF_TOKEN)",
            file=where,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingArtifact(f"{where} has no such revision; without @REVISION it is `main`", file=where) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(where) from error
    except errors.OfflineModeIsEnabled as error:
        raise StoreUnreadable(
            f"{where} was not asked for, because HF_HUB_OFFLINE is set", file=where, remedy="Unset it"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise StoreUnwritable(_no_right(where, endpoint)) from error
        raise StoreUnreadable(
            f"{endpoint} answers {status} for {where}: {_first_line(error)}", file=where, remedy="Try again later"
        ) from error
    except ValueError as error:
        raise StoreUnwritable(f"{endpoint} refuses {where}: {' '.join(str(error).split())}", file=where) from error
    except errors.HTTPError as error:  # of the client (httpx, or httpx2): no answer
        raise StoreUnreadable(
            f"{endpoint} does not answer for {where}: {_first_line(error)}",
            file=where,
            remedy="Check the network and HF_ENDPOINT",
        ) from error


def _no_right(where: str, endpoint: str) -> str:
    return (
        f"{endpoint} refuses access to {where}: check the name, then the token and its rights (`hf auth whoami`; "
        "`hf auth login`, or HF_TOKEN)"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
