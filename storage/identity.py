"""The identity of an artifact: its inputs and settings, and the key that hashes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from eopd.storage import paths
from eopd.storage.errors import WrongArtifact
from eopd.storage.files import canonical_json, sha256_text
from eopd.storage.markers import SCHEMA, refuse_newer_schema
from eopd.storage.untrusted import naming, parse_json

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
