"""Reading the LM head from a model folder, without loading the model. Letters: V vocabulary, D hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eopd.stages.models.lm_head import LMHead, head_traits
from eopd.stages.models.weight_files import StoredTensor, read_tensors

_UNTIED = ("lm_head", "output_layer", "embed_out")
_EMBEDDINGS = ("model.embed_tokens", "embed_tokens", "transformer.wte", "wte", "gpt_neox.embed_in")


def stored_lm_head(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> LMHead:
    """Return the LM head as the model would use it in ``dtype`` (such as bfloat16).

    Raises:
        ValueError: an unknown architecture, weights that are missing or quantised.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    architecture = (config.architectures or ["none named in config.json"])[0]
    traits = head_traits(architecture, str(folder))
    text = config.get_text_config()
    names = _EMBEDDINGS if text.tie_word_embeddings else _UNTIED
    stored = read_tensors(folder)
    for name in names:
        if f"{name}.weight" in stored:
            weight = _read(f"{name}.weight", stored)
            bias = _read(f"{name}.bias", stored) if name in _UNTIED and f"{name}.bias" in stored else None
            break
    else:
        raise ValueError(
            f"{folder}: no LM head among its tensors (looked for {', '.join(f'{name}.weight' for name in names)}; "
            f"tie_word_embeddings is {text.tie_word_embeddings}). Set score.engine: transformers."
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(
            f"{folder}: its LM head is stored as {weight.dtype}, quantised, and is refused: use a checkpoint that "
            "leaves the LM head out of quantisation"
        )
    precision = getattr(torch, dtype)
    bias = None if bias is None else bias.to(precision)
    return LMHead(weight.to(precision), bias, traits.scale(text), traits.softcap(text), text.vocab_size)


def _read(name: str, tensors: Mapping[str, StoredTensor]) -> Tensor:
    from safetensors import safe_open

    with safe_open(tensors[name].file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
