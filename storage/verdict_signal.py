"""Separation of right and wrong responses by the teacher: log-ratios summed over a response, against verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from eopd.storage import listing
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart
from eopd.storage.records import RowRecord, named, read_rollouts
from eopd.storage.sources import filled_parts
from eopd.storage.teacher_cache import JointCache


@dataclass(frozen=True)
class VerdictSignal:
    """The sum of log p_T - log q_S over the scored tokens that the student sampled, of right and wrong responses.

    A teacher that knows no more than the student tells them apart no better than the student's own certainty does.
    """

    right: int  # responses
    wrong: int
    left_out: int  # responses without such a token, or without the student's log-probs
    auc: float | None  # probability that a right response has the larger sum; None: there are only right or wrong ones
    mean_right: float | None  # nats a response
    mean_wrong: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return one line for a terminal."""
        of = f"{self.right:,} right and {self.wrong:,} wrong responses"
        left_out = f" ({self.left_out:,} left out)" if self.left_out else ""
        if self.auc is None:
            return f"no signal against verdicts: there are {of}{left_out}"
        return (
            f"sum of log p_T - log q_S: AUC {self.auc:.3f} between {of}{left_out}; means {self.mean_right:+.2f} and "
            f"{self.mean_wrong:+.2f} nats"
        )


def verdict_signal(
    cache: JointCache, rollouts: Artifact, verdicts: Artifact, parts: Iterable[int] | None = None
) -> VerdictSignal:
    """Read ``parts`` (all that are filled). Memory: one part at a time.

    Raises:
        DamagedPart: scores or verdicts were made from other rollouts.
    """
    sums: dict[bool, list[float]] = {True: [], False: []}
    left_out = 0
    judged = set(filled_parts(verdicts))
    for part in cache.parts() if parts is None else parts:
        if part not in judged:
            continue
        for scores in cache.sources(part):
            if scores.marker(part).inputs.get("rollouts") != rollouts.marker(part).checksum:
                raise DamagedPart(f"{scores} part {part} was scored from other rollouts than {rollouts}", part=part)
        table = read_rollouts(rollouts.part_folder(part), ["prompt_id", "sample", "logprobs"])
        rows = cache.read_part(part)
        correct = read_correct(verdicts, rollouts, part, table)
        for number, (logprobs, right) in enumerate(zip(table.column("logprobs").to_pylist(), correct, strict=True)):
            own = slice(rows.response_offsets[number], rows.response_offsets[number + 1])
            teacher = rows.sampled_logprob[own].astype(np.float64)
            student = np.asarray([] if logprobs is None else logprobs[: len(teacher)], np.float64)
            sampled = np.isfinite(student)  # not where another writer put a token
            if not sampled.any():
                left_out += 1
                continue
            sums[right].append(float((teacher - student)[sampled].sum()))
    means = [float(np.mean(one)) if one else None for one in (sums[True], sums[False])]
    return VerdictSignal(len(sums[True]), len(sums[False]), left_out, auc(sums[True], sums[False]), *means)


def auc(right: ArrayLike, wrong: ArrayLike) -> float | None:
    """Return the probability that a value of ``right`` exceeds one of ``wrong``, ties by half; None if one is empty."""
    high, low = np.asarray(right, np.float64), np.sort(np.asarray(wrong, np.float64))
    if not len(high) or not len(low):
        return None
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def sources_of(store: Path, scores: Artifact) -> tuple[Artifact, Artifact] | None:
    """Return the rollouts of these scores, and verdicts on them; None if ``store`` lacks either."""
    key = scores.identity.inputs.get("rollouts")
    if key is None or ("rollouts", key) not in set(listing.keys(store)):
        return None
    shown = scores.identity.inputs.get("verdicts")
    for kind, name in listing.keys(store):
        if kind != "verdicts" or shown not in (None, name):
            continue
        verdicts = listing.open_in(store, kind, name)
        if isinstance(verdicts, Artifact) and verdicts.identity.inputs.get("rollouts") == key:
            rollouts = listing.open_in(store, "rollouts", key)
            assert isinstance(rollouts, Artifact), rollouts
            return rollouts, verdicts
    return None


# -- verdicts ---------------------------------------------------------------------------------------------------------

# The verdict record: whether one response of a rollout is right, and why not.
#
# Produced by ``stages.judge``, part by part, from rollouts; read by ``stages.train``. One Parquet file a part, a row
# for each row of the rollouts' part, in the same order.


VERDICTS = RowRecord(
    "verdicts.parquet",
    pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            pa.field("correct", pa.bool_(), nullable=False),
            pa.field("form", pa.string()),  # equal for correct responses that are the same solution
            pa.field("reason", pa.string()),  # why it is not correct, in words
        ],
        metadata=named("verdicts"),
    ),
)


def read_correct(verdicts: Artifact, rollouts: Artifact, part: int, table: pa.Table) -> list[bool]:
    """Read whether each response of a part of ``rollouts``, whose rows are in ``table``, is right.

    Raises:
        DamagedPart: the verdicts are of other responses.
    """
    judged = VERDICTS.read(verdicts.part_folder(part), ("prompt_id", "sample", "correct")).to_pydict()
    expected = list(zip(*(table.column(name).to_pylist() for name in ("prompt_id", "sample")), strict=True))
    same_source = verdicts.marker(part).inputs.get("rollouts") == rollouts.marker(part).checksum
    if not same_source or list(zip(judged["prompt_id"], judged["sample"], strict=True)) != expected:
        raise DamagedPart(
            f"{verdicts} part {part} holds verdicts on other responses than those of {rollouts}",
            **verdicts.place(part),
            remedy="`eopd store verify --repair` re-queues them.",
        )
    correct: list[bool] = judged["correct"]
    return correct
