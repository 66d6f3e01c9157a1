"""Hidden states from a transformers model over packed rows. Letters: T scored tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from eopd.stages.engines.check import MOST_SEQUENCES
from eopd.stages.engines.hidden import HiddenBatch, OwnLogits
from eopd.stages.engines.sampling import EngineOptions, torch_device
from eopd.stages.job import ModelRef
from eopd.stages.models.backbone import final_hidden, forget_lengths, layout_of
from eopd.stages.models.lm_head import LMHead, lm_head_of, unwrap
from eopd.stages.models.loading import load_model, model_folder
from eopd.stages.models.memory import free_memory, give_back_gpu_memory, weight_bytes
from eopd.stages.models.packing import Sequence, pack
from eopd.stages.models.weight_files import is_quantised

MEMORY_FOR_CHECK = 1.5
"""A checkpoint is loaded once more, for the check, if this many times its weights' size is free."""


class TransformersHiddenEngine:
    """A ``HiddenEngine`` on a model that transformers loads."""

    name = "transformers"
    checked = False

    def __init__(self, ref: ModelRef, *, options: EngineOptions, batch_tokens: int, row_tokens: int) -> None:
        self.version = version("transformers")
        self._device = torch_device(options)
        self._batch_tokens, self._row_tokens = batch_tokens, min(row_tokens, batch_tokens)
        self._model: Any = load_model(ref, self._device)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._ref = replace(ref, dtype=self.dtype)
        self.head: LMHead = lm_head_of(self._model)
        self._layout = layout_of(self._model)
        self.note = self._layout.describe()

    @property
    def is_open(self) -> bool:
        return self._model is not None

    @torch.inference_mode()
    def hidden(self, sequences: SequenceOf[Sequence]) -> Iterator[HiddenBatch]:
        assert self._model is not None, "the engine is closed"
        row_tokens = self._row_tokens
        if len(sequences) > MOST_SEQUENCES:  # so few share a row in any case, for the check of the first batch
            # attention costs tokens * row: a row longer than the longest sequence would only add to it
            row_tokens = min(row_tokens, max(sequence.input_length for sequence in sequences))
        for packed in pack(sequences, row_tokens, self._batch_tokens, self._layout):
            yield HiddenBatch(final_hidden(self._model, packed.to(self._device)), packed.order, packed.lengths)

    @torch.inference_mode()
    def own_logits(self, sequences: SequenceOf[Sequence]) -> OwnLogits:
        reloaded = reloaded_logits(self._ref, sequences)
        if reloaded is not None:
            return reloaded
        logits = [full_model_logits(self._model, sequence, self._device) for sequence in sequences]
        return OwnLogits(logits, "the model in memory; there is no room to load it again")

    def close(self) -> None:
        self._model = None
        del self.head
        give_back_gpu_memory()


@torch.inference_mode()
def reloaded_logits(ref: ModelRef, sequences: SequenceOf[Sequence]) -> OwnLogits | None:
    """Compute logits from the checkpoint, loaded again by transformers on the CPU; nothing is shared with any engine.

    None if the checkpoint is quantised, or does not fit the memory that is free.
    """
    folder = model_folder(ref.path, ref.revision)
    if is_quantised(folder) or weight_bytes(folder) * MEMORY_FOR_CHECK > free_memory():
        return None
    model = load_model(ref, "cpu")
    return OwnLogits([full_model_logits(model, sequence, "cpu") for sequence in sequences], "the checkpoint")


def full_model_logits(model: Any, sequence: Sequence, device: str) -> Tensor:
    """Return logits [T, V] float32 of one unpacked sequence, by the model's own forward pass."""
    ids, count = [*sequence.context_ids, *sequence.response_ids[:-1]], len(sequence.response_ids)
    # of the whole context they could be larger than the model
    kept = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    forget_lengths(unwrap(model))
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **kept).logits
    own: Tensor = logits[0, -count:].float()
    return own
