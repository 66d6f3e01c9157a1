"""Stop ids and valid sampling values in the ``generation_config.json`` of a written model."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

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
