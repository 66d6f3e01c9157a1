"""Loading of models and tokenizers: safetensors only, remote code off by default, errors with remedies."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from eopd.stages.models.model_config import read_config
from eopd.stages.models.weight_files import IGNORED_TENSORS, StoredTensor, is_quantised, listed, read_tensors
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eopd.stages.job import ModelRef

MOST_OF_A_MESSAGE = 300
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def looks_like_path(path: str) -> bool:
    """True if ``path`` is meant as a folder: a hub id is ``name`` or ``owner/name`` without a leading dot or slash."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()


def model_folder(path: str, revision: str | None = None) -> Path:
    """Return the local folder of a model: the folder itself, or a hub id's snapshot (downloaded if the hub is allowed).

    Raises:
        ValueError: no such folder, or the hub id is neither cached nor reachable; naming it and what to do.
    """
    if looks_like_path(path):
        folder = Path(path).expanduser()
        if folder.is_file() and folder.suffix.lower() == ".gguf":
            remedy = f"prepare it with `eopd prepare {path} FOLDER`, and name the folder"
            raise InputError(f"{path} is a GGUF file", file=path, remedy=remedy)
        if not folder.is_dir():
            remedy = "check the path, or give a hub id (owner/name)"
            raise InputError(f"model folder {path!r} does not exist", file=path, remedy=remedy)
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=_offline()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {path!r} (revision {revision or 'main'}) is neither a local folder nor to be had from the hub: "
            f"{_first_line(error)}",
            remedy=f"Give a folder, fetch it once with `hf download {path}`, or unset HF_HUB_OFFLINE.",
        ) from error


def load_model(ref: ModelRef, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal model in evaluation mode on ``device``, in ``ref.dtype``, with every weight from its folder.

    Raises:
        ValueError: a missing folder or hub id, an unknown dtype, weights that ``check_weights`` refuses.
    """
    if ref.dtype != "auto" and ref.dtype not in DTYPES:
        raise InputError(f"{ref.path}: dtype {ref.dtype!r} is not one of auto, {', '.join(DTYPES)}", setting="dtype")
    folder = _checked_folder(ref)
    return _load(ref, folder, "auto" if ref.dtype == "auto" else DTYPES[ref.dtype]).to(device).eval()


def check_weights(ref: ModelRef) -> None:
    """Compare the headers of a model's weight files with the architecture in its config; no weights are read.

    For engines that load the weights themselves, and before work.

    Raises:
        ValueError: the files are refused by ``weight_files``, or a tensor is missing, has another shape or belongs to
            no layer of the model; names the folder and the tensors.
    """
    folder = _checked_folder(ref)
    if is_quantised(folder):
        _check_quantised(ref, folder)
    else:
        _load(ref, folder, "auto", device_map="meta")


def _checked_folder(ref: ModelRef) -> Path:
    folder = model_folder(ref.path, ref.revision)
    if not (folder / "config.json").is_file():
        problem = f"{ref.path}: {folder / 'config.json'} is missing, so this is no Hugging Face model folder"
        raise InputError(problem, file=folder / "config.json")
    read_tensors(folder)
    code = read_config(folder).get("auto_map") if ref.trust_remote_code else None
    elsewhere = [name for name in code.values() if "--" in str(name)] if isinstance(code, dict) else []
    if elsewhere:
        raise InputError(
            f"auto_map names code of another repository ({elsewhere[0]}), which no key of a run covers",
            file=folder / "config.json",
            remedy="Copy that code into the folder and name it without the part before `--`.",
        )
    return folder


def _config(ref: ModelRef, folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=ref.trust_remote_code, local_files_only=True)


def _load(ref: ModelRef, folder: Path, dtype: torch.dtype | str, device_map: str | None = None) -> PreTrainedModel:
    """Load with transformers and refuse what its loading info reports."""
    config = _config(ref, folder)
    # of transformers' attention implementations for any device, only "eager" caps attention logits (Gemma 2)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    with no_progress_bars(), _no_loading_report():
        try:
            model, info = _auto_class(config).from_pretrained(
                folder,
                attn_implementation="eager" if capped else None,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                trust_remote_code=ref.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the loading info, by name
            )
        except RuntimeError as error:
            if "automatic conversion of the weights" not in str(error):
                raise
            wrong = _uneven_experts(read_tensors(folder)) or ["its experts cannot be put together"]
            raise _refusal(folder, wrong) from error
    _refuse_incomplete(folder, model, info)
    return cast("PreTrainedModel", model)


def _auto_class(config: Any) -> Any:
    """Return the class that loads all of a folder: for a multimodal model that is more than its text tower."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return AutoModelForImageTextToText if multimodal in (config.architectures or ()) else AutoModelForCausalLM


def _refuse_incomplete(folder: Path, model: Any, info: Mapping[str, Any]) -> None:
    tensors = read_tensors(folder)
    wrong = [f"{stored} is missing" for name in sorted(info["missing_keys"]) for stored in _stored_names(model, name)]
    if info["mismatched_keys"]:
        wrong += _uneven_experts(tensors) or [
            f"{' with '.join(_stored_names(model, name))} has shape {tuple(stored)}, the model needs {tuple(needed)}"
            for name, stored, needed in sorted(info["mismatched_keys"])
        ]
    text = model.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 0)  # then those for multi-token prediction
    further = range(layers, layers + (getattr(text, "num_nextn_predict_layers", None) or 0))
    ignored = re.compile("|".join([IGNORED_TENSORS.pattern, *(rf"(^|\.)layers\.{number}\." for number in further)]))
    unexpected = sorted(name for name in info["unexpected_keys"] if not ignored.search(name))
    wrong += [f"{name} belongs to no layer of a {type(model).__name__}" for name in unexpected]
    wrong += [str(message) for message in info["error_msgs"]]
    # transformers unties what differs, vLLM does not
    for tied, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if tied in tensors and source in tensors and not _equal(tied, source, tensors):
            wrong.append(f"{tied} differs from {source}, although config.json ties them")
    if wrong:
        raise _refusal(folder, wrong)


def _stored_names(model: Any, name: str) -> list[str]:
    """Return names in weight files of tensors that transformers merges or renames into one parameter."""
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(model, {name: model.state_dict()[name].to("meta")}))


def _refusal(folder: Path, wrong: list[str]) -> InputError:
    return InputError(
        f"{folder}: the weights do not fit the architecture in config.json: {listed(wrong, '; ')}",
        file=folder,
        remedy="Such a model would work with random weights: download or save it again.",
    )


def _uneven_experts(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return experts' tensors that are missing, or whose shape differs from most experts'.

    transformers puts the experts of a layer together and can only name the result.
    """
    names = [re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name) for name in tensors]
    blocks, numbers, ends = ({match[group] for match in names if match} for group in (1, 2, 3))
    usual = {
        end: Counter(tensors[match[0]].shape for match in names if match and match[3] == end).most_common(1)[0][0]
        for end in ends
    }
    wrong = []
    for block, number, end in product(sorted(blocks), sorted(numbers, key=int), sorted(ends)):
        tensor = tensors.get(f"{block}.{number}{end}")
        if tensor is None:
            wrong.append(f"{block}.{number}{end} is missing")
        elif tensor.shape != usual[end]:
            wrong.append(f"{block}.{number}{end} has shape {tensor.shape}, other experts' have {usual[end]}")
    return wrong


def _equal(first: str, second: str, tensors: Mapping[str, StoredTensor]) -> bool:
    from safetensors import safe_open

    values = []
    for name in (first, second):
        with safe_open(tensors[name].file, framework="pt") as file:
            values.append(file.get_tensor(name))
    return torch.equal(*values)


def _check_quantised(ref: ModelRef, folder: Path) -> None:
    """Quantised layers have tensors of other names and shapes: each must have some, and vectors must fit."""
    from transformers.core_model_loading import revert_weight_conversion

    config = _config(ref, folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, trust_remote_code=ref.trust_remote_code)
    tied = getattr(model, "all_tied_weights_keys", {})
    needed = revert_weight_conversion(model, {n: t for n, t in model.state_dict().items() if n not in tied})
    stored = read_tensors(folder)
    wrong = []
    for name, tensor in needed.items():
        layer = name.removesuffix("weight")
        if not any(other.startswith(layer) for other in stored):
            wrong.append(f"{name} is missing")
        elif tensor.ndim == 1 and name in stored and stored[name].shape != tuple(tensor.shape):
            wrong.append(f"{name} has shape {stored[name].shape}, the model needs {tuple(tensor.shape)}")
    if wrong:
        raise _refusal(folder, wrong)


@contextmanager
def _no_loading_report() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected tensors: an error names them."""
    report = lambda record: "LOAD REPORT" not in record.getMessage()  # noqa: E731
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(report)
    try:
        yield
    finally:
        logger.removeFilter(report)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable transformers' progress bars, since loading is part of longer work with a bar of its own."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def load_tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of ``ref`` (of ``ref.tokenizer`` if that names another place).

    Raises:
        ValueError: a missing folder or hub id, or a folder without ``tokenizer.json``.
    """
    return load_tokenizer_at(ref.tokenizer_path, ref.tokenizer_revision, trust_remote_code=ref.trust_remote_code)


def load_tokenizer_at(
    path: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Like ``load_tokenizer``, by path."""
    from transformers import AutoTokenizer

    folder = model_folder(path, revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        problem = f"{path}: no tokenizer could be read from {folder}: {_first_line(error)}"
        raise InputError(problem, file=folder) from error
    if not tokenizer.is_fast:
        problem = f"{path}: only fast tokenizers (tokenizer.json) are supported, got {type(tokenizer).__name__}"
        raise InputError(problem, file=folder)
    return tokenizer


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refusals(models: Mapping[str, Mapping[str, Any]]) -> dict[str, InputError]:
    """Map roles to errors of models that ``check_weights`` refuses; ``models``: role -> fields of a ModelRef."""
    from eopd.stages.job import ModelRef

    refused = {}
    for role, fields in models.items():
        try:
            check_weights(ModelRef(**fields))
        except (ImportError, MemoryError):
            raise  # tells nothing about the model
        except Exception as error:  # what transformers raises where config.json describes no model
            refused[role] = _refusal_in_a_line(Path(fields["path"]), error)
    return refused


def _refusal_in_a_line(folder: Path, error: Exception) -> InputError:
    """Return an error of one line; a message of transformers, which may name no file, is about the config."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return InputError.of(error)
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, OSError)):
        text = f"{type(error).__name__}: {text}"
    text = text if len(text) <= MOST_OF_A_MESSAGE else f"{text[: MOST_OF_A_MESSAGE - 3]}..."
    return InputError(text, file=folder / "config.json")


if __name__ == "__main__":
    problems = {role: error.fields() for role, error in refusals(json.loads(sys.argv[1])).items()}
    sys.stdout.write("\n" + json.dumps(problems) + "\n")
