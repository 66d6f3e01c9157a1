"""The student's own most probable tokens at every stored response position.

The stored tokens are read once more after their part is committed, so the ids always belong to the committed tokens,
whichever engine sampled them and however often the stage was killed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from eopd.stages.engines.kept import Engines
from eopd.stages.engines.sampling import torch_device
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.memory import give_back_gpu_memory
from eopd.stages.models.packing import Sequence as PackSequence
from eopd.stages.models.packing import read_logits
from eopd.stages.models.threads import torch_threads
from eopd.stages.rollout.settings import RolloutSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.errors import InputError
from eopd.storage.records import read_rollouts
from eopd.storage.sources import passes_on
from eopd.storage.student_topk import StudentTopk, write_student_topk


@dataclass(frozen=True)
class StudentTopkJob:
    """Inputs of the student's top-k: part i of ``output`` comes from part i of ``rollouts``."""

    output: Artifact
    parts: Collection[int]
    rollouts: Artifact
    policy: ModelRef
    settings: RolloutSettings
    progress: Progress
    engines: Engines = field(default_factory=Engines)  # of this process: closed before a GPU is used here


def run(job: StudentTopkJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: ``rollout.student_topk`` is 0 or more than the vocabulary has.
    """
    done = job.output.committed()
    todo = sorted(part for part in job.parts if part not in done)
    if not todo:
        return
    device = torch_device(job.settings.engine_options)
    if device != "cpu":
        job.engines.close()
    with torch_threads(job.settings.engine_options.cpu_threads):
        _read_parts(job, todo, device)
    give_back_gpu_memory()


def _read_parts(job: StudentTopkJob, todo: list[int], device: str) -> None:
    model = load_model(job.policy, device)
    vocabulary = lm_head_of(model).vocab_size
    k = job.settings.student_topk
    if not 0 < k <= vocabulary:
        raise InputError(
            f"rollout.student_topk must be 1 to {vocabulary} (the vocabulary), got {k}", setting="rollout.student_topk"
        )
    job.progress.start("student top-k", len(todo), unit="parts")
    try:
        for part in claimed_parts(job.output, todo, job.progress.line):
            if passes_on(job.rollouts, part, job.output, part):
                continue
            table = read_rollouts(job.rollouts.part_folder(part), ["prompt_token_ids", "response_token_ids"])
            columns = table.to_pydict()
            pairs = zip(columns["prompt_token_ids"], columns["response_token_ids"], strict=True)
            topk = topk_of(model, [PackSequence(*pair) for pair in pairs], k, job.settings.temperature, device)
            inputs = {"rollouts": job.rollouts.marker(part).checksum, "policy": job.policy.fingerprint}
            info = {"k": k, "tokens": len(topk.ids), "responses": len(topk.lengths)}
            with job.output.write_part(part, inputs=inputs, info=info) as folder:
                write_student_topk(folder, topk)
            job.progress.advance(1)
    finally:
        job.progress.close()


@torch.inference_mode()
def topk_of(model: Any, sequences: list[PackSequence], k: int, temperature: float, device: str = "cpu") -> StudentTopk:
    """Return the ``k`` most probable ids and their log-probs (full softmax at ``temperature``) of every response
    token."""
    lengths = np.array([len(sequence.response_ids) for sequence in sequences], dtype=np.int32)
    ids = np.zeros((int(lengths.sum()), k), dtype=np.int32)
    logprobs = np.zeros(ids.shape, dtype=np.float32)
    for tokens, logits in read_logits(model, sequences, device):
        best = (logits / temperature).log_softmax(-1).topk(k, dim=-1)
        ids[tokens] = best.indices.int().cpu().numpy()
        logprobs[tokens] = best.values.cpu().numpy()
    return StudentTopk(lengths, ids, logprobs)
