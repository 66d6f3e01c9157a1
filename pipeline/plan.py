"""The plan: settings and facts in, ordered jobs with their keys out. Pure: nothing is read or written.

Keys are input-addressed (a checkpoint is known by the job that makes it), so the whole plan stands before any work
is done, and two runs that ask for the same thing name the same folder.

    round 0                     round 1
    evaluate(student 0)
    rollout -> score -> train -> student 1: evaluate, rollout -> score -> train -> student 2: evaluate ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from eopd.pipeline.config import RunSettings
from eopd.pipeline.errors import RunError
from eopd.pipeline.models import ModelFacts
from eopd.stages.engines.sampling import derive_seed
from eopd.stages.evaluate.settings import MATH_RULES, EvaluateSettings
from eopd.stages.models.prompts import draw_prompts
from eopd.stages.train.schedule import steps_per_round
from eopd.storage.artifacts import Identity
from eopd.storage.files import canonical_json, sha256_text
from eopd.storage.fingerprints import LENGTH, Digests

Stage = Literal["rollout", "score", "train", "evaluate", "align"]
STAGES: tuple[Stage, ...] = ("rollout", "score", "train", "evaluate", "align")
SUMMED_UP: tuple[Stage, ...] = ("evaluate", "align")  # whose last part is a summary of all others

# A stage's version enters its keys. Raise it when the stage makes other bytes from the same settings.
VERSIONS = {"rollouts": 1, "student_topk": 1, "scores": 1, "checkpoints": 1, "evaluations": 2, "alignments": 2}

WEIGHTS, OPTIMIZER = 0, 1  # parts of a checkpoint


@dataclass(frozen=True)
class BenchmarkFacts:
    name: str
    count: int
    fingerprint: str


@dataclass(frozen=True)
class Facts:
    """What a plan must know of the world outside the store."""

    student: ModelFacts
    teacher: ModelFacts
    prompt_count: int
    prompts_fingerprint: str
    benchmarks: tuple[BenchmarkFacts, ...] = ()
    digests: Digests | None = field(default=None, compare=False, repr=False)  # by which all this was told

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """E: the union of both models' stop ids. Rollouts always stop on all of them."""
        return tuple(sorted({*self.student.stop_ids, *self.teacher.stop_ids}))

    @property
    def ends(self) -> tuple[int, ...]:
        """The stop ids, the student's main one first."""
        return tuple(dict.fromkeys((*self.student.stop_ids, *self.teacher.stop_ids)))


@dataclass(frozen=True)
class Draw:
    """Which prompts a round samples. Drawn when asked for, so that a plan of many large rounds takes no memory."""

    prompt_count: int
    per_round: int
    round: int
    seed: int
    rows_per_part: int

    def parts(self) -> list[list[int]]:
        """Rows of the prompt source, per part."""
        indices = draw_prompts(self.prompt_count, self.per_round, self.round, self.seed)
        return [indices[start : start + self.rows_per_part] for start in range(0, len(indices), self.rows_per_part)]


@dataclass(frozen=True)
class PlannedJob:
    stage: Stage
    round: int
    output: Identity
    inputs: tuple[Identity, ...] = ()
    side: Identity | None = None  # the student's own top-k, beside its rollouts
    draw: Draw | None = None  # of a rollout

    @property
    def name(self) -> str:
        return f"{self.stage} {self.round}"

    @property
    def makes(self) -> tuple[str, ...]:
        """What it makes: jobs of several runs that agree in it are one job."""
        made = (self.output.kind, self.output.key)
        return (*made, self.side.key) if self.stage == "rollout" and self.side is not None else made

    @property
    def prompt_indices(self) -> list[list[int]]:
        """Rows of the prompt source that a rollout samples, per part."""
        return self.draw.parts() if self.draw is not None else []


@dataclass(frozen=True)
class Plan:
    jobs: tuple[PlannedJob, ...]  # in an order in which each finds its inputs done

    @cached_property
    def _by_name(self) -> dict[tuple[Stage, int], PlannedJob]:
        return {(job.stage, job.round): job for job in self.jobs}

    @cached_property
    def _by_key(self) -> dict[str, PlannedJob]:
        return {job.output.key: job for job in self.jobs}

    def job(self, stage: Stage, round_: int) -> PlannedJob:
        found = self._by_name.get((stage, round_))
        if found is not None:
            return found
        rounds = sorted({job.round for job in self.jobs if job.stage == stage})
        raise RunError(f"the plan has no {stage} job of round {round_}; its rounds are {rounds}")

    def maker(self, identity: Identity) -> PlannedJob:
        """The job that makes an input of another one."""
        return self._by_key[identity.key]

    def policy(self, round_: int) -> Identity | None:
        """Checkpoint that is the student at the start of ``round_``; None: the external student."""
        return None if round_ == 0 else self.job("train", round_ - 1).output


class Shelf:
    """What there is that bears on a plan. This one is empty: scores are made as they are asked for."""

    def serving(self, asked: Identity) -> Sequence[Identity]:
        """What may stand in for scores that are asked for, the best first: never none."""
        return [asked]

    def is_begun(self, identity: Identity) -> bool:
        """Whether somebody has set out to make it."""
        return False


def make_plan(settings: RunSettings, facts: Facts, shelf: Shelf | None = None) -> Plan:
    """Every job of every round, in order."""
    shelf = shelf or Shelf()
    jobs: list[PlannedJob] = []
    policy: Identity | None = None
    policies: list[Identity | None] = [None]  # the student at the start of each round
    first = _measuring_jobs(settings, facts, 0, policy, None)
    jobs += first
    for round_ in range(settings.rounds):
        rollout = _rollout_job(settings, facts, round_, policies[sampling_round(settings, round_)])
        score, train = _score_and_train(settings, facts, round_, policy, rollout, shelf)
        jobs += [rollout, score, train]
        policy = train.output
        policies.append(policy)
        jobs += _measuring_jobs(settings, facts, round_ + 1, policy, first[0] if first else None)
    return Plan(tuple(jobs))


def prompts_per_round(settings: RunSettings, facts: Facts) -> int:
    """As set, or the whole prompt set where that is smaller."""
    return min(settings.rollout.prompts_per_round, facts.prompt_count)


def sampling_round(settings: RunSettings, round_: int) -> int:
    """Round at whose start the student was that samples ``round_``: renewed every ``refresh`` rounds, ``lag`` late."""
    return max(0, round_ // settings.refresh * settings.refresh - settings.lag)


def sampling_seed(settings: RunSettings, round_: int) -> int:
    """Seed of a round's rollouts: a prompt that comes again in a later round is sampled anew."""
    return derive_seed(settings.seed, "round", round_)


def steps_of_round(settings: RunSettings, facts: Facts) -> int:
    """Optimiser steps of a round in which no prompt is skipped."""
    responses = prompts_per_round(settings, facts) * settings.rollout.samples_per_prompt
    return steps_per_round(responses, settings.train.batch_responses, settings.train.epochs)


def _policy_key(facts: Facts, policy: Identity | None) -> str:
    return facts.student.fingerprint if policy is None else policy.key


def _rollout_job(settings: RunSettings, facts: Facts, round_: int, policy: Identity | None) -> PlannedJob:
    rows = settings.rollout.rows_per_part
    draw = Draw(facts.prompt_count, prompts_per_round(settings, facts), round_, settings.seed, rows)
    parts = draw.parts()
    sampling = settings.rollout.semantic()
    topk = settings.rollout.student_topk
    identity = Identity(
        kind="rollouts",
        version=VERSIONS["rollouts"],
        parts=len(parts),
        settings={
            "rollout": sampling,
            "prompts": settings.prompts.semantic(),
            "drawn": sha256_text(canonical_json(parts))[:LENGTH],
            "seed": sampling_seed(settings, round_),
            "stop_ids": list(facts.stop_ids),
        },
        inputs={
            "policy": _policy_key(facts, policy),
            "tokenizer": facts.student.tokenizer_fingerprint,
            "prompts": facts.prompts_fingerprint,
        },
    )
    side = None
    if topk:
        side = Identity(
            kind="student_topk",
            version=VERSIONS["student_topk"],
            parts=len(parts),
            settings={"k": topk},
            inputs={"rollouts": identity.key},
        )
    return PlannedJob("rollout", round_, identity, (policy,) if policy else (), side, draw)


def _score_and_train(
    settings: RunSettings, facts: Facts, round_: int, policy: Identity | None, rollout: PlannedJob, shelf: Shelf
) -> tuple[PlannedJob, PlannedJob]:
    """A training that is begun is finished with the scores it was begun with, whatever stands in for them since."""
    pairs = []
    for identity in shelf.serving(_asked_scores(settings, facts, rollout)):
        score = PlannedJob("score", round_, identity, (rollout.output,), rollout.side)
        pairs.append((score, _train_job(settings, facts, round_, policy, rollout, score)))
    if len(pairs) == 1:
        return pairs[0]
    return next((pair for pair in pairs if shelf.is_begun(pair[1].output)), pairs[0])


def _asked_scores(settings: RunSettings, facts: Facts, rollout: PlannedJob) -> Identity:
    return Identity(
        kind="scores",
        version=VERSIONS["scores"],
        parts=rollout.output.parts,
        settings={
            **settings.score.identity(),
            "temperature": settings.score.resolve_temperature(settings.rollout.temperature),
            "stop_ids": list(facts.stop_ids),
        },
        inputs={
            "rollouts": rollout.output.key,
            "teacher": facts.teacher.fingerprint,
            "tokenizer": facts.teacher.tokenizer_fingerprint,
        },
        coverage={**settings.score.coverage(), "extra": rollout.side.key if rollout.side else None},
    )


def _train_job(
    settings: RunSettings,
    facts: Facts,
    round_: int,
    policy: Identity | None,
    rollout: PlannedJob,
    score: PlannedJob,
) -> PlannedJob:
    optimizer = settings.train.optimizer
    span = None  # a constant rate does not depend on how many steps there will be
    if optimizer.schedule != "constant":
        span = steps_of_round(settings, facts) * (settings.rounds if optimizer.carry_over else 1)
    identity = Identity(
        kind="checkpoints",
        version=VERSIONS["checkpoints"],
        parts=2,
        settings={
            "train": settings.train.semantic(),
            "seed": settings.seed,
            "round": round_,
            "total_steps": span,
            **_swapped_stops(settings, facts),
            **_merged_stops(settings, facts, round_),
            **_own_ids(settings),
            **_noise(facts),
            **_exported_stops(facts),
        },
        inputs={
            "student": _policy_key(facts, policy),
            "tokenizer": facts.student.tokenizer_fingerprint,
            "rollouts": rollout.output.key,
            "scores": score.output.key,
        },
    )
    inputs = (rollout.output, score.output) + ((policy,) if policy else ())
    return PlannedJob("train", round_, identity, inputs)


def _swapped_stops(settings: RunSettings, facts: Facts) -> dict[str, list[int]]:
    """Under ``remap`` a checkpoint depends on which stop id is each model's main one, and not only on all of them."""
    if settings.train.objective.stops != "remap":
        return {}
    return {"stops": [*facts.student.stop_ids[:1], *facts.teacher.stop_ids[:1]]}


def _merged_stops(settings: RunSettings, facts: Facts, round_: int) -> dict[str, str]:
    """Of responses of an older policy q_old at a merged stop was first the sampler's, of one id."""
    merged = settings.train.objective.stops == "class" and len(facts.stop_ids) > 1
    return {"merged_stops": "round start"} if merged and sampling_round(settings, round_) != round_ else {}


def _own_ids(settings: RunSettings) -> dict[str, str]:
    """All of the student's own ids that were stored were used at first, however few the objective asks for."""
    more = settings.rollout.student_topk > settings.train.objective.student_topk
    return {"own_ids": "as many as asked for"} if more and "student_topk" in settings.train.objective.used else {}


def _noise(facts: Facts) -> dict[str, str]:
    """Students whose attention drops out, or whose router jitters, were trained with that noise at first."""
    return {"noise": "none"} if facts.student.is_noisy else {}


def _exported_stops(facts: Facts) -> dict[str, list[int]]:
    """Before they carried the run's stop ids, checkpoints were written with the student's own."""
    own = facts.student.generation_stops
    return {} if own is None or set(own) == set(facts.ends) else {"generation_stops": list(facts.ends)}


def _measuring_jobs(
    settings: RunSettings, facts: Facts, round_: int, policy: Identity | None, first: PlannedJob | None
) -> list[PlannedJob]:
    """What is asked of the student of a round: nothing, an evaluation, or that and an alignment.

    The first student is always measured, and so is the last (that of round ``rounds``).

    Args:
        first: the evaluation of the run's first student; None where this is it.
    """
    if settings.evaluate is None or (round_ % settings.evaluate.every and round_ < settings.rounds):
        return []
    evaluate = _evaluate_job(settings, facts, round_, policy)
    if settings.evaluate.alignment is None:
        return [evaluate]
    return [evaluate, _align_job(settings, facts, round_, policy, evaluate.output, (first or evaluate).output)]


def _align_job(
    settings: RunSettings, facts: Facts, round_: int, policy: Identity | None, own: Identity, first: Identity
) -> PlannedJob:
    assert settings.evaluate is not None
    assert settings.evaluate.alignment is not None
    named = {"own": own, "first": first}
    read = {whose: named[whose] for whose in settings.evaluate.alignment.responses}
    identity = Identity(
        kind="alignments",
        version=VERSIONS["alignments"],
        parts=sum(evaluation.parts - 1 for evaluation in read.values()) + 1,
        settings={
            "alignment": settings.evaluate.alignment.semantic(),
            "teacher_prompt": settings.score.teacher_prompt.semantic(),
            "resamples": settings.evaluate.resamples,
            "confidence": settings.evaluate.confidence,
            "stop_ids": list(facts.stop_ids),
        },
        inputs={
            **{f"{whose} evaluation": evaluation.key for whose, evaluation in read.items()},
            "student": _policy_key(facts, policy),
            "student_tokenizer": facts.student.tokenizer_fingerprint,
            "teacher": facts.teacher.fingerprint,
            "teacher_tokenizer": facts.teacher.tokenizer_fingerprint,
        },
    )
    inputs = tuple({evaluation.key: evaluation for evaluation in read.values()}.values())
    return PlannedJob("align", round_, identity, inputs + ((policy,) if policy else ()))


def _evaluate_job(settings: RunSettings, facts: Facts, round_: int, policy: Identity | None) -> PlannedJob:
    evaluate = settings.evaluate
    assert evaluate is not None
    chunks = sum(math.ceil(benchmark.count / evaluate.rows_per_part) for benchmark in facts.benchmarks)
    identity = Identity(
        kind="evaluations",
        version=VERSIONS["evaluations"],
        parts=chunks + 1,
        settings={
            "evaluate": evaluate.semantic(),
            "seed": settings.seed,
            "stop_ids": list(facts.stop_ids),
            **_grading(evaluate),
        },
        inputs={
            "policy": _policy_key(facts, policy),
            "tokenizer": facts.student.tokenizer_fingerprint,
            **{f"benchmark {benchmark.name}": benchmark.fingerprint for benchmark in facts.benchmarks},
        },
    )
    return PlannedJob("evaluate", round_, identity, (policy,) if policy else ())


def _grading(evaluate: EvaluateSettings) -> dict[str, str]:
    """Version of the rules by which mathematics is graded: other rules give other verdicts on the same samples."""
    return {"grading": f"math {MATH_RULES}"} if any(one.verifier == "math" for one in evaluate.benchmarks) else {}
