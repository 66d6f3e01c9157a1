"""A local server with the part of the Hub's API that eopd uses: repositories are made, filled, listed and read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_write"
PAGE = 5
"""Files of one page of a listing, so that there are several."""


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.bin filter=lfs\n"}])
    messages: list[str] = field(default_factory=list)

    def names(self) -> dict[str, int]:
        return {f"{number:040x}": number for number in range(len(self.commits))} | {"main": len(self.commits) - 1}


@dataclass
class Hub:
    """State of the server; ``endpoint`` is its HF_ENDPOINT."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)  # datasets/USER/NAME, models/USER/NAME
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[str] = field(default_factory=list)
    ranges: bool = True  # False: whole files are sent, as servers may
    signature: str = "signed=1"  # of the addresses of large files; others have expired
    leaks: int = 0  # requests for large files with a token
    fails: int = 0  # this many requests for files are answered 503

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository].commits[-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, content: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        body = self._body()
        self.may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "PUT" and path.startswith("/upload/"):
            self.hub.large[path.rsplit("/", 1)[1]] = body
            self._send(200)
        elif path.startswith("/large/"):  # another host: the token must not get there
            self.hub.leaks += "Authorization" in self.headers
            if url.query == self.hub.signature:
                self._file(self.hub.large[path.rsplit("/", 1)[1]])
            else:
                self._send(403)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            errors = [{"message": error} for error in card_errors(json.loads(body)["content"])]
            self._send(400 if errors else 200, {"errors": errors, "warnings": []})
        elif match := re.fullmatch(r"/(?:api/)?((?:datasets/|models/)?[^/]+/[^/]+?)(?:\.git)?/(\w+)(?:/(.*))?", path):
            name = match[1] if match[1].count("/") == 2 else f"models/{match[1]}"
            self._repository(name, match[2], match[3] or "", query, body)
        else:
            self._send(404)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name.removeprefix('models/')}"}
        if not self.may_write or wanted["organization"] != "user":
            self._send(403, {"error": "You don't have the rights to create a repository there"})
        elif name in self.hub.repositories:
            self._send(409, {"error": "You already created this repository", **answer}, X_Error_Code="RepoExists")
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repositories[name] = Repository(private)
            self._send(200, answer)

    def _repository(self, name: str, verb: str, rest: str, query: dict[str, list[str]], body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.may_write):
            self._send(404 if self.may_write else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        if verb == "info":  # of Git LFS: .git/info/lfs/objects/batch
            wanted = json.loads(body)["objects"]
            href = f"{self.hub.endpoint}/upload/"
            actions = [{**one, "actions": {"upload": {"href": href + one["oid"]}}} for one in wanted]
            self._send(200, {"transfer": "basic", "objects": actions})
            return
        revision, _, inner = rest.partition("/")
        names = repository.names()
        if revision not in names:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return
        files = repository.commits[names[revision]]
        if verb == "preupload":
            asked = json.loads(body)["files"]
            self._send(200, {"files": [{"path": one["path"], "shouldIgnore": False, **_mode(one)} for one in asked]})
        elif verb == "commit":
            self._commit(name, body)
        elif verb == "revision":
            self._send(200, {"id": name.split("/", 1)[1], "sha": f"{names[revision]:040x}", "siblings": [], "tags": []})
        elif verb == "tree":
            self._tree(name, revision, files, int(query.get("cursor", ["0"])[0]))
        elif verb != "resolve" or inner not in files:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        elif (oid := hashlib.sha256(files[inner]).hexdigest()) in self.hub.large:
            self._send(
                302, Location=f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/large/{oid}?{self.hub.signature}"
            )
        else:
            self._file(files[inner])

    def _file(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.hub.fails:
            self.hub.fails -= 1
            self._send(503)
        elif asked is None or not self.hub.ranges:
            self._send(200, content)
        else:
            piece = content[int(asked[1]) : int(asked[2]) + 1]
            self._send(206, piece, Content_Range=f"bytes {asked[1]}-{asked[2]}/{len(content)}")

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[-1])
        for item in map(json.loads, body.splitlines()):
            value = item["value"]
            if item["key"] == "header":
                repository.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert item["key"] == "lfsFile", item
                files[value["path"]] = self.hub.large[value["oid"]]
        repository.commits.append(files)
        oid = f"{len(repository.commits) - 1:040x}"
        self._send(
            200, {"commitUrl": f"{self.hub.endpoint}/{name.removeprefix('models/')}/commit/{oid}", "commitOid": oid}
        )

    def _tree(self, name: str, revision: str, files: dict[str, bytes], start: int) -> None:
        folders = sorted({path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)})
        entries: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        entries += [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(files.items())
        ]
        following = start + PAGE
        url = f"{self.hub.endpoint}/api/{name}/tree/{revision}?recursive=true&cursor={following}"
        headers = {"Link": f'<{url}>; rel="next"'} if following < len(entries) else {}
        self._send(200, entries[start:following], **headers)


def card_errors(text: str) -> list[str]:
    """Say what the Hub would refuse in a card's front matter, of the fields that eopd writes."""
    matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if matter is None:
        return ["no front matter"]
    fields = yaml.safe_load(matter[1])
    licence = fields.get("license")
    sizes = {"n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B"}
    rules = {
        "license": licence in LICENCES and (licence != "other" or "license_name" in fields),
        "tags": all(isinstance(tag, str) for tag in fields.get("tags", [])),
        "size_categories": set(fields.get("size_categories", [])) <= sizes,
        "configs": all({"config_name", "data_files"} <= set(config) for config in fields.get("configs", [])),
        "base_model": re.fullmatch(r"[\w.-]+/[\w.-]+", fields.get("base_model", "a/b")) is not None,
        "model-index": all("name" in model and model["results"] for model in fields.get("model-index", [])),
    }
    return [f"{name} is not valid" for name, holds in rules.items() if not holds]


LICENCES = {"unknown", "other", "apache-2.0", "mit", "cc-by-4.0", "openrail"}
"""Some of the Hub's licences."""


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    """Text goes into the repository, bytes into large storage."""
    text = b"\0" not in base64.b64decode(file["sample"]) and not file["path"].endswith(("/0", ".parquet"))
    return {"uploadMode": "regular" if text else "lfs"}


@contextmanager
def server() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    serving = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serving.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{serving.server_address[1]}"
    Thread(target=serving.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        serving.shutdown()
        serving.server_close()


def environment(hub: Hub, token: str | None = TOKEN) -> dict[str, str]:
    """The variables with which a process uses the server; Xet's own protocol is not spoken here."""
    shown = {"HF_TOKEN": token} if token else {}
    return {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **shown}


def use(hub: Hub, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Point this process at the server: huggingface_hub reads most variables once, when it is imported."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
