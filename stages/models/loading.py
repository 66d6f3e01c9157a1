"""Loading models and tokenizers: safetensors only, remote code off unless asked for, errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eopd.stages.job import ModelRef

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def looks_like_path(path: str) -> bool:
    """Whether ``path`` is meant as a folder: a hub id is ``name`` or ``owner/name`` without a leading dot or slash."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()


def model_folder(path: str, revision: str | None = None) -> Path:
    """Local folder of a model's files: the folder itself, or a hub id's snapshot (fetched where the hub is allowed).

    Raises:
        ValueError: no such folder, or the hub id is neither cached nor reachable; naming it and what to do.
    """
    if looks_like_path(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"model folder {path!r} does not exist: check the path, or give a hub id (owner/name)")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=_offline()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {path!r} (revision {revision or 'main'}) is neither a local folder nor to be had from the hub: "
            f"{_first_line(error)}. Give a folder, fetch it once with `hf download {path}`, or unset HF_HUB_OFFLINE."
        ) from error


def load_model(ref: ModelRef, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The causal model in evaluation mode on ``device``, in ``ref.dtype``; safetensors files only.

    Raises:
        ValueError: a missing folder or hub id, an unknown dtype, no safetensors file in the folder.
    """
    from transformers import AutoConfig

    if ref.dtype != "auto" and ref.dtype not in DTYPES:
        raise ValueError(f"{ref.path}: dtype {ref.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    folder = model_folder(ref.path, ref.revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{ref.path}: {folder / 'config.json'} is missing, so this is no Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{ref.path}: no *.safetensors file in {folder}; other weight formats can run code and are refused: "
            "save the model once with model.save_pretrained(...)"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=ref.trust_remote_code, local_files_only=True)
    # of transformers' attention implementations for any device, only "eager" caps attention logits (Gemma 2)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    with no_progress_bars():
        model: PreTrainedModel = _auto_class(config).from_pretrained(
            folder,
            attn_implementation="eager" if capped else None,
            dtype="auto" if ref.dtype == "auto" else DTYPES[ref.dtype],
            use_safetensors=True,
            trust_remote_code=ref.trust_remote_code,
            local_files_only=True,
        )
    return model.to(device).eval()


def _auto_class(config: Any) -> Any:
    """The class that loads all of a folder: of a multimodal model that is more than its text tower."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    return AutoModelForImageTextToText if multimodal in (config.architectures or ()) else AutoModelForCausalLM


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Loading weights is part of longer work that has a bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The fast tokenizer of ``ref`` (``ref.tokenizer`` where it names another place).

    Raises:
        ValueError: a missing folder or hub id, or a folder without ``tokenizer.json``.
    """
    return load_tokenizer_at(ref.tokenizer_path, ref.tokenizer_revision, trust_remote_code=ref.trust_remote_code)


def load_tokenizer_at(
    path: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """As ``load_tokenizer``, by path."""
    from transformers import AutoTokenizer

    folder = model_folder(path, revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no tokenizer could be read from {folder}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: only fast tokenizers (tokenizer.json) are supported, got {type(tokenizer).__name__}")
    return tokenizer


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
