"""Fingerprints of external files and model folders, which keys use in place of paths.

Hashing a large model takes a while, so digests are remembered per path and state (size, times, inode) in a small JSON
file; the file is a cache and may be deleted at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from eopd.storage import paths
from eopd.storage.errors import StoreError
from eopd.storage.files import canonical_json, replace_atomically, sha256_file, sha256_text
from eopd.storage.identity import KEY_LENGTH
from eopd.storage.untrusted import parse_json, read_plain

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
