"""An experiment: the settings and inputs that decide what its stages make. Imports no torch.

``Experiment`` holds the facts that a stage may use to plan its job: keyed settings, and facts about models, prompts and
benchmarks. Places of artifacts and launchers belong to ``pipeline``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from eopd.stages.engines.sampling import derive_seed
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.job import ModelRef
from eopd.stages.models.model_config import vocabulary_size
from eopd.stages.models.prompts import draw_prompts
from eopd.stages.models.settings import ModelSettings
from eopd.stages.train.settings import steps_per_round
from eopd.storage.identity import Digests, Identity


@dataclass(frozen=True)
class OtherStudent:
    """A student of another run."""

    run: str  # its name
    round: int
    checkpoint: Identity
    origin: ModelSettings  # the external model that it was trained from


@dataclass(frozen=True)
class ModelFacts:
    """A model from outside the run: its place and the facts about it that enter artifact keys.

    For a student of another run, which need not exist yet, the folders are those of the model it was trained from.
    """

    folder: Path
    tokenizer_folder: Path
    fingerprint: str  # weights, config, dtype and trusted code
    tokenizer_fingerprint: str  # every tokenizer file, templates included
    stop_ids: tuple[int, ...]  # the main one first
    other: OtherStudent | None = None

    @property
    def checkpoint(self) -> Identity | None:
        """The checkpoint of another run that is the model; None: the model is the folder."""
        return None if self.other is None else self.other.checkpoint


@dataclass(frozen=True)
class BenchmarkFacts:
    name: str
    count: int  # problems, or documents
    fingerprint: str


@dataclass(frozen=True)
class TeacherFacts:
    """One of several teachers, and the rows of its prompts."""

    model: ModelFacts
    prompts: frozenset[int]


@dataclass(frozen=True)
class Facts:
    """Facts that a plan needs about inputs outside the store."""

    student: ModelFacts
    teacher: ModelFacts  # of several, the first, or the one that a job reads (``Experiment.of_teacher``)
    prompt_count: int
    prompts_fingerprint: str
    benchmarks: tuple[BenchmarkFacts, ...] = ()
    selected_prompts: frozenset[int] | None = None  # rows of the prompts that `train.select.where` names; None: all
    documents: BenchmarkFacts | None = None  # of `attribute.documents`
    digests: Digests | None = field(default=None, compare=False, repr=False)  # hashes of the files behind all this
    teachers: Mapping[str, TeacherFacts] = field(default_factory=dict)  # if there are several, by name

    @property
    def teacher_models(self) -> dict[str, ModelFacts]:
        """Every teacher by name; a single one has none (``""``)."""
        return {name: one.model for name, one in self.teachers.items()} or {"": self.teacher}

    @property
    def teacher_stop_ids(self) -> tuple[int, ...]:
        """The teachers' stop ids, the main one first."""
        return tuple(dict.fromkeys(token for one in self.teacher_models.values() for token in one.stop_ids))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Union of both models' stop ids, ascending. Rollouts stop at any of them."""
        return tuple(sorted({*self.student.stop_ids, *self.teacher_stop_ids}))

    @cached_property
    def ordered_stop_ids(self) -> tuple[int, ...]:
        """The same ids, the student's main one first: what checkpoints carry in their generation config."""
        return tuple(dict.fromkeys((*self.student.stop_ids, *self.teacher_stop_ids)))


@dataclass(frozen=True)
class Experiment:
    """Settings and facts of one run."""

    settings: ExperimentSettings
    facts: Facts
    teacher_name: str = ""  # which of several teachers is ``facts.teacher``; empty: there is one

    def of_teacher(self, name: str) -> Experiment:
        """Return the experiment as a job of one of several teachers sees it; the experiment itself if there is one."""
        if not name:
            return self
        settings = self.settings.model_copy(update={"teacher": self.settings.teachers[name]})
        facts = replace(self.facts, teacher=self.facts.teachers[name].model)
        return Experiment(settings, facts, name)

    @property
    def by_teacher(self) -> dict[str, Experiment]:
        """The experiment as each teacher's jobs see it, by the teacher's name; ``""`` if there is one."""
        return {name: self.of_teacher(name) for name in self.facts.teacher_models}

    @property
    def teachers_prompts(self) -> frozenset[int] | None:
        """Rows of the prompts that the teacher answers for; None: all."""
        return self.facts.teachers[self.teacher_name].prompts if self.teacher_name else None

    @property
    def prompts_per_round(self) -> int:
        """`rollout.prompts_per_round`, or the whole prompt set if that is smaller."""
        return min(self.settings.rollout.prompts_per_round, self.facts.prompt_count)

    def most_responses(self, round_: int) -> int:
        """Return how many responses of a round are trained on, at most.

        They are fewer if prompts are skipped, or if responses are selected by verdict.
        """
        select, prompts = self.settings.train.select, self.prompts_per_round
        if self.facts.selected_prompts is not None:
            drawn = draw_prompts(self.facts.prompt_count, prompts, round_, self.settings.seed)
            prompts = sum(row in self.facts.selected_prompts for row in drawn)
        samples = self.settings.rollout.samples_per_prompt
        return prompts * min(samples, select.most_per_prompt or samples)

    def most_steps(self, round_: int) -> int:
        """Return how many optimiser steps a round takes, at most."""
        train = self.settings.train
        return steps_per_round(self.most_responses(round_), train.batch_responses, train.epochs)

    def most_epochs(self, round_: int) -> float:
        """Return how often training reads a token of a round's rollouts, on average and at most."""
        responses = self.prompts_per_round * self.settings.rollout.samples_per_prompt
        return self.settings.train.epochs * self.most_responses(round_) / responses

    def sampling_round(self, round_: int) -> int:
        """The round at whose start the policy stood that samples ``round_`` (settings ``refresh`` and ``lag``)."""
        refresh = self.settings.refresh
        return max(0, round_ // refresh * refresh - self.settings.lag) if refresh else 0

    def sampling_seed(self, round_: int) -> int:
        """Seed of a round's rollouts; a prompt that returns in a later round gets other samples."""
        return derive_seed(self.settings.seed, "round", round_)

    def teacher_round(self, round_: int) -> int:
        """Return the round at whose start the student stood that teaches in ``round_`` (``teacher.student``)."""
        teacher = self.settings.teacher
        return 0 if teacher.student == "initial" else round_ - round_ % (teacher.renewed or 1)

    @property
    def student_model(self) -> ModelSettings:
        """The external model that the run's student began as."""
        other = self.facts.student.other
        return self.settings.student if other is None else other.origin

    @property
    def teacher_model(self) -> ModelSettings:
        """The external model that the teacher is, or began as."""
        other = self.facts.teacher.other
        if not self.settings.teacher.has_own_model:
            return self.student_model
        return self.settings.teacher if other is None else other.origin

    @property
    def teacher_vocabulary(self) -> int:
        """Ids of the teacher by its config; 0 if the config does not say."""
        return vocabulary_size(self.facts.teacher.folder)

    @property
    def first_student(self) -> ModelRef:
        return _reference(self.student_model, self.facts.student)

    @property
    def teacher(self) -> ModelRef:
        """The teacher, if it is no checkpoint."""
        assert self.facts.teacher.checkpoint is None, "the teacher is a checkpoint"
        return _reference(self.teacher_model, self.facts.teacher)


def _reference(settings: ModelSettings, facts: ModelFacts) -> ModelRef:
    return ModelRef(
        path=str(facts.folder),
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        fingerprint=facts.fingerprint,
        tokenizer=str(facts.tokenizer_folder),
    )
