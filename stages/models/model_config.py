"""Facts from a model folder's config, without loading anything. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.storage.errors import InputError

WHO_SAVED_IT = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of config.json that do not affect a loaded model's shape; precision is compared separately."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``. Raises ValueError if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path} is missing, so {folder} is no Hugging Face model folder", file=path)
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def resolve_dtype(folder: Path, dtype: str) -> str:
    """Resolve ``auto`` to the dtype the weights were saved in: vLLM's own ``auto`` would turn float32 into bfloat16."""
    if dtype != "auto":
        return dtype
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def same_shape(folder: Path) -> str:
    """Return a hash of the model in config.json, equal for folders whose weights can replace each other."""
    config = {name: value for name, value in read_config(folder).items() if name not in WHO_SAVED_IT}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def longest_readable(folder: Path) -> int | None:
    """Return the most tokens the model was made for, from its config; None if the config does not say."""
    config = read_config(folder)
    config = config.get("text_config") or config  # of a multimodal model
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return None if longest is None else int(longest)


STATIC_ROPES = ("default", "linear", "yarn", "llama3", "proportional", "mrope")
"""Position scalings that are the same for every length of a call."""


@dataclass(frozen=True)
class ScaledPositions:
    """A position scaling that may depend on the longest sequence of a call."""

    rope_type: str
    boundary: int | None  # calls of at most this many tokens are scaled alike
    alike_beyond: bool  # whether longer calls are, too

    @property
    def depends_on_length(self) -> bool:
        """True if the scaling is known to depend on the longest sequence of a call; otherwise it must be measured."""
        return self.rope_type == "longrope" or not self.alike_beyond


def scaled_positions(config: Mapping[str, Any]) -> ScaledPositions | None:
    """Return the scaling of a config (``config.json``, or ``to_dict()`` of a loaded one) unless it is known to be
    static.

    longrope has one set of factors up to the original length and another beyond it. dynamic rescales with every
    length beyond ``max_position_embeddings``.
    """
    text = config.get("text_config") or config
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for rope in [scaling, *(part for part in scaling.values() if isinstance(part, Mapping))]:
        rope_type = rope.get("rope_type", rope.get("type"))
        original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if rope_type == "yarn" and "phi3" in str(text.get("model_type")):
            rope_type = "longrope"  # what old Phi-3 configs mean by it
        if rope_type in ("longrope", "su"):
            return ScaledPositions("longrope", original or text.get("max_position_embeddings"), alike_beyond=True)
        if rope_type is not None and "dynamic" in rope_type:
            return ScaledPositions(rope_type, text.get("max_position_embeddings"), alike_beyond=False)
        if rope_type is not None and rope_type not in STATIC_ROPES:
            return ScaledPositions(rope_type, original, alike_beyond=True)
    return None


def length_boundary(folder: Path) -> int | None:
    """Return the tokens beyond which the positions of the model in ``folder`` scale otherwise; None without such a
    limit."""
    scaled = scaled_positions(read_config(folder))
    return scaled.boundary if scaled is not None and scaled.depends_on_length else None


def refuse_crossing(folder: Path, name: str, length: int, reason: str, remedy: str = "") -> None:
    """Raise ValueError if sequences of up to ``length`` tokens cross the ``length_boundary`` of a model."""
    boundary = length_boundary(folder)
    if boundary is not None and length > boundary:
        problem = f"{name}: its positions scale otherwise beyond {boundary} tokens, and {length} may be read: {reason}"
        raise InputError(problem, file=folder / "config.json", remedy=remedy)


def refuse_dynamic_positions(folder: Path, name: str) -> None:
    """Raise ValueError for a model that vLLM serves with other positions than transformers at every length."""
    scaled = scaled_positions(read_config(folder))
    if scaled is not None and scaled.depends_on_length and not scaled.alike_beyond:
        raise InputError(
            f"{name}: rope_type {scaled.rope_type!r} in its config is refused with engine vllm, which scales positions "
            "once for all lengths where transformers scales them by length",
            file=folder / "config.json",
            remedy="Set engine: transformers",
        )


def vocabulary_size(folder: Path) -> int:
    """Ids of a model by its config; 0 if the config does not say."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)
