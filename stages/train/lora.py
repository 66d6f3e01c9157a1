"""Low-rank adapters through peft: added before a round, merged into plain weights after it.

The next round's student is the merged model, which transformers and vLLM load as any other, and it gets fresh
adapters: A random, B zero, so that it starts as exactly that model. A round's moments are of adapters that no longer
exist, hence they never carry over; with `train.optimizer.carry_over` the learning-rate schedule alone goes on.
The LM head and the embeddings are never adapted: the sparse head reads one plain weight, which may be tied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from eopd.stages.models.lm_head import unwrap
from eopd.stages.train.settings import LoraSettings
from eopd.storage.errors import InputError

ADAPTER = "default"  # peft's name for the only one
PREFIX = "base_model.model."  # peft's, before every name of the model inside


def add_adapters(model: PreTrainedModel, settings: LoraSettings, seed: int, round_: int) -> Any:
    """Freeze ``model`` and add adapters that depend on nothing but settings, seed and round.

    Raises:
        ValueError: ``target_modules`` match nothing, no linear layer, or the LM head or the embeddings.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    _check_targets(model, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng([seed, round_]).integers(2**62)))
        return get_peft_model(model, config)


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...] | str) -> None:
    if isinstance(targets, str):
        return  # all-linear: peft leaves the LM head out, and embeddings are not linear
    inner = unwrap(model)
    ends = {id(inner.get_output_embeddings()): "the LM head", id(inner.get_input_embeddings()): "the embeddings"}
    names = {name: module for name, module in inner.named_modules() if name}
    for target in targets:
        chosen = [module for name, module in names.items() if name == target or name.endswith(f".{target}")]
        if not chosen:
            known = sorted({name.rsplit(".", 1)[-1] for name, module in names.items() if _is_linear(module)})
            raise InputError(
                f"train.lora.target_modules names {target!r}, which {type(inner).__name__} does not have; its linear "
                f"layers: {', '.join(known)}",
                setting="train.lora.target_modules",
            )
        for module in chosen:
            what = ends.get(id(module), None if _is_linear(module) else f"a {type(module).__name__}")
            if what is not None:
                raise InputError(
                    f"train.lora.target_modules names {target!r}, {what} of {type(inner).__name__}, which is never "
                    "adapted: only linear layers below the LM head are",
                    setting="train.lora.target_modules",
                    remedy="Leave it out, or set train.lora=null to train all weights",
                )


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def merged_weights(adapted: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return W + alpha / rank * B A for every adapted layer, under the names of the model without adapters.

    Args:
        weights: every parameter of ``adapted``, whole and on the CPU.
    """
    merged = dict(weights)
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = (merged.pop(f"{name}.lora_{letter}.{ADAPTER}.weight").float() for letter in "AB")
        scaling: Any = module.scaling
        change = scaling[ADAPTER] * (b @ a)
        base = merged[f"{name}.base_layer.weight"]
        merged[f"{name}.base_layer.weight"] = (base.float() + (change.T if module.fan_in_fan_out else change)).to(
            base.dtype
        )
    return {name.removeprefix(PREFIX).replace(".base_layer.", "."): value for name, value in merged.items()}


def save_adapter(adapted: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Save the adapter alone, as peft reads it; it belongs to the weights that the round began with.

    ``save_pretrained`` is not used because it records the student's path and a set in hash order, and the same round
    must leave the same bytes anywhere.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir()
    tensors = get_peft_model_state_dict(adapted, state_dict=dict(weights), adapter_name=ADAPTER)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = {**adapted.peft_config[ADAPTER].to_dict(), "base_model_name_or_path": None, "inference_mode": True}
    text = json.dumps(config, indent=1, sort_keys=True, default=sorted)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
