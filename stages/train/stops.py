"""Stop tokens of two models with different ones: merged into one outcome, or swapped.

``class``: the union E of both models' stop ids is one outcome in head, draws, sampled token and entropy, for p, q and
q_old alike. ``remap`` (the paper's): the teacher's first stop id and the student's first are swapped in everything
the teacher says, so that the student's stop is scored as the teacher's. A swap relabels the teacher's distribution
and leaves its entropy alone.

Letters: T tokens, E stop ids, K* head entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eopd.storage.errors import InputError
from eopd.storage.teacher_record import LOGPROB_FLOOR, TeacherRows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StopHandling:
    """Handling of stops. ``student_stop_ids`` and ``teacher_stop_ids``: each model's, its main one first."""

    mode: Literal["class", "remap"] = "class"
    student_stop_ids: tuple[int, ...] = ()
    teacher_stop_ids: tuple[int, ...] = ()

    @property
    def union(self) -> tuple[int, ...]:
        return tuple(sorted({*self.student_stop_ids, *self.teacher_stop_ids}))

    @property
    def merged(self) -> tuple[int, ...]:
        """Return ids that become one outcome: none under ``remap``, none if both models agree on a single id."""
        return self.union if self.mode == "class" and len(self.union) > 1 else ()

    def require(self, rows: TeacherRows) -> None:
        """Raise ValueError if ``rows`` lack a stop id's log-prob."""
        missing = sorted(set(self.union) - set(rows.stop_ids.tolist()))
        if missing and len(self.union) > 1:
            raise InputError(
                f"objective.stops={self.mode!r} needs the teacher's log-probs of stop ids {list(self.union)}, the "
                f"cache holds {rows.stop_ids.tolist()}",
                setting="train.objective.stops",
                remedy="score again with these stop ids",
            )

    def filled(self, rows: TeacherRows) -> TeacherRows:
        """Return ``rows`` with the floor as log-prob of the stop ids that they lack, for a loss that reads none."""
        missing = sorted(set(self.union) - set(rows.stop_ids.tolist()))
        if not missing:
            return rows
        ids = np.concatenate([rows.stop_ids, np.asarray(missing, np.int32)])
        floor = np.full((rows.tokens, len(missing)), LOGPROB_FLOOR, np.float32)
        order = np.argsort(ids)
        return replace(rows, stop_ids=ids[order], stop_logprobs=np.hstack([rows.stop_logprobs, floor])[:, order])

    def stop_logprobs(self, rows: TeacherRows) -> Array:
        """Return the teacher's log-probs [T, E] of ``union``, in its order."""
        columns = np.searchsorted(rows.stop_ids, np.asarray(self.union, dtype=np.int64))
        return np.asarray(rows.stop_logprobs[:, columns], dtype=np.float64)


def class_entropy(entropy: Array, stop_logprobs: Array) -> Array:
    """Return the entropy [T] after merging: the stops' own terms leave the sum, their common outcome's enters it.

    H' = H + sum_e p_e log p_e - P log P with P = sum_e p_e; never above H.
    """
    probs = np.exp(stop_logprobs)
    merged = np.logaddexp.reduce(stop_logprobs, axis=1)
    shift = (probs * stop_logprobs).sum(axis=1) - np.exp(merged) * merged
    lower: Array = np.maximum(entropy + np.minimum(shift, 0.0), 0.0)
    return lower


def swap_stops(rows: TeacherRows, stops: StopHandling) -> TeacherRows:
    """Return ``rows`` with the teacher's and the student's first stop ids swapped (``remap``)."""
    if not stops.student_stop_ids or not stops.teacher_stop_ids:
        return rows
    mine, theirs = stops.student_stop_ids[0], stops.teacher_stop_ids[0]
    if mine == theirs:
        return rows
    at = {stop: i for i, stop in enumerate(stops.union)}
    logprobs = stops.stop_logprobs(rows).astype(np.float32)
    swapped = logprobs[:, [at[theirs], at[mine]]]  # what each of (mine, theirs) is now worth

    def relabel(ids: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.where(ids == mine, theirs, np.where(ids == theirs, mine, ids)).astype(np.int32)

    def rescore(ids: NDArray[np.int32], values: NDArray[np.float32], token: NDArray[np.int64]) -> NDArray[np.float32]:
        out = np.where(ids == mine, swapped[token, 0], np.where(ids == theirs, swapped[token, 1], values))
        return out.astype(np.float32)

    everywhere = np.arange(rows.tokens)
    extra_token = np.repeat(everywhere, np.diff(rows.extra_offsets))
    return replace(
        rows,
        head_ids=relabel(rows.head_ids),
        draw_ids=relabel(rows.draw_ids),
        sampled_logprob=rescore(rows.token_ids, rows.sampled_logprob, everywhere),
        extra_logprobs=rescore(rows.extra_ids, rows.extra_logprobs, extra_token),
    )
