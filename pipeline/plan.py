"""The plan: every job of every round, with its key. Pure: nothing is read or written.

Keys are input-addressed (a checkpoint is known by the job that makes it), so the whole plan is known before any work is
done, and two runs that ask for the same artifact name the same folder.

    round 0                     round 1
    evaluate(student 0)
    rollout -> score -> train -> student 1: evaluate, rollout -> score -> train -> student 2: evaluate ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from eopd.pipeline.errors import RunError
from eopd.stages.experiment import Experiment
from eopd.stages.stage import Job, Stage
from eopd.stages.table import STAGES, TRAIN
from eopd.storage.identity import Identity


@dataclass(frozen=True)
class Plan:
    jobs: tuple[Job, ...]  # each after the jobs that make its inputs
    first_student: Identity | None = None  # a checkpoint of another run; None: an external model

    @cached_property
    def _by_name(self) -> dict[tuple[str, int, str], Job]:
        return {(job.stage.name, job.round, job.variant): job for job in self.jobs}

    @cached_property
    def _by_key(self) -> dict[tuple[str, str], Job]:
        return {job.key: job for job in self.jobs}

    def find(self, stage: str, round_: int, variant: str = "") -> Job | None:
        return self._by_name.get((stage, round_, variant))

    def by_teacher(self, stage: str, round_: int) -> list[Job]:
        """Return a stage's jobs of a round: one for each teacher."""
        return [job for job in self.jobs if (job.stage.name, job.round) == (stage, round_)]

    def job(self, stage: str, round_: int, variant: str = "") -> Job:
        """Raises RunError if the plan has no such job; names the rounds it has."""
        job = self.find(stage, round_, variant)
        if job is not None:
            return job
        rounds = sorted({job.round for job in self.jobs if job.stage.name == stage})
        planned_by = next((one.planned_by for one in STAGES if one.name == stage), "")
        if not rounds and planned_by:
            raise RunError(f"the plan has no {stage} job, as nothing asks for it ({planned_by})")
        raise RunError(f"the plan has no {stage} job of round {round_}; its rounds are {rounds}")

    def of_command(self, command: str, round_: int) -> list[Job]:
        """Return the jobs of a round that one `eopd` command does. Raises RunError if there are none."""
        jobs = [job for job in self.jobs if job.stage.command == command and job.round == round_]
        return jobs or [self.job(command, round_)]

    def maker(self, identity: Identity) -> Job | None:
        """Return the job that makes an input of another one; None if another run makes it."""
        return self._by_key.get((identity.kind, identity.key))

    def policy(self, round_: int) -> Identity | None:
        """Return the checkpoint that is the student at the start of ``round_``; None: the external student."""
        return self.first_student if round_ == 0 else self.job(TRAIN.name, round_ - 1).output


class Shelf:
    """Read access to stored artifacts while planning. The base class is empty: every artifact is made as requested."""

    def serving(self, requested: Identity) -> Sequence[Identity]:
        """Return artifacts that hold at least what ``requested`` would, cheapest first; never empty."""
        return [requested]

    def is_begun(self, identity: Identity) -> bool:
        """True if work on this artifact has started."""
        return False


def make_plan(experiment: Experiment, shelf: Shelf | None = None) -> Plan:
    """Ask every stage for its job of every round."""
    draft = _Draft(experiment)
    for round_ in range(experiment.settings.rounds + 1):
        for place, stage in enumerate(STAGES):
            for variant in stage.variants(experiment):
                job = stage.plan(draft.of(stage, variant), round_)
                if job is None:
                    continue
                job = replace(job, variant=variant)
                draft.add(job)
                # scores of several teachers are read together, so each has the coverage that is requested and no other
                if shelf is not None and job.output.coverage is not None and not job.teacher:
                    draft.add(replace(job, output=_serving(draft, job, place, shelf)))
    return Plan(tuple(draft.jobs.values()), experiment.facts.student.checkpoint)


class _Draft:
    """A plan under construction; stages see the jobs planned before theirs."""

    def __init__(
        self, experiment: Experiment, jobs: dict[tuple[str, int, str], Job] | None = None, variant: str = ""
    ) -> None:
        self.experiment = experiment
        self.variant = variant
        self.jobs = {} if jobs is None else jobs

    def of(self, stage: Stage, variant: str) -> _Draft:
        """Return a view of this draft for one of a stage's jobs of a round."""
        return _Draft(self.experiment.of_teacher(variant if stage.by_teacher else ""), self.jobs, variant)

    def add(self, job: Job) -> None:
        self.jobs[job.stage.name, job.round, job.variant] = job

    def output(self, stage: str, round_: int, variant: str = "") -> Identity | None:
        job = self.jobs.get((stage, round_, variant))
        return None if job is None else job.output

    def by_teacher(self, stage: str, round_: int) -> dict[str, Identity]:
        return {job.variant: job.output for name, job in self.jobs.items() if name[:2] == (stage, round_)}

    def policy(self, round_: int) -> Identity | None:
        return self.experiment.facts.student.checkpoint if round_ == 0 else self.output(TRAIN.name, round_ - 1)

    def teacher(self, round_: int) -> Identity | None:
        if self.experiment.settings.teacher.student is None:
            return self.experiment.facts.teacher.checkpoint
        return self.policy(self.experiment.teacher_round(round_))


def _serving(draft: _Draft, job: Job, place: int, shelf: Shelf) -> Identity:
    """Choose the coverage for ``job``: one that a job of this round has begun to read, or else the cheapest."""
    candidates = shelf.serving(job.output)
    for candidate in candidates if len(candidates) > 1 else ():
        trial = _Draft(draft.experiment, dict(draft.jobs))
        trial.add(replace(job, output=candidate))
        for stage in STAGES[place + 1 :]:
            reader = stage.plan(trial, job.round)
            if reader is None or not shelf.is_begun(reader.output):
                continue
            if any(input_.identity == candidate for input_ in reader.inputs.values()):
                return candidate
    return candidates[0]
