"""The result of the statistics head: flat arrays of T tokens, and their conversion to the score record.

Letters: T tokens, E stop ids, K* head entries, N* draws, X* extra ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.models.lm_head import LMHead
from eopd.storage.teacher_record import Float32, Int32, Int64, TeacherRows, offsets_of, take_ranges

# -- logit blocks -----------------------------------------------------------------------------------------------------

# One chunk's logits in cache-sized blocks, with running maxima and sums: the whole vocabulary is read once.
#
# Memory traffic, not arithmetic, is the cost of a large vocabulary after its matrix product. So the product is made
# block by block of ``W`` ids, and each block is reduced while it is in the processor's cache. The logits are kept,
# and the largest logit and the sum of exponentials of each group of neighbouring ids; with these the top entries and
# the draws find the few groups they must read.
#
# Letters: C rows of a chunk, V vocabulary, D hidden size, W ids of a block, N blocks, G groups.


GROUP = 64
"""Neighbouring ids that are kept account of together."""
BLANK = -1e30
"""Logit of ids that do not exist or are taken out: exp is 0, and 0 * BLANK is 0 where 0 * -inf would be NaN."""


class LogitBlocks:
    """Logits of up to ``rows`` tokens at a time, divided by the temperature. Buffers are reused between chunks."""

    def __init__(self, head: LMHead, temperature: float, rows: int, block: int) -> None:
        assert block % GROUP == 0
        device = head.weight.device
        self.head, self.rows, self.block, self.temperature = head, rows, block, temperature
        self.blocks = -(-head.vocab_size // block)
        groups = self.blocks * block // GROUP
        self.z = torch.empty(self.blocks, rows, block, device=device)  # [N, C, W]
        self.z[-1, :, head.vocab_size - (self.blocks - 1) * block :] = BLANK
        self._scratch = torch.empty(rows, block, device=device)
        self._group_max = torch.empty(rows, groups, device=device)
        self._group_sum = torch.empty(rows, groups, device=device)
        self.count = 0

    def compute(self, hidden: Tensor) -> None:
        """Fill from hidden [C, D]; afterwards every attribute below holds ``count = C`` rows.

        With m the largest logit so far, a block adds sum(exp(z - m)) and sum(exp(z - m) * z); blocks are brought to
        the final m in float64. Then lse = m + log(s) and H = lse - sum(exp(z - m) * z) / s.
        """
        count = self.count = hidden.shape[0]
        assert count <= self.rows
        per_block = self.block // GROUP
        maximum = torch.full((count,), -torch.inf, device=hidden.device)
        maxima, dots = [], []
        for number in range(self.blocks):
            z = self.z[number, :count]
            self._product(hidden, number, z)
            groups = slice(number * per_block, (number + 1) * per_block)
            group_max = z.view(count, per_block, GROUP).amax(2)
            maximum = torch.maximum(maximum, group_max.amax(1))
            exp = torch.sub(z, maximum[:, None], out=self._scratch[:count]).exp_()
            self._group_max[:count, groups] = group_max
            self._group_sum[:count, groups] = exp.view(count, per_block, GROUP).sum(2)
            dots.append(exp.mul_(z).sum(1))
            maxima.append(maximum)
        self.maximum = maximum  # [C]
        self._finish(torch.stack(maxima, 1).double(), torch.stack(dots, 1).double())

    def _finish(self, maxima: Tensor, dots: Tensor) -> None:
        """Bring every block [C, N] to the final maximum."""
        scale = (maxima - self.maximum.double()[:, None]).exp()
        by_block = self._group_sum[: self.count].view(self.count, self.blocks, -1)
        sums = by_block.sum(2, dtype=torch.float64)
        by_block.mul_(scale.float()[:, :, None])
        self.total = (scale * sums).sum(1)  # [C] float64: sum of exp(z - m)
        self.lse = self.maximum.double() + self.total.log()  # [C] float64, nats
        self.entropy = self.lse - (scale * dots).sum(1) / self.total  # [C] float64, nats

    def _product(self, hidden: Tensor, number: int, out: Tensor) -> None:
        ids = slice(number * self.block, min((number + 1) * self.block, self.head.vocab_size))
        self.head.logits_into(out[:, : ids.stop - ids.start], hidden, ids, self.temperature)

    @property
    def group_max(self) -> Tensor:
        """Largest logit of each group: [C, G]."""
        return self._group_max[: self.count]

    @property
    def group_sum(self) -> Tensor:
        """Sum of exp(z - m) of each group: [C, G]."""
        return self._group_sum[: self.count]

    def at(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return logits at (row, id) pairs of any equal shape; ids must be below V."""
        where = (ids // self.block * self.rows + rows) * self.block + ids % self.block
        return self.z.view(-1)[where]

    def in_groups(self, rows: Tensor, groups: Tensor) -> Tensor:
        """Return logits [..., ids of a group] of the groups at (row, group) pairs."""
        per_block = self.block // GROUP
        where = (groups // per_block * self.rows + rows) * per_block + groups % per_block
        return self.z.view(-1, GROUP)[where]

    def blank(self, rows: Tensor, ids: Tensor) -> None:
        """Remove ids from this chunk's distribution."""
        where = (ids // self.block * self.rows + rows) * self.block + ids % self.block
        self.z.view(-1)[where] = BLANK

    def count_above(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Count how many logits of each of ``rows`` [N] exceed ``logits`` [N].

        Comparisons are written and summed as float32: sums of booleans are not vectorised.
        """
        counts = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        above = self._scratch[: len(rows)]
        for number in range(self.blocks):
            torch.gt(self.z[number].index_select(0, rows), logits[:, None], out=above)
            counts += above.sum(1).long()
        return counts

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest logits of each row, largest first: (logits [C, k], ids [C, k]).

        They all lie in the k groups with the largest maxima, so only those are searched.
        """
        values, groups = self.group_max.topk(min(k, self.group_max.shape[1]), dim=1)
        rows = torch.arange(self.count, device=groups.device)[:, None]
        values, places = self.in_groups(rows, groups).flatten(1).topk(k, dim=1)
        return values, groups.gather(1, places // GROUP) * GROUP + places % GROUP


# -- draws ------------------------------------------------------------------------------------------------------------

# Unbiased draws from a row's remaining distribution, by one fixed random number per row.
#
# Systematic sampling lays the probabilities of a row end to end and takes what lies under the points ``c * (u + j)``,
# j = 0, 1, ...: id v is drawn ``p(v) / c`` times in expectation, and every draw weighs c. The uniform u depends on
# (seed, response, position) alone, so neither chunking nor packing nor the order of work changes a draw, except where
# float rounding moves a point across the border between two ids.
#
# Letters: T tokens, C rows of a chunk, G groups of ids, N draws of a row.


UInt64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: UInt64) -> UInt64:
    """Apply SplitMix64's output function (Steele, Lea and Flood 2014) elementwise: neighbouring inputs, unrelated
    bits."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def row_keys(seed: int, response: tuple[int, ...] | NDArray[np.int64], positions: NDArray[np.int64]) -> UInt64:
    """Return one key [T] for each position of a response that is named by integers which no other response has.

    Args:
        response: the N integers of all, or those of each position [T, N].
    """
    key = mix(np.asarray([seed], np.int64).view(np.uint64))
    for numbers in np.asarray(response, np.int64).reshape(-1, np.shape(response)[-1]).T:
        key = mix(key ^ numbers.astype(np.uint64))
    return mix(key ^ positions.astype(np.uint64))


def uniforms(keys: UInt64, count: int) -> NDArray[np.float64]:
    """Return independent uniforms in [0, 1) as a function of the keys: [T, count]."""
    with np.errstate(over="ignore"):
        streams = keys[:, None] + np.arange(count, dtype=np.uint64)[None, :] * np.uint64(0xD1342543DE82EF95)
    return (mix(streams) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def systematic_points(uniform: Tensor, total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return points [C, N] ``weight * (uniform + j)`` and how many of each row lie below its total, [C].

    All in one unit: ``total`` is the remaining mass [C], ``weight`` the draw constant in that unit [C].
    """
    counts = torch.ceil(total / weight - uniform).clamp_(min=0).long()
    most = int(counts.max()) if len(counts) else 0
    steps = torch.arange(most, device=uniform.device, dtype=torch.float64)
    return weight[:, None] * (uniform[:, None] + steps), counts


def ids_at(blocks: LogitBlocks, group_mass: Tensor, points: Tensor, counts: Tensor) -> Tensor:
    """Return ids [sum(counts)] under the points of each row, row after row.

    Args:
        group_mass: [C, G] float64, sum of exp(z - m) of each group, ids that were taken out left out.
        points: [C, N] of which the first ``counts`` of a row are used; ascending or not.
    """
    ends = group_mass.cumsum(1)
    # rounding may put a point at the very end of its row, where no group begins
    total = ends[:, -1:]
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    groups = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)
    wanted = torch.arange(points.shape[1], device=points.device) < counts[:, None]
    rows, places = wanted.nonzero(as_tuple=True)
    group = groups[rows, places]
    within = points[rows, places] - (ends[rows, group] - group_mass[rows, group])
    mass = (blocks.in_groups(rows, group) - blocks.maximum[rows, None]).exp_().double()
    filled = mass.cumsum(1)
    # and the same in its group
    place = torch.minimum((filled <= within[:, None]).sum(1), (filled < filled[:, -1:]).sum(1))
    return group * mass.shape[1] + place


# -- token batch ------------------------------------------------------------------------------------------------------

# Requests for statistics of hidden states, and the error for logits that are not finite. Letters: T tokens, X* extra
# ids.


class NotFinite(ValueError):
    """The teacher's logits of a token are NaN or infinite. ``row`` counts within the call's T tokens."""

    def __init__(self, row: int) -> None:
        super().__init__(f"the teacher's logits of row {row} are NaN or infinite")
        self.row = row


@dataclass(frozen=True)
class TokenBatch:
    """A request for statistics of T hidden states."""

    sampled_ids: NDArray[np.int64]  # [T] token whose log-prob and rank are wanted
    keys: UInt64  # [T] identity of each row, for its draws (draws.row_keys)
    extra_counts: NDArray[np.int64] | None = None  # [T] extra ids of each token; None: no extra ids
    extra_ids: NDArray[np.int64] | None = None  # [X*]

    def chunks(self, rows: int) -> Iterator[tuple[int, TokenBatch]]:
        """Yield (first row, request for it and the ``rows`` - 1 rows after it), and so on to the end."""
        ends = None if self.extra_counts is None else np.cumsum(self.extra_counts)
        for start in range(0, len(self.keys), rows):
            stop = min(start + rows, len(self.keys))
            sampled, keys = self.sampled_ids[start:stop], self.keys[start:stop]
            if ends is None or self.extra_counts is None or self.extra_ids is None:
                yield start, TokenBatch(sampled, keys)
                continue
            extra = slice(ends[start - 1] if start else 0, ends[stop - 1])
            yield start, TokenBatch(sampled, keys, self.extra_counts[start:stop], self.extra_ids[extra])


# -- the result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics as ``TeacherRows`` describes them, with counts per token in place of offsets."""

    token_ids: Int32  # [T]
    entropy: Float32  # [T]
    sampled_logprob: Float32  # [T]
    sampled_rank: Int32  # [T]
    stop_logprobs: Float32  # [T, E]
    tail_logmass: Float32  # [T]
    head_counts: Int64  # [T]
    head_ids: Int32  # [K*]
    head_logprobs: Float32  # [K*]
    draw_counts: Int64  # [T]
    draw_ids: Int32  # [N*]
    extra_counts: Int64  # [T]
    extra_ids: Int32  # [X*]
    extra_logprobs: Float32  # [X*]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


_RAGGED = {
    "head_ids": "head_counts",
    "head_logprobs": "head_counts",
    "draw_ids": "draw_counts",
    "extra_ids": "extra_counts",
    "extra_logprobs": "extra_counts",
}


def empty(stops: int) -> TokenStatistics:
    """Return the statistics of no token."""
    ints, wide, floats = np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32)
    return TokenStatistics(
        token_ids=ints,
        entropy=floats,
        sampled_logprob=floats,
        sampled_rank=ints,
        stop_logprobs=np.zeros((0, stops), np.float32),
        tail_logmass=floats,
        head_counts=wide,
        head_ids=ints,
        head_logprobs=floats,
        draw_counts=wide,
        draw_ids=ints,
        extra_counts=wide,
        extra_ids=ints,
        extra_logprobs=floats,
    )


def concatenate(pieces: Sequence[TokenStatistics]) -> TokenStatistics:
    """Concatenate statistics, at least one."""
    if len(pieces) == 1:
        return pieces[0]
    names = [field.name for field in fields(TokenStatistics)]
    return TokenStatistics(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names})


def take(statistics: TokenStatistics, tokens: Int64) -> TokenStatistics:
    """Select the given tokens (numbers into T), in that order."""
    taken: dict[str, Any] = {}
    places: dict[str, Int64] = {}
    for name in {*_RAGGED.values()}:
        counts = getattr(statistics, name)
        starts = np.cumsum(counts) - counts
        places[name] = take_ranges(starts[tokens], counts[tokens])
    for field in fields(statistics):
        index = places[_RAGGED[field.name]] if field.name in _RAGGED else tokens
        taken[field.name] = getattr(statistics, field.name)[index]
    return TokenStatistics(**taken)


def in_response_order(
    statistics: TokenStatistics,
    order: Sequence[int],
    lengths: Sequence[int],
    stop_ids: Int32,
    responses: int,
) -> TeacherRows:
    """Build the record of responses 0 .. ``responses`` - 1 from statistics in packed order.

    Args:
        order: number of the response of each consecutive run of tokens; responses that it lacks get no rows.
        lengths: tokens of each run.
    """
    run_lengths = np.asarray(lengths, np.int64)
    numbers = np.asarray(order, np.int64)
    assert int(run_lengths.sum()) == statistics.tokens
    assert len(np.unique(numbers)) == len(numbers)
    by_number = np.argsort(numbers)
    starts = np.cumsum(run_lengths) - run_lengths
    sorted_statistics = take(statistics, take_ranges(starts[by_number], run_lengths[by_number]))
    counts = np.zeros(responses, np.int64)
    counts[numbers] = run_lengths
    return TeacherRows(
        response_offsets=offsets_of(counts),
        token_ids=sorted_statistics.token_ids,
        entropy=sorted_statistics.entropy,
        sampled_logprob=sorted_statistics.sampled_logprob,
        sampled_rank=sorted_statistics.sampled_rank,
        stop_ids=stop_ids,
        stop_logprobs=sorted_statistics.stop_logprobs,
        head_offsets=offsets_of(sorted_statistics.head_counts),
        head_ids=sorted_statistics.head_ids,
        head_logprobs=sorted_statistics.head_logprobs,
        tail_logmass=sorted_statistics.tail_logmass,
        draw_offsets=offsets_of(sorted_statistics.draw_counts),
        draw_ids=sorted_statistics.draw_ids,
        extra_offsets=offsets_of(sorted_statistics.extra_counts),
        extra_ids=sorted_statistics.extra_ids,
        extra_logprobs=sorted_statistics.extra_logprobs,
    )
