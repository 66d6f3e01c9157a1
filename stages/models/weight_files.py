"""The weight files of a model folder: which ones readers open, and the contents of their headers. Needs no torch.

transformers reads ``model.safetensors`` if it is there, else the files that the index names; vLLM reads every
``*.safetensors`` file that the index names, or all of them if there is no index. A folder is accepted if both rules
give the same files:

- with ``model.safetensors.index.json``: the files that it names, which must be plain ``*.safetensors`` files beside it
  and hold exactly the tensors that it lists. Neither ``model.safetensors`` nor a shard may stand beside them unnamed.
- without an index: ``model.safetensors``, the only ``*.safetensors`` file of the folder.

No reader opens subfolders, pickled weights, or (with an index) files such as ``consolidated.safetensors``; they are
ignored. ``adapter_config.json``, ``modules.json`` and ``transformers_weights`` in ``config.json`` make one of the
readers open further weights, and are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.storage.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = "model*.safetensors"
IGNORED_TENSORS = re.compile(
    r"(^|\.)(rotary_emb\.(original_)?inv_freq|attn\.(masked_)?bias|position_ids)$|(^|\.)mtp[._]"
)
"""Stored tensors that no reader needs: buffers of older versions of transformers, heads for multi-token prediction."""
REFUSED_FILES = {
    "adapter_config.json": (
        "transformers would add that adapter to the model, vLLM would not",
        "merge it into the weights, or move it out of the folder",
    ),
    "modules.json": (
        "vLLM would add the layers that it names to the model, transformers would not",
        "use the original causal language model",
    ),
}
"""Files of a model folder, what is wrong with each, and the remedy."""
MOST_NAMED = 8
AGAIN = "download or save the model again"
CONVERT = "Convert the checkpoint with model.save_pretrained(folder)."


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """List the files that hold the model's weights.

    Raises:
        ValueError: none, or files of which two readers would read different ones; names the folder and the file.
    """
    _refuse_further_weights(folder)
    stored = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    index = folder / INDEX
    if index.exists() or index.is_symlink():
        named = set(_read_index(index).values())
        leftover = [path.name for path in sorted(folder.glob(SHARDS)) if path.name not in named]
        if leftover:
            raise InputError(
                f"{folder}: {listed(leftover)} stands beside {INDEX}, which does not name it, so two readers could "
                "read different weights",
                file=folder / leftover[0],
                remedy="Delete whichever is out of date.",
            )
        if SINGLE in named and len(named) > 1:
            problem = f"{INDEX} names {SINGLE} and further files, but transformers reads {SINGLE} alone"
            raise InputError(problem, file=index, remedy="Save the model again.")
        return [_regular(folder / name, f"{INDEX} names it") for name in sorted(named)]
    if not stored:
        problem = f"{folder} has no *.safetensors file; pickled weights can run code and are not read"
        raise InputError(problem, file=folder, remedy=CONVERT)
    if stored != [SINGLE]:
        raise InputError(
            f"{folder} holds {listed(stored)} without {INDEX}: transformers would read {SINGLE} alone, vLLM every file",
            file=folder,
            remedy=f"Leave {SINGLE} alone in the folder, or add the index of the shards.",
        )
    return [_regular(folder / SINGLE, "it holds the weights")]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every stored tensor, from the headers of the weight files.

    Raises:
        ValueError: as ``weight_files``; a file that is no safetensors file; a tensor in two files; an index that does
            not list what the files hold.
        OSError: a file cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, shape in _read_header(path).items():
            if name in tensors:
                raise InputError(
                    f"{folder}: tensor {name} is in {tensors[name].file.name} and in {path.name}",
                    file=path,
                    remedy="save the model again",
                )
            tensors[name] = StoredTensor(path, shape)
    if (folder / INDEX).exists():
        index = {(name, file) for name, file in _read_index(folder / INDEX).items()}
        headers = {(name, tensor.file.name) for name, tensor in tensors.items()}
        wrong = sorted({name for name, _ in index ^ headers if not IGNORED_TENSORS.search(name)})
        if wrong:
            problem = f"{INDEX} and the files that it names disagree on {listed(wrong)}"
            raise InputError(problem, file=folder / INDEX, remedy=AGAIN)
    return tensors


def is_quantised(folder: Path) -> bool:
    return "quantization_config" in _read_object(folder / "config.json") or (folder / "hf_quant_config.json").exists()


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Format the first items of a list, and how many more there are."""
    more = f" and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
    return separator.join(items[:MOST_NAMED]) + more


def _refuse_further_weights(folder: Path) -> None:
    for name, (problem, remedy) in REFUSED_FILES.items():
        if (folder / name).exists():
            raise InputError(problem, file=folder / name, remedy=remedy)
    if _read_object(folder / "config.json").get("transformers_weights") is not None:
        raise InputError(
            "transformers_weights redirects transformers to another file, which vLLM does not follow",
            file=folder / "config.json",
            remedy="Remove the key and name the weights as usual.",
        )


def _read_index(index: Path) -> dict[str, str]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("it has no weight_map of tensors to files", file=index, remedy=AGAIN)
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not name.startswith(".")
        if not plain or Path(name).name != name or "\\" in name or "\0" in name:
            raise InputError(
                f"tensor {tensor} is said to be in {name!r}; an index may name *.safetensors files beside it and "
                "nothing else",
                file=index,
                remedy=CONVERT,
            )
    return weight_map


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} is no regular file", file=path, remedy=AGAIN)
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error})", file=path, remedy=AGAIN) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object", file=path, remedy=AGAIN)
    return content


def _regular(path: Path, why: str) -> Path:
    if not path.is_file():
        state = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"{path} {state}, although {why}", file=path, remedy=AGAIN)
    return path


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # safetensors says of a file that may not be read that it does not exist
        pass
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file ({error})", file=path, remedy=AGAIN) from error
