"""How close a finished student is to the teacher on held-out problems, on two sets of responses.

``own``: one response of the student to each problem: where its own samples lead it (what reverse KL is about).
``teacher``: one response of the teacher to each problem, the same for every student: what of the teacher's the student
has learned to cover (what forward KL is about).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eopd.pipeline.run import Run
from eopd.stages.align.divergence import Alignment, Means, measure_alignment
from eopd.stages.engines.kept import open_sampling_engine
from eopd.stages.engines.sampling import SamplingRequest, derive_seed
from eopd.stages.models.loading import load_model, load_tokenizer
from eopd.stages.models.packing import Sequence
from eopd.stages.models.prompts import load_prompts, render_prompt
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact

TAU = 0.8
EDGES = (0.1, 0.4, 0.8, 1.2)
FIGURES = ("share", "fkl", "rkl", "agreement", "teacher_entropy", "student_entropy", "student_above")


def measure(run: Run, evaluation: Artifact, round_: int) -> dict[str, Any]:
    """Alignment of the student before round ``round_``, whose samples ``evaluation`` holds; nats a token."""
    assert run.settings.evaluate is not None
    student_ref = run.student(round_)
    source = run.settings.evaluate.prompts_of(run.settings.evaluate.benchmarks[0])
    tokenizer, table = load_tokenizer(student_ref), load_prompts(source)
    rows = table.rows(range(run.facts.benchmarks[0].count))
    prompts = {prompt.id: render_prompt(tokenizer, prompt, source) for prompt in rows}
    teacher, student = load_model(run.experiment.teacher), load_model(student_ref)
    result = {}
    responses = {"own": _own(evaluation), "teacher": _teachers(run, prompts)}
    for name, by_id in responses.items():
        sequences = [Sequence(prompts[number], by_id[number]) for number in prompts]
        alignment = measure_alignment(
            teacher, student, sequences, tau=TAU, edges=EDGES, merged=run.facts.stop_ids, resamples=100
        )
        result[name] = _compact(alignment)
    return result


def _own(evaluation: Artifact) -> dict[str, list[int]]:
    """The first sample of each problem."""
    result: dict[str, list[int]] = {}
    for part in range(evaluation.parts):
        for row in evaluations.SAMPLES.read(evaluation.part_folder(part)).to_pylist():
            result.setdefault(row["problem_id"], list(row["response_token_ids"]))
    return result


def _teachers(run: Run, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """A response of the teacher to each problem, by seeds that depend on nothing but the problem."""
    settings = run.settings.rollout
    longest = max(map(len, prompts.values())) + settings.max_new_tokens
    engine = open_sampling_engine(
        settings.engine, run.experiment.teacher, max_model_len=longest, log_dir=Path(), options=settings.engine_options
    )
    requests = [SamplingRequest(ids, derive_seed(0, "teacher", name)) for name, ids in prompts.items()]
    samples = engine.sample(requests, settings.parameters(run.facts.stop_ids))
    engine.close()
    return {name: sample.token_ids.tolist() for name, sample in zip(prompts, samples, strict=True)}


def _compact(result: Alignment) -> dict[str, Any]:
    """Means without intervals: those of the study are over seeds."""

    def means(one: Means) -> dict[str, float | None]:
        values = {name: getattr(one, name) for name in FIGURES}
        return {name: None if value is None else float(np.round(value, 5)) for name, value in values.items()}

    return {
        "tokens": result.all.tokens,
        "all": means(result.all),
        "above": means(result.above),
        "below": means(result.below),
        "edges": [float(np.round(edge, 4)) for edge in result.edges],
        "bins": [means(one) for one in result.bins],
    }
