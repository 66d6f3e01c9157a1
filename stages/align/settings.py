"""Settings of the alignment measurement, with keys of their own: alignment changes no evaluation's key."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, field_validator

from eopd.stages.engines.sampling import EngineKind, EngineOptions
from eopd.stages.settings import COUNT, NATS, Settings, setting
from eopd.storage.errors import InputError

Responses = Literal["own", "first"]
EDGES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0, 3.0)


class AlignmentSettings(Settings):
    """Exact divergences between teacher and student on the evaluation's samples, by teacher entropy."""

    responses: tuple[Responses, ...] = setting(
        ("own",),
        "Whose samples are read: own (of the student that is measured: on-policy), first (of the run's first student: "
        "one fixed set for all rounds, and for all runs that start from it)",
        min_length=1,
    )
    samples: int = setting(1, "Samples of each problem that are read: the first ones", ge=1, le=100_000)
    limit: int | None = setting(
        None, "Problems of each benchmark that are read: the first ones (null: all)", ge=1, le=COUNT
    )
    tau: float = setting(0.8, "Threshold of high entropy, nats; always an edge of a bin", gt=0.0, le=NATS)
    bins: tuple[Annotated[float, Field(gt=0, le=NATS)], ...] = setting(
        EDGES, "Inner edges of the bins of teacher entropy, nats, increasing; the outer ones are 0 and ln V"
    )
    temperature: float = setting(1.0, "Both models' logits are divided by it", gt=0.0, le=100.0)
    merge_stops: bool = setting(
        True, "Both models' stop ids are one outcome, as objective.stops: class has it; false: outcomes of their own"
    )
    teacher_engine: EngineKind = setting(
        "transformers",
        "Who runs the teacher's forward pass, in teacher.dtype (score.dtype is not read). The student is run by "
        "transformers, and both are in memory at once.",
        keyed=False,
    )
    engine_options: EngineOptions = setting(EngineOptions, "Speed and placement of the student", keyed=False)
    teacher_engine_options: EngineOptions = setting(EngineOptions, "Speed and placement of the teacher", keyed=False)
    batch_tokens: int = setting(
        8192, "Tokens read by both models before their heads are compared", keyed=False, ge=1, le=COUNT
    )

    @field_validator("engine_options", "teacher_engine_options")
    @classmethod
    def _of_a_reader(cls, value: EngineOptions) -> EngineOptions:
        return value.of_a_reader()

    @field_validator("responses")
    @classmethod
    def _once_each(cls, value: tuple[Responses, ...]) -> tuple[Responses, ...]:
        if len(set(value)) != len(value):
            raise InputError(
                f"evaluate.alignment.responses names one twice: {list(value)}", setting="evaluate.alignment.responses"
            )
        return value

    @field_validator("bins")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(high <= low for low, high in itertools.pairwise(value)):
            raise InputError(
                f"evaluate.alignment.bins must be increasing, got {list(value)}", setting="evaluate.alignment.bins"
            )
        return value
