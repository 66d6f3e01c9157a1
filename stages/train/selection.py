"""Selection of a round's responses for training: `train.select`, applied to rollouts and their verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from eopd.stages.train.settings import SelectSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.verdicts import read_correct

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
            raise ValueError(
                f"train.select leaves nothing to train on: {words}. Select less strictly, or sample more "
                "(rollout.samples_per_prompt, rollout.prompts_per_round)"
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
