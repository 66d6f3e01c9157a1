"""One job on its way to completion: which of its parts are done, in work, to be tried again, or given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from eopd.pipeline.plan import SUMMED_UP, PlannedJob
from eopd.pipeline.retries import Batch
from eopd.pipeline.runner import Runner
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import Patience, claim, holder
from eopd.storage.sources import filled_parts

BROKEN_AFTER = 3


@dataclass
class Node:
    runner: Runner
    job: PlannedJob
    again: list[Batch] = field(default_factory=list)  # what did not end well
    poisoned: dict[int, str] = field(default_factory=dict)  # part -> why it was given up
    refusals: dict[str, frozenset[int]] = field(default_factory=dict)  # message -> parts that ended with it
    _running: dict[tuple[int, ...], tuple[Batch, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output: Artifact = self.runner.artifact(self.job.output)
        self._side = self.runner.artifact(self.job.side) if self.job.side else None
        self._makes_side = self.job.stage == "rollout" and self._side is not None
        self._patience = Patience(self.runner.progress.line)
        self._summary = self.output.parts - 1 if self.job.stage in SUMMED_UP else None

    @property
    def running(self) -> bool:
        return bool(self._running)

    @property
    def parts_running(self) -> set[int]:
        return {part for parts in self._running for part in parts}

    def missing(self) -> list[int]:
        missing = {*self.output.missing(), *self.runner.called_back(self.job)}
        if self._makes_side and self._side is not None:
            missing |= set(self._side.missing())
        return sorted(missing)

    def batches(self) -> list[Batch]:
        """What may be tried now or later: parts that failed before, apart, then all others whose inputs are there."""
        missing = set(self._ready()) - self.poisoned.keys()
        missing -= self.parts_running
        if self.job.stage == "train":
            if not missing or self.running or self.poisoned:
                return []
            return self.again[:1] or [Batch(tuple(range(self.output.parts)))]
        self.again = [kept for batch in self.again if (kept := _only(batch, missing)).parts]
        fresh = sorted(missing - {part for batch in self.again for part in batch.parts})
        return [*self.again, *([Batch(tuple(fresh))] if fresh else [])]

    def _ready(self) -> list[int]:
        """Missing parts whose inputs are committed."""
        missing = self.missing()
        for identity in self.job.inputs:
            lacking = set(self.runner.lacks(self.job, identity))
            if self.job.stage == "score" and identity.kind == "rollouts":
                beside = None if self._side is None else self._side.committed()
                missing = [part for part in missing if part not in lacking and (beside is None or part in beside)]
            elif lacking:
                return []
        if self._summary is not None and len(missing) > 1:
            # whoever commits the last of the other parts writes the summary too
            missing = [part for part in missing if part != self._summary]
        return missing

    def begin(self, batch: Batch) -> None:
        """``batch`` (or what is free of it) was started."""
        self._running[batch.parts] = (batch, self._mark(batch.parts))
        rest = set(range(self.output.parts)) - set(batch.parts)
        self.again = [kept for old in self.again if (kept := _only(old, rest)).parts]

    def end(self, parts: tuple[int, ...]) -> tuple[Batch, bool]:
        """The task of ``parts`` ended: its batch, and whether anything was committed meanwhile."""
        batch, mark = self._running.pop(parts)
        return batch, self._mark(parts) != mark

    def is_refused_whole(self, parts: Sequence[int], message: str) -> bool:
        """Whether other parts were refused with the same message: then no part is to blame, and all would be."""
        before = self.refusals.setdefault(message, frozenset(parts))
        self.refusals[message] = before & frozenset(parts) or before
        return before.isdisjoint(parts)

    def give_up(self, message: str) -> None:
        """Poison every part that is missing."""
        self.poisoned |= dict.fromkeys(self.missing(), message)
        self.again.clear()

    def _mark(self, parts: Sequence[int]) -> object:
        if self.job.stage == "train":
            return self.output.committed(), self.runner.states(self.job).committed()
        return self.output.committed() & set(parts)

    def not_held(self, parts: Sequence[int]) -> set[int]:
        """Those of ``parts`` that no other process is at work on. Says whom we wait for when it is all of them."""
        claimed = [0] if self.job.stage == "train" else parts
        held = {part for part in claimed if holder(self.output, part) is not None}
        if held and not self.running and held.issuperset(claimed):
            self._patience.say(self.output, sorted(held))
        return set() if self.job.stage == "train" and held else set(parts) - held

    def settle(self) -> bool:
        """Set the given-up parts aside once all others are done; False where that cannot be.

        Training and the summary of an evaluation cannot do without; a job none of whose parts could be done has
        another fault than a poisoned part.
        """
        left = set(self.missing()) - {self._summary}
        if self.job.stage == "train" or self._summary in self.poisoned or left != self.poisoned.keys():
            return False
        if not [part for part in filled_parts(self.output) if part != self._summary]:
            return False
        for part, reason in self.poisoned.items():
            self._set_aside(part, reason)
        self.poisoned.clear()
        return True

    def _set_aside(self, part: int, reason: str) -> None:
        artifacts = [self.output, self._side] if self._makes_side else [self.output]
        for artifact in artifacts:
            if artifact is None:
                continue
            with claim(artifact, part) as ours:
                if ours and not artifact.is_committed(part):
                    artifact.set_aside(part, reason)

    def is_broken(self) -> bool:
        """Several parts given up and none done: it is the job that fails, not its parts."""
        return len(self.poisoned) >= BROKEN_AFTER and len(self.missing()) == self.output.parts


def _only(batch: Batch, parts: set[int]) -> Batch:
    kept = tuple(part for part in batch.parts if part in parts)
    return Batch(kept, batch.failures, batch.losses, batch.not_before)
