"""Padded outcomes from ragged teacher rows: the ids that a token's loss reads, and the teacher's log-probs at them.

Numpy only, run in the loader. Sums of probabilities are in float64.

Letters: T tokens, N unique (token, id) pairs, K outcome columns (column 0 is the merged stop where there is one),
E merged stop ids, V student vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.stages.train.stops import class_entropy
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, TeacherRows

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Bools = NDArray[np.bool_]

LOG_ZERO = -1e30
"""Stand-in for log 0: exp gives 0, and unlike -inf it makes no NaN in products and gradients."""
TAIL_RESOLUTION = 1.0 / 256.0
"""A difference of a tail's mass smaller than this fraction of it is the cache's rounding, not a mass."""


@dataclass(frozen=True)
class SupportPlan:
    """Outcomes that a batch must hold besides the sampled token and the stops."""

    head_k: int | None = 16  # head entries; None: all stored
    draws: str = "none"  # none | beyond_head | full
    extra: int = 0  # ids of the student's own, its most probable first
    stops: bool = True  # apply stop handling
    stop_logprobs: bool = True  # the loss reads what the teacher says of stops, not only which ids they are


@dataclass
class Entries:
    """Ragged (token, id, value) triples."""

    token: Index
    ids: Index
    value: Array

    def where(self, keep: Bools) -> Entries:
        return Entries(self.token[keep], self.ids[keep], self.value[keep])


def entries_of(offsets: Index, ids: NDArray[np.int32], value: NDArray[np.float32] | float) -> Entries:
    token = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    values = np.broadcast_to(np.asarray(value, dtype=np.float64), ids.shape)
    return Entries(token, ids.astype(np.int64), values)


class Layout:
    """Conversion of one batch of rows to outcomes. Sums of probabilities are in float64."""

    def __init__(
        self,
        rows: TeacherRows,
        rule: HeadRule,
        plan: SupportPlan,
        vocab: int,
        merged: tuple[int, ...],
        stop_logprobs: Array,
    ) -> None:
        """``merged``: stop ids that are one outcome, with the teacher's log-probs [T, E] of them; may be none."""
        self.rows, self.rule, self.plan, self.vocab, self.merged = rows, rule, plan, vocab, merged
        self.stop_logprobs = stop_logprobs
        self.tail_mass = np.exp(rows.tail_logmass.astype(np.float64))
        self.stop_logprob = np.full(rows.tokens, LOG_ZERO)  # of the merged outcome, where it is in the head
        self.head = self._head()

    def _is_stop(self, ids: Index) -> Bools:
        return np.isin(ids, np.asarray(self.merged, dtype=np.int64))

    def _to_tail(self, entries: Entries) -> None:
        np.add.at(self.tail_mass, entries.token, np.exp(entries.value))

    def _head(self) -> Entries:
        """Return the head without stops and ids beyond the student's vocabulary, at most ``head_k`` outcomes per token;
        the merged stop goes to ``stop_logprob`` if it belongs to the head: a member is there, or its sum exceeds the
        smallest entry."""
        rows, k = self.rows, self.plan.head_k
        head = entries_of(rows.head_offsets, rows.head_ids, rows.head_logprobs)
        smallest = np.full(rows.tokens, np.inf)
        np.minimum.at(smallest, head.token, head.value)
        is_stop = self._is_stop(head.ids)
        members, head = head.where(is_stop), head.where(~is_stop)
        strangers = head.ids >= self.vocab
        self._to_tail(head.where(strangers))
        head = head.where(~strangers)

        inside, outside = self._stop_masses(members)
        with np.errstate(divide="ignore"):
            total = np.log(inside + outside)
        joins = (inside > 0) | (total > smallest) if self.merged else np.zeros(rows.tokens, dtype=bool)
        # Rank of each entry among its token's outcomes, the merged stop included.
        first = np.searchsorted(head.token, np.arange(rows.tokens))
        rank = np.arange(len(head.token)) - first[head.token] + (joins[head.token] & (total[head.token] >= head.value))
        stop_rank = np.bincount(head.token, weights=head.value > total[head.token], minlength=rows.tokens)
        if k is not None:
            self._to_tail(head.where(rank >= k))
            head = head.where(rank < k)
            joins &= stop_rank < k
        self.tail_mass = np.where(
            joins,
            np.maximum(self.tail_mass - outside, TAIL_RESOLUTION * self.tail_mass * (outside > 0)),
            self.tail_mass + inside,
        )
        self.stop_logprob = np.where(joins, total, LOG_ZERO)
        return head

    def _stop_masses(self, members: Entries) -> tuple[Array, Array]:
        """Return the mass [T] of merged stops inside the stored head, and of those in its tail."""
        inside = np.zeros(self.rows.tokens)
        np.add.at(inside, members.token, np.exp(members.value))
        column = np.searchsorted(np.asarray(self.merged, dtype=np.int64), members.ids)
        beyond = np.exp(self.stop_logprobs)
        beyond[members.token, column] = 0.0
        return inside, beyond.sum(axis=1)

    def _draws(self) -> Entries:
        """Return draws with their weights; ids in the head or outside the student's vocabulary are dropped."""
        if self.plan.draws == "none":
            return entries_of(np.zeros(self.rows.tokens + 1, np.int64), np.zeros(0, np.int32), 0.0)
        if self.rule.draws != self.plan.draws:
            raise ValueError(f"the objective reads draws {self.plan.draws!r}, the cache holds {self.rule.draws!r}")
        weight = self.rule.min_prob if self.rule.draws == "beyond_head" else 1.0 / self.rule.n_draws
        return entries_of(self.rows.draw_offsets, self.rows.draw_ids, weight)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the fields of a ``TeacherBatch``, by name."""
        rows, tokens, merged = self.rows, self.rows.tokens, bool(self.merged)
        head, draws = self.head, self._draws()
        extra = entries_of(rows.extra_offsets, rows.extra_ids, rows.extra_logprobs)
        rank = np.arange(len(extra.ids)) - rows.extra_offsets[extra.token]  # as the student ranked them
        extra = extra.where((extra.ids < self.vocab) & (rank < self.plan.extra))
        sampled = entries_of(np.arange(tokens + 1), rows.token_ids, rows.sampled_logprob)
        stop_draws = np.bincount(draws.token, weights=draws.value * self._is_stop(draws.ids), minlength=tokens)
        sampled_stop, extra_stop = self._is_stop(sampled.ids), extra.token[self._is_stop(extra.ids)]
        draws = draws.where(~self._is_stop(draws.ids) & (draws.ids < self.vocab))
        extra = extra.where(~self._is_stop(extra.ids))

        place = Placement(tokens, self.vocab, [head, draws, extra, sampled.where(~sampled_stop)])
        width = place.width + merged

        def mark(entries: Entries) -> Bools:
            out: Bools = np.zeros((tokens, width), dtype=bool)
            out[entries.token, place.column(entries) + merged] = True
            return out

        logprob = np.full((tokens, width), LOG_ZERO)
        logprob[extra.token, place.column(extra) + merged] = extra.value
        logprob[head.token, place.column(head) + merged] = head.value
        in_head, in_extra = mark(head), mark(extra)
        target = np.zeros((tokens, width))
        np.add.at(target, (draws.token, place.column(draws) + merged), draws.value)
        if merged:
            total = np.logaddexp.reduce(self.stop_logprobs, axis=1)
            in_head[:, 0] = self.stop_logprob > LOG_ZERO
            in_extra[extra_stop, 0] = True
            logprob[:, 0] = np.where(in_head[:, 0], self.stop_logprob, np.where(in_extra[:, 0], total, LOG_ZERO))
            full = self.plan.draws == "full"
            target[:, 0] = stop_draws if full else np.where(in_head[:, 0], 0.0, stop_draws)
        logprob, tail, known_tail = self._normalise(logprob, in_head, in_extra)
        if self.plan.draws == "beyond_head":
            target += np.where(in_head, np.exp(logprob), 0.0)

        entropy, sampled_logprob = rows.entropy.astype(np.float64), rows.sampled_logprob.astype(np.float64)
        if merged:
            entropy = class_entropy(entropy, self.stop_logprobs)
            sampled_logprob = np.where(sampled_stop, np.logaddexp.reduce(self.stop_logprobs, axis=1), sampled_logprob)
        sampled_column = np.zeros(tokens, np.int64)
        sampled_column[~sampled_stop] = place.column(sampled.where(~sampled_stop)) + merged

        return {
            "support_ids": place.ids,
            "support_slots": place.slots,
            "support_offsets": place.offsets,
            "width": np.asarray(place.width),
            "stop_columns": np.asarray([i for i in self.merged if i < self.vocab], dtype=np.int64),
            "logprob": logprob,
            "in_head": in_head,
            "in_extra": in_extra,
            "target": target,
            "tail": tail,
            "known_tail": known_tail,
            "entropy": entropy,
            "sampled": sampled_logprob,
            "sampled_column": sampled_column,
        }

    def _normalise(self, logprob: Array, in_head: Bools, in_extra: Bools) -> tuple[Array, Array, Array]:
        """Normalise head and tail to sum to 1, so that no rounding makes a divergence negative; then head and extra
        alike. Returns (logprob, tail, known tail)."""
        mass = np.where(in_head, np.exp(logprob), 0.0).sum(axis=1)
        floor = np.exp(LOGPROB_FLOOR)
        tail = np.maximum(self.tail_mass, floor)
        shift = np.log(mass + tail)
        logprob = np.where(in_head | in_extra, logprob - shift[:, None], LOG_ZERO)
        log_tail = np.log(tail) - shift
        beyond = np.where(in_extra & ~in_head, np.exp(logprob), 0.0).sum(axis=1)
        if not beyond.any():
            return logprob, log_tail, log_tail
        tail = np.exp(log_tail)
        left = np.maximum(tail - beyond, TAIL_RESOLUTION * tail * (beyond > 0))
        # The extra entries give way where they and the smallest tail would exceed the tail's mass.
        scale = np.log(np.maximum(tail - left, floor)) - np.log(np.maximum(beyond, floor))
        logprob = np.where(in_extra & ~in_head, logprob + scale[:, None], logprob)
        return logprob, log_tail, np.log(np.maximum(left, floor))


class Placement:
    """Unique (token, id) pairs of several lists of entries, each with a column within its token."""

    def __init__(self, tokens: int, vocab: int, lists: list[Entries]) -> None:
        self._vocab = vocab
        self._keys = np.unique(np.concatenate([e.token * vocab + e.ids for e in lists]))
        token, self.ids = np.divmod(self._keys, vocab)
        self.offsets: Index = np.searchsorted(token, np.arange(tokens + 1))
        self._column = np.arange(len(token)) - self.offsets[token]
        self.width = int(np.diff(self.offsets).max(initial=0))
        self.slots: Index = token * self.width + self._column

    def column(self, entries: Entries) -> Index:
        columns: Index = self._column[np.searchsorted(self._keys, entries.token * self._vocab + entries.ids)]
        return columns
