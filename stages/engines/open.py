"""Open an engine by its kind; the protocols are in ``sampling`` and ``hidden``."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eopd.stages.engines.sampling import EngineKind, EngineOptions, SamplingEngine
from eopd.stages.job import ModelRef

if TYPE_CHECKING:
    from eopd.stages.engines.hidden import HiddenEngine


def resolve_engine(kind: EngineKind) -> Literal["vllm", "transformers"]:
    """Resolve ``auto`` to vLLM if it is installed.

    Raises:
        ValueError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise ValueError(
            "engine: vllm is asked for, but vLLM is not installed. Install it or set engine: transformers."
        )
    if kind == "auto":
        return "vllm" if installed else "transformers"
    return kind


def open_sampling_engine(
    kind: EngineKind, ref: ModelRef, *, max_model_len: int, log_dir: Path, options: EngineOptions | None = None
) -> SamplingEngine:
    """Load ``ref`` for sampling.

    Args:
        max_model_len: longest prompt plus response, tokens (``options.max_model_len`` overrides it).
        log_dir: where the engine's own log goes.

    Raises:
        ValueError: the engine is not installed, or it cannot serve this model; the message says why.
    """
    options = options or EngineOptions()
    length = options.max_model_len or max_model_len
    if resolve_engine(kind) == "vllm":
        from eopd.stages.engines.sampling_vllm import VLLMSamplingEngine

        return VLLMSamplingEngine(ref, max_model_len=length, log_dir=log_dir, options=options)
    from eopd.stages.engines.sampling_transformers import TransformersSamplingEngine

    return TransformersSamplingEngine(ref, max_model_len=length, options=options)


def open_hidden_engine(
    kind: EngineKind,
    ref: ModelRef,
    *,
    longest: int,
    log_dir: Path,
    options: EngineOptions | None = None,
    dtype: str = "auto",
    batch_tokens: int = 16384,
    row_tokens: int = 2048,
) -> HiddenEngine:
    """Load a model for reading. It works on as many threads as torch has at the time.

    Args:
        kind: auto is vLLM where it is installed and known to read this architecture right.
        longest: tokens of the longest sequence it will read.
        dtype: of the forward pass; auto: that of ``ref``.
        batch_tokens: tokens of one forward pass, about.
        row_tokens: tokens of a packed row (transformers only).

    Raises:
        ValueError: the engine is not installed, or it cannot serve this model; the message says why.
    """
    options = options or EngineOptions()
    if dtype != "auto":
        ref = replace(ref, dtype=dtype)
    if resolve_engine(kind) == "vllm":
        from eopd.stages.engines.hidden_vllm import VLLMHiddenEngine, is_known
        from eopd.stages.models.loading import model_folder

        if kind == "vllm" or is_known(model_folder(ref.path, ref.revision), longest):
            return VLLMHiddenEngine(ref, longest=longest, log_dir=log_dir, options=options, batch_tokens=batch_tokens)
    from eopd.stages.engines.hidden_transformers import TransformersHiddenEngine

    return TransformersHiddenEngine(ref, options=options, batch_tokens=batch_tokens, row_tokens=row_tokens)
