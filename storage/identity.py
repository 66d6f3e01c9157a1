"""The identity of an artifact: its inputs and settings, and the key that hashes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from eopd.storage import paths
from eopd.storage.errors import StoreError, WrongArtifact
from eopd.storage.files import canonical_json, replace_atomically, sha256_file, sha256_text
from eopd.storage.markers import SCHEMA, refuse_newer_schema
from eopd.storage.untrusted import naming, parse_json, read_plain

KEY_LENGTH = 20
MOST_PARTS = 10**9


@dataclass(frozen=True)
class Identity:
    """The content of an artifact's key.

    ``kind`` is any plain lower-case word (``paths.is_kind``). ``settings`` are the semantic ones only. ``inputs`` maps
    a role to the key of the artifact, or the fingerprint of the external model or file, that plays it. ``coverage``
    (scores only) is keyed apart, so that several coverages stand beside one identity.
    """

    kind: str
    version: int
    parts: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    coverage: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        assert paths.is_kind(self.kind), self.kind
        assert self.parts > 0, f"{self.kind} artifact of {self.parts} parts"

    @cached_property
    def base_key(self) -> str:
        """Key of the identity without its coverage."""
        made_of = {
            "kind": self.kind,
            "version": self.version,
            "parts": self.parts,
            "settings": self.settings,
            "inputs": self.inputs,
        }
        return sha256_text(canonical_json(made_of))[:KEY_LENGTH]

    @cached_property
    def key(self) -> str:
        if self.coverage is None:
            return self.base_key
        return f"{self.base_key}/{sha256_text(canonical_json(self.coverage))[:KEY_LENGTH]}"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "version": self.version,
            "parts": self.parts,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "coverage": None if self.coverage is None else dict(self.coverage),
        }

    @classmethod
    def from_json(cls, content: Any, where: Path) -> Identity:
        """Raises DamagedPart, NewerSchema."""
        refuse_newer_schema(content, where)
        with naming(str(where)):
            _IDENTITY.validate_python(content, strict=True)
        return cls(**{name: content[name] for name in ("kind", "version", "parts", "settings", "inputs", "coverage")})


def parse_identity(text: bytes, kind: str, key: str, where: str) -> Identity:
    """Raises DamagedPart (not JSON), WrongArtifact (it does not hash to its key) or NewerSchema."""
    with naming(where):
        content = parse_json(text)
    identity = Identity.from_json(content, Path(where))
    if (identity.kind, identity.key) != (kind, key):
        raise WrongArtifact(
            f"{where} describes {identity.kind}/{identity.key}, not {kind}/{key}", file=where, artifact=f"{kind}/{key}"
        )
    return identity


def _kind(text: str) -> str:
    if not paths.is_kind(text):
        raise ValueError("a kind is a lower-case word")
    return text


class _IdentityText(TypedDict):
    kind: Annotated[str, AfterValidator(_kind)]
    version: Annotated[int, Field(ge=0, lt=1 << 31)]
    parts: Annotated[int, Field(gt=0, le=MOST_PARTS)]
    settings: dict[str, Any]
    inputs: dict[str, str]
    coverage: dict[str, Any] | None


_IDENTITY = TypeAdapter(_IdentityText)


# -- fingerprints -----------------------------------------------------------------------------------------------------

# Fingerprints of external files and model folders, which keys use in place of paths.
#
# Hashing a large model takes a while, so digests are remembered per path and state (size, times, inode) in a small
# JSON file; the file is a cache and may be deleted at any time.


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


class Digests:
    """SHA-256 of files, remembered between runs in ``memory`` (a JSON file; None: in this process only)."""

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known: dict[str, list[object]] = {}
        if memory is not None:
            with suppress(OSError, ValueError, StoreError):  # a missing or damaged cache is made again
                remembered = parse_json(read_plain(memory))
                self._known = remembered if isinstance(remembered, dict) else {}
        self._grown = False

    @classmethod
    def of_store(cls, store: str | Path) -> Digests:
        """Open the digests that a store remembers."""
        return cls(Path(store) / paths.DIGESTS)

    def of_file(self, path: Path) -> str:
        path = path.resolve()
        state = path.stat()
        stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        digest = sha256_file(path)
        self._known[str(path)] = [*stamp, digest]
        self._grown = True
        return digest

    def of_files(self, root: Path, files: Iterable[Path]) -> str:
        """Return one fingerprint of several files: their names below ``root`` and their bytes."""
        listing = {file.relative_to(root).as_posix(): self.of_file(file) for file in sorted(files)}
        return sha256_text(canonical_json(listing))[:KEY_LENGTH]

    def has_passed(self, check: str, fingerprint: str) -> bool:
        """True if ``note_pass`` was called for this check and fingerprint."""
        return self._known.get(f"{check}: {fingerprint}") == [True]

    def note_pass(self, check: str, fingerprint: str) -> None:
        self._known[f"{check}: {fingerprint}"] = [True]
        self._grown = True

    def save(self) -> None:
        """Save the digests if their folder exists and is writable; never create the folder."""
        if self._memory is not None and self._grown and self._memory.parent.is_dir():
            with suppress(StoreError):
                replace_atomically(self._memory, json.dumps(self._known, indent=0, sort_keys=True))
                self._grown = False


def model_files(folder: Path) -> list[Path]:
    """Return weights and config of a Hugging Face model folder: the files that decide the model's outputs, without the
    tokenizer.

    At least every file that a reader opens (``stages.models.weight_files``).
    """
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.safetensors.index.json"))
    quantisation = folder / "hf_quant_config.json"  # vLLM reads it if config.json does not say
    return [folder / "config.json", *(file for file in (*weights, quantisation) if file.is_file())]


def tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def template_files(folder: Path) -> list[Path]:
    """Return chat templates besides the main one, such as the one for tools."""
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


def code_files(folder: Path) -> list[Path]:
    """Return Python code in a model folder, which decides its outputs if it is trusted (trust_remote_code)."""
    return sorted(folder.glob("*.py"))
