"""Facts from a model folder's config, without loading anything. Needs no torch."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

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


def refuse_crossing(
    folder: Path, name: str, length: int, reason: str, remedy: str = "", setting: str | None = None
) -> None:
    """Raise ValueError if sequences of up to ``length`` tokens cross the ``length_boundary`` of a model."""
    boundary = length_boundary(folder)
    if boundary is not None and length > boundary:
        problem = f"{name}: its positions scale otherwise beyond {boundary} tokens, and {length} may be read: {reason}"
        raise InputError(problem, setting=setting, file=folder / "config.json", remedy=remedy)


def refuse_dynamic_positions(folder: Path, name: str) -> None:
    """Raise ValueError for a model that vLLM serves with other positions than transformers at every length."""
    scaled = scaled_positions(read_config(folder))
    if scaled is not None and scaled.depends_on_length and not scaled.alike_beyond:
        raise InputError(
            f"{name}: rope_type {scaled.rope_type!r} in its config is refused with engine vllm, which scales positions "
            "once for all lengths where transformers scales them by length",
            setting="engine",
            file=folder / "config.json",
            remedy="Set engine: transformers",
        )


def vocabulary_size(folder: Path) -> int:
    """Ids of a model by its config; 0 if the config does not say."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)


# -- generation config ------------------------------------------------------------------------------------------------

# Stop ids and valid sampling values in the ``generation_config.json`` of a written model.


GENERATION_FILE = "generation_config.json"
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0, "top_h": None}
"""Settings that only sampling reads, with the values that mean nothing without it."""


def with_stop_ids(config: GenerationConfig, stop_ids: Sequence[int]) -> tuple[GenerationConfig, list[str]]:
    """Return a copy of ``config`` that ends at ``stop_ids`` and can be saved, and a sentence for each change.

    transformers loads contradictory files, such as Llama 2's ``temperature`` without ``do_sample``, but refuses to save
    them. Sampling values mean that the model is to be sampled from, so ``do_sample`` becomes true (vLLM samples with
    them in any case). Whatever is refused after that is left out.
    """
    exported, changes = _saveable(config)
    own = _ids(exported.eos_token_id)
    if stop_ids and set(own) != set(stop_ids):
        exported.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
        changes.append(f"eos_token_id is {list(stop_ids)}, where this run's responses end (the student's own: {own})")
    return exported, changes


def stop_ids_in(folder: Path) -> list[int]:
    """Return the ids at which transformers and vLLM end a response of the model in ``folder``; empty if it names
    none."""
    path = folder / GENERATION_FILE
    return _ids(_read(path).get("eos_token_id")) if path.exists() else []


def write_stop_ids(folder: Path, stop_ids: Sequence[int]) -> None:
    """Set the stop ids of the model in ``folder``; its other generation settings stay as they are."""
    path = folder / GENERATION_FILE
    if path.exists():
        values = _read(path)
    else:  # from now on nobody looks into config.json for these
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    values["eos_token_id"] = list(stop_ids)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        problem = f"{path} must hold a JSON object, found a {type(values).__name__}"
        raise InputError(problem, file=path, remedy="save the model again")
    return values


def _ids(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(number) for number in value]


def _saveable(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    if _is_valid(config):
        return copy.deepcopy(config), []
    changes = []
    source = copy.deepcopy(config)
    sampling = [name for name, neutral in NEUTRAL.items() if getattr(source, name) not in (None, neutral)]
    if source.do_sample is not True and sampling and source.temperature != 0:  # 0 is how some say greedy
        source.do_sample = True
        changes.append(f"do_sample is true, because it sets {', '.join(sampling)}")
    waiting = {name: value for name, value in vars(source).items() if value is not None and name[0] != "_"}
    exported = type(config)()
    while accepted := [name for name, value in waiting.items() if _accepts(exported, name, value)]:
        for name in accepted:  # a value may be valid only beside another one
            del waiting[name]
    changes += [f"{name} ({value}) is left out: transformers refuses it" for name, value in sorted(waiting.items())]
    return exported, changes


def _accepts(config: GenerationConfig, name: str, value: object) -> bool:
    """Set ``name`` if the result is valid."""
    before = getattr(config, name, None)
    setattr(config, name, value)
    if _is_valid(config):
        return True
    setattr(config, name, before)
    return False


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
