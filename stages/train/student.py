"""The student as a module: packed rows in, loss or log-probs out, never [T, V].

Backbone, LM head and objective stand in one forward so that the hooks of DDP and FSDP2 see all of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eopd.stages.models.backbone import final_hidden, layout_of
from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.packing import Packed
from eopd.stages.train.objectives.base import Objective, StepContext
from eopd.stages.train.objectives.teacher_batch import TeacherBatch
from eopd.stages.train.student_head import sparse_head_loss, student_logprobs


class Student(nn.Module):
    """``autocast``: forward and backward in bfloat16 where that is safe, whatever wraps this module."""

    def __init__(
        self, model: PreTrainedModel, objective: Objective, chunk_tokens: int | None, *, autocast: bool = False
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.layout = layout_of(model)  # measured here: once the model is wrapped or sharded it cannot be
        self._objective = objective
        self._chunk_tokens = chunk_tokens
        self._autocast = autocast

    def forward(
        self, packed: Packed, batch: TeacherBatch, context: StepContext, mode: Literal["loss", "logprobs"] = "loss"
    ) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, Tensor]:
        """Return the loss (a scalar) and sums to log, or with ``logprobs`` log-prob and entropy [T] of the sampled
        tokens in nats."""
        with torch.autocast(packed.input_ids.device.type, torch.bfloat16, enabled=self._autocast):
            hidden = final_hidden(self.model, packed)
            head = lm_head_of(self.model)
            if mode == "logprobs":
                return student_logprobs(hidden, head, batch, context, chunk_tokens=self._chunk_tokens)
            return sparse_head_loss(hidden, head, batch, self._objective, context, chunk_tokens=self._chunk_tokens)

    @property
    def vocab_size(self) -> int:
        return lm_head_of(self.model).vocab_size
