"""What a model folder's config says, without loading anything. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

WHO_SAVED_IT = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of config.json that change nothing of a loaded model's shape; precision is told apart by itself."""


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``. Raises ValueError where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing, so {folder} is no Hugging Face model folder")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def resolve_dtype(folder: Path, dtype: str) -> str:
    """``auto`` is the dtype the weights were saved in: vLLM's own ``auto`` would turn float32 into bfloat16."""
    if dtype != "auto":
        return dtype
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def same_shape(folder: Path) -> str:
    """Equal for folders whose weights can take each other's place: SHA-256 (hex) of the model in config.json."""
    config = {name: value for name, value in read_config(folder).items() if name not in WHO_SAVED_IT}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def longest_readable(folder: Path) -> int | None:
    """Most tokens the model was made for, from its config; None where it does not say."""
    config = read_config(folder)
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return None if longest is None else int(longest)
