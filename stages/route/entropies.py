"""The student's exact entropies at the first tokens of its evaluation samples.

The samples are read again, so the entropies do not depend on the engine that sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from eopd.stages.engines.kept import Engines
from eopd.stages.engines.sampling import torch_device
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.loading import load_model, load_tokenizer
from eopd.stages.models.memory import give_back_gpu_memory
from eopd.stages.models.packing import Sequence as PackSequence
from eopd.stages.models.packing import read_logits
from eopd.stages.models.threads import torch_threads
from eopd.stages.problems import Problems
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.errors import InputError
from eopd.storage.sources import passes_on

COLUMNS = ("benchmark", "problem_id", "problem_index", "sample", "response_token_ids")


@dataclass(frozen=True)
class EntropiesJob:
    """Reading of an evaluation's samples: part i of ``output`` comes from part i of ``evaluation``."""

    output: Artifact
    parts: Sequence[int]
    evaluation: Artifact
    policy: ModelRef
    settings: EvaluateSettings  # with ``route``
    progress: Progress
    engines: Engines = field(default_factory=Engines)  # of this process: closed before a GPU is used here


def run(job: EntropiesJob) -> None:
    """Do every part of ``job.parts`` that is not committed.

    Raises:
        ValueError: a problem, by id, that is no longer in its benchmark; logits that are not finite.
    """
    done = job.output.committed()
    todo = [part for part in job.parts if part not in done]
    todo = [part for part in todo if not passes_on(job.evaluation, part, job.output, part)]
    if not todo:
        return
    problems = Problems(job.settings, load_tokenizer(job.policy))
    content = {part: _sequences(job, part, problems) for part in todo}
    device = torch_device(job.settings.engine_options)
    if device != "cpu":
        job.engines.close()
    with torch_threads(job.settings.engine_options.cpu_threads):
        model = load_model(job.policy, device)
        job.progress.start("entropies", len(todo), unit="parts")
        try:
            for part in claimed_parts(job.output, todo, job.progress.line):
                _do_part(job, part, *content[part], model, device)
                job.progress.advance(1)
        finally:
            job.progress.close()
    give_back_gpu_memory()


def _do_part(
    job: EntropiesJob, part: int, names: list[dict[str, Any]], sequences: list[PackSequence], model: Any, device: str
) -> None:
    try:
        values = entropies_of(model, sequences, device)
    except FloatingPointError as error:
        raise InputError.of(error, file=job.policy.path) from error
    rows = [{**name, "entropy": value} for name, value in zip(names, values, strict=True)]
    info = {"tokens": sum(map(len, values)), "responses": len(rows)}
    with job.output.write_part(part, inputs={"samples": job.evaluation.marker(part).checksum}, info=info) as folder:
        analyses.ENTROPIES.write(folder, rows)


def _sequences(job: EntropiesJob, part: int, problems: Problems) -> tuple[list[dict[str, Any]], list[PackSequence]]:
    assert job.settings.route is not None
    names, sequences = [], []
    for row in evaluations.SAMPLES.read(job.evaluation.part_folder(part), COLUMNS).to_pylist():
        prompt = problems.ids(row["benchmark"], row["problem_id"], row["problem_index"])
        names.append({name: row[name] for name in ("benchmark", "problem_id", "sample")})
        sequences.append(PackSequence(prompt, row["response_token_ids"][: job.settings.route.tokens]))
    return names, sequences


@torch.inference_mode()
def entropies_of(model: Any, sequences: list[PackSequence], device: str = "cpu") -> list[np.ndarray[Any, Any]]:
    """Return the entropy (full softmax at temperature 1, nats) before every response token of each sequence.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    lengths = [len(sequence.response_ids) for sequence in sequences]
    values = np.zeros(sum(lengths), dtype=np.float32)
    for tokens, logits in read_logits(model, sequences, device):
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)  # entr is 0 at a probability of 0
        if not torch.isfinite(entropy).all():
            raise FloatingPointError("logits that are not finite")
        values[tokens] = entropy.cpu().numpy()
    return np.split(values, np.cumsum(lengths)[:-1])
