"""Inputs of the train stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from eopd.stages.engines.kept import Engines
from eopd.stages.job import ModelRef, Progress
from eopd.stages.rollout.settings import Source
from eopd.stages.train.settings import SelectSettings, TrainedTokens, TrainSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.verdict_signal import read_correct

# -- selection --------------------------------------------------------------------------------------------------------

# Selection of a round's responses for training: `train.select`, applied to rollouts and their verdicts.


COLUMNS = ("prompt_id", "sample", "prompt_index", "correct")


@dataclass(frozen=True)
class Candidate:
    """A response that could be trained on."""

    prompt_id: str
    sample: int
    prompt_index: int  # row of the prompt in its source
    correct: bool | None  # None: not judged


@dataclass(frozen=True)
class Selection:
    """The settings, and what they are applied to."""

    settings: SelectSettings = field(default_factory=SelectSettings)
    prompts: frozenset[int] | None = None  # rows of the prompt source that `where` selects; None: all
    verdicts: Artifact | None = None  # None: those that rollouts carry, if they do

    def candidates(self, rollouts: Artifact, part: int, table: pa.Table) -> list[Candidate]:
        """Return the responses of one part of ``rollouts``, whose rows are in ``table``, with their verdicts.

        Raises:
            DamagedPart: the verdicts are of other responses.
        """
        rows = table.select(["prompt_id", "sample", "prompt_index"]).to_pylist()
        correct: Sequence[bool | None] = [None] * len(rows)
        if self.verdicts is not None and self.verdicts.marker(part).set_aside is None:
            correct = read_correct(self.verdicts, rollouts, part, table)
        elif "correct" in table.schema.names:  # judged while they were sampled
            correct = table.column("correct").to_pylist()
        return [Candidate(**row, correct=verdict) for row, verdict in zip(rows, correct, strict=True)]

    def choose(self, candidates: Sequence[Candidate]) -> tuple[list[int], str]:
        """Return the numbers of the selected candidates, ascending, and how many each setting leaves, in words.

        Raises:
            ValueError: nothing is selected; gives these counts.
        """
        numbers = list(range(len(candidates)))
        counts = [f"of {len(numbers):,} responses"]
        if self.prompts is not None:
            numbers = [number for number in numbers if candidates[number].prompt_index in self.prompts]
            counts.append(f"{len(numbers):,} are to prompts that `where` selects")
        verdict = self.settings.verdict
        if verdict != "any":
            unjudged = sum(candidates[number].correct is None for number in numbers)
            numbers = [number for number in numbers if candidates[number].correct is (verdict == "right")]
            counts.append(f"{len(numbers):,} are {verdict}" + (f" ({unjudged:,} were not judged)" if unjudged else ""))
        most = self.settings.most_per_prompt
        if most is not None:
            numbers = _first(candidates, numbers, most)
            counts.append(f"{len(numbers):,} are among the first {most} to their prompt")
        words = ", ".join(counts)
        if not numbers:
            raise InputError(
                f"train.select leaves nothing to train on: {words}",
                setting="train.select",
                remedy="Select less strictly, or sample more (rollout.samples_per_prompt, rollout.prompts_per_round)",
            )
        return numbers, words


def _first(candidates: Sequence[Candidate], numbers: Sequence[int], most: int) -> list[int]:
    """Return those of ``numbers`` that are among the first ``most`` samples of their prompt."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        by_prompt[candidates[number].prompt_id].append(number)
    kept = [
        number
        for group in by_prompt.values()
        for number in sorted(group, key=lambda number: (candidates[number].sample, number))[:most]
    ]
    return sorted(kept)


# -- inputs of the stage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainJob:
    output: Artifact  # the checkpoint
    progress_states: Artifact  # resumable states on the way there; removed at the end
    student: ModelRef  # the policy at the round's start; where `age` is 0, the one that sampled the rollouts
    previous: Artifact | None  # checkpoint whose optimiser state carries on
    rollouts: Artifact
    scores: tuple[Artifact, ...]  # of each teacher; none if the objective reads none
    settings: TrainSettings
    round: int
    total_steps: int  # of the schedule
    first_step: int  # schedule position of this round's step 0
    seed: int
    temperature: float  # of rollouts and scores
    truncated_rollouts: bool  # top-p, top-k or min-p cut the sampling distribution
    student_stop_ids: tuple[int, ...]
    teacher_stop_ids: tuple[int, ...]
    progress: Progress
    run_dir: Path  # metrics with timings, TensorBoard
    source: Source = "student"  # who wrote the responses
    tokens: TrainedTokens = "own"  # those of a response that are trained on
    age: int = 0  # rounds by which the policy that sampled is older than the one at the round's start
    selection: Selection | None = None  # which responses are trained on; None: all
    schedule_rounds: int = 1  # rounds that the schedule spans; read with a selection, see ``train.run.schedule_of``
    steps_before: int | None = None  # of earlier rounds, on the axis of figures; None: by ``first_step`` and ``round``
    engines: Engines = field(default_factory=Engines)  # of this process: closed before a GPU is trained on

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which the run's responses end, the student's main one first."""
        return tuple(dict.fromkeys((*self.student_stop_ids, *self.teacher_stop_ids)))
