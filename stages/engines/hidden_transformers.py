"""Hidden states from a transformers model over packed rows. Letters: T scored tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from eopd.stages.engines.hidden import HiddenBatch
from eopd.stages.engines.sampling import EngineOptions, torch_device
from eopd.stages.job import ModelRef
from eopd.stages.models.backbone import final_hidden, forget_lengths, layout_of
from eopd.stages.models.lm_head import LMHead, lm_head_of, unwrap
from eopd.stages.models.loading import load_model
from eopd.stages.models.memory import give_back_gpu_memory
from eopd.stages.models.packing import Sequence, pack


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
        self.head: LMHead = lm_head_of(self._model)
        self._layout = layout_of(self._model)
        self.note = self._layout.describe()

    @property
    def is_open(self) -> bool:
        return self._model is not None

    @torch.inference_mode()
    def hidden(self, sequences: SequenceOf[Sequence]) -> Iterator[HiddenBatch]:
        assert self._model is not None, "the engine is closed"
        for packed in pack(sequences, self._row_tokens, self._batch_tokens, self._layout):
            yield HiddenBatch(final_hidden(self._model, packed.to(self._device)), packed.order, packed.lengths)

    @torch.inference_mode()
    def own_logits(self, sequence: Sequence) -> Tensor:
        return full_model_logits(self._model, sequence, self._device)

    def close(self) -> None:
        self._model = None
        del self.head
        give_back_gpu_memory()


def full_model_logits(model: Any, sequence: Sequence, device: str) -> Tensor:
    """[T, V] float32, by the model's own forward pass over one unpacked sequence."""
    ids, count = [*sequence.context_ids, *sequence.response_ids[:-1]], len(sequence.response_ids)
    # of the whole context they could be larger than the model
    kept = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    forget_lengths(unwrap(model))
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **kept).logits
    own: Tensor = logits[0, -count:].float()
    return own
