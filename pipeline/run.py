"""A run: its settings, facts, plan and stores. This module changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.config import RunSettings
from eopd.pipeline.errors import RunError
from eopd.pipeline.inputs import gather_facts, load_other, models_by_role, refuse_circle
from eopd.pipeline.plan import Plan, Shelf, make_plan
from eopd.pipeline.store_check import check_folders
from eopd.stages.experiment import Experiment, Facts, ModelFacts, OtherStudent
from eopd.stages.job import ModelRef, NullProgress, Progress
from eopd.stages.stage import Input, Job, JobContext, student_at
from eopd.storage.artifacts import Artifact
from eopd.storage.coverage import Coverage, able, needs_of
from eopd.storage.errors import StoreError
from eopd.storage.identity import Digests, Identity
from eopd.storage.notes import Parts
from eopd.storage.paths import CHECKPOINTS, OPTIMIZER, WEIGHTS, RunPaths
from eopd.storage.stacked import StackedStores

if TYPE_CHECKING:
    from eopd.stages.engines.kept import Engines


@dataclass(frozen=True)
class Run:
    """A checkpoint has two parts: the weights, and the optimiser state that only the next round's training reads."""

    settings: RunSettings
    facts: Facts
    plan: Plan
    stores: StackedStores
    progress: Progress = field(default_factory=NullProgress)

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def experiment(self) -> Experiment:
        return Experiment(self.settings, self.facts)

    @property
    def store(self) -> Path:
        return Path(self.settings.store)

    @property
    def paths(self) -> RunPaths:
        return RunPaths(Path(self.settings.runs) / self.settings.name)

    def artifact(self, identity: Identity) -> Artifact:
        """Return the artifact at its present or future place."""
        return self.stores.find(identity)

    def is_own(self, artifact: Artifact) -> bool:
        """True if the artifact belongs to the store that the run writes to."""
        return artifact.folder == self.store / artifact.kind / artifact.key

    def is_made(self, job: Job) -> bool:
        """True if every part was committed once, even if some were pruned since."""
        return self.artifact(job.output).is_complete()

    def is_done(self, job: Job) -> bool:
        """True if every part exists and no pruned part must be rebuilt."""
        return self.is_made(job) and not self.parts_to_rebuild(job)

    # -- which parts of checkpoints are needed -----------------------------------------------------------------------

    def _pruned(self, job: Job) -> Parts:
        parts = self.artifact(job.output).pruned() if job.is_prunable else set()
        return {(job.output.key, part) for part in parts}

    def needed(self) -> Parts:
        """Parts, pruned ones included, that an unfinished job reads."""
        needed: Parts = set()
        for job in reversed(self.plan.jobs):
            if not self.is_made(job) or self._pruned(job) & needed:
                inputs = (input_ for input_ in job.inputs.values() if input_.identity.kind == CHECKPOINTS)
                needed |= {(input_.identity.key, part) for input_ in inputs for part in input_.needed()}
        return needed

    @cached_property
    def rebuilds(self) -> Parts:
        """Pruned parts that must be made again, as of the opening of this run: an unfinished job reads them."""
        pruned = {part for job in self.plan.jobs for part in self._pruned(job)}
        return pruned & self.needed() if pruned else pruned

    def parts_to_rebuild(self, job: Job) -> set[int]:
        """Return the parts of the output that are among ``rebuilds`` and not yet made again."""
        return {part for key, part in self._pruned(job) & self.rebuilds}

    def trained(self) -> list[Job]:
        """Training jobs whose checkpoints are complete, oldest first."""
        return [job for job in self.plan.jobs if job.is_prunable and self.is_made(job)]

    def unwanted(self) -> Parts:
        """Parts of checkpoints that this run has no more use for.

        They are not among the newest ``train.keep_checkpoints`` (``train.keep_optimizer_states``), of which the newest
        always stays, and no job that is still to be done reads them.
        """
        train = self.settings.train
        keys = [job.output.key for job in self.trained()]
        old: Parts = set()
        for part, keep in ((WEIGHTS, train.keep_checkpoints), (OPTIMIZER, train.keep_optimizer_states)):
            if keep is not None:
                old |= {(key, part) for key in keys[:-keep]}
        return old - self.needed() if old else old

    # -- missing and ready parts -------------------------------------------------------------------------------------

    def missing_parts(self, job: Job) -> set[int]:
        """Return output parts that were never made or must be rebuilt; all parts if the job is indivisible."""
        missing = set(self.artifact(job.output).missing()) | self.parts_to_rebuild(job)
        return set(range(job.output.parts)) if missing and not job.stage.divisible else missing

    def missing_input(self, input_: Input) -> set[int]:
        """Return the parts of an input that its job reads and that are missing."""
        return input_.needed() - self.artifact(input_.identity).committed()

    def ready_parts(self, job: Job) -> set[int]:
        """Return the missing parts of the output whose inputs are complete."""
        ready = self.missing_parts(job)
        for input_ in job.inputs.values() if ready else ():
            missing = self.missing_input(input_)
            if missing and not input_.by_part:
                return set()
            ready -= missing
        return ready

    def check_inputs(self, job: Job, parts: Collection[int]) -> None:
        """Raise RunError, naming the command that helps, if an input that ``parts`` of a job read is missing."""
        for input_ in job.inputs.values():
            missing = self.missing_input(input_)
            if input_.by_part:
                missing &= set(parts)
            if not missing:
                continue
            artifact, maker = self.artifact(input_.identity), self.plan.maker(input_.identity)
            state = "were pruned" if artifact.pruned().issuperset(missing) else "are missing"
            raise RunError(
                f"{job.name} needs {artifact}, of which parts {sorted(missing)[:8]} {state}",
                artifact=f"{artifact.kind}/{artifact.key}",
                remedy="Another run makes it: start that one first."
                if maker is None
                else f"Run `eopd {maker.stage.command} CONFIG --round {maker.round}` first, or `eopd run CONFIG` "
                "for everything.",
            )

    def others(self) -> dict[str, OtherStudent]:
        """Return the students of other runs that this run reads, by the role that they play."""
        roles = {role: facts.other for role, facts in models_by_role(self.facts).items()}
        return {role: other for role, other in roles.items() if other is not None}

    def scratch(self, job: Job) -> Artifact | None:
        identity = job.scratch
        return None if identity is None else self.artifact(identity)

    def scratch_steps(self, job: Job) -> int:
        """Return the steps that the resumable states of a job have reached; 0 if it keeps none."""
        scratch = self.scratch(job)
        return 0 if scratch is None else max(scratch.committed(), default=-1) + 1

    def student(self, round_: int) -> ModelRef:
        """Return the student at the start of ``round_``."""
        policy = self.plan.policy(round_)
        return student_at(self.experiment, None if policy is None else self.artifact(policy))

    def context(self, job: Job, parts: Sequence[int], engines: Engines) -> JobContext:
        return JobContext(
            experiment=self.experiment.of_teacher(job.teacher),
            job=job,
            parts=parts,
            output=self.artifact(job.output),
            inputs={role: self.artifact(input_.identity) for role, input_ in job.inputs.items()},
            scratch=self.scratch(job),
            progress=self.progress,
            log_dir=self.paths.logs,
            run_dir=self.paths.folder,
            engines=engines,
        )


def open_run(
    settings: RunSettings,
    facts: Facts | None = None,
    digests: Digests | None = None,
    progress: Progress | None = None,
    seen: tuple[str, ...] = (),
) -> Run:
    """Gather facts (unless given) and plan; stored scores that hold enough may serve in place of the requested ones.

    Args:
        digests: hashes of files that were read before; runs over one store share them, so each file is hashed once.
    """
    check_folders(settings)
    stores = StackedStores.at(settings.store, settings.read_only_stores)
    if facts is None:
        others = {role: _other_student(role, settings, digests, seen) for role in _roles_of_others(settings)}
        facts = gather_facts(settings, digests, others)
    plan = make_plan(Experiment(settings, facts), StoreShelf(stores))
    return Run(settings, facts, plan, stores, progress or NullProgress())


def _roles_of_others(settings: RunSettings) -> list[str]:
    return [role for role, model in settings.models.items() if model.run is not None]


def _other_student(role: str, settings: RunSettings, digests: Digests | None, seen: tuple[str, ...]) -> ModelFacts:
    """Plan another run, and return its student as a model of this one; it need not be trained yet.

    Raises:
        ConfigError: as ``open_run`` and ``load_other``; runs that name each other.
    """
    seen = refuse_circle(role, settings, seen)
    model = settings.models[role]
    named = load_other(role, settings)
    run = open_run(named, digests=digests, seen=seen)
    round_ = model.round or named.rounds
    checkpoint = run.plan.policy(round_)
    assert checkpoint is not None
    return replace(
        run.facts.student,
        fingerprint=checkpoint.key,
        stop_ids=run.facts.ordered_stop_ids,
        other=OtherStudent(named.name, round_, checkpoint, run.experiment.student_model),
    )


class StoreShelf(Shelf):
    """The shelf of the run's stores. An artifact that was begun is finished under the same identity."""

    def __init__(self, stores: StackedStores) -> None:
        self._stores = stores

    def serving(self, requested: Identity) -> Sequence[Identity]:
        """``requested`` if it is begun or if no complete sibling holds as much; else those siblings, cheapest first."""
        if requested.coverage is None or self.is_begun(requested):
            return [requested]
        coverages: dict[str, Coverage] = {}
        identities: dict[str, Identity] = {}
        for artifact in self._stores.coverages(requested.base_key):
            mapping = artifact.identity.coverage
            if mapping is None or mapping.get("extra") != requested.coverage.get("extra"):
                continue
            try:
                coverages[artifact.key] = Coverage.from_mapping(mapping)
            except (StoreError, KeyError, TypeError, ValueError):
                continue  # a coverage of another kind of record, such as an imported capture
            identities[artifact.key] = artifact.identity
        needs = needs_of(Coverage.from_mapping(requested.coverage).head)
        return [identities[name] for name in able(coverages, needs)] or [requested]

    def is_begun(self, identity: Identity) -> bool:
        return Artifact(self._stores.private, identity).is_begun()
