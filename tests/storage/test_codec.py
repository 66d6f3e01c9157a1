"""What is stored comes back: exactly where it is a number of things, within the stated errors where it is a log."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopd.storage import codec
from eopd.storage import codec as quantise
from eopd.storage import codec as symbols
from eopd.storage import encode as packing
from eopd.storage.codec import STOP_FLOOR, Layout, RawBits
from eopd.storage.decode import decode
from eopd.storage.encode import balancing_offset, encode, encode_rows
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, TeacherRows, offsets_of, sums, take_ranges

from .making import STOPS, dense, rows_of

EXACT = ("response_offsets", "token_ids", "sampled_rank", "stop_ids", "head_offsets", "head_ids", "draw_offsets")
EXACT += ("extra_offsets", "extra_ids")


def round_trip(rows: TeacherRows, head: HeadRule) -> TeacherRows:
    layout = Layout.of(head, rows.stop_ids.tolist())
    return decode(encode(rows, layout), layout)


def assert_same(result: TeacherRows, rows: TeacherRows) -> None:
    for name in EXACT:
        np.testing.assert_array_equal(getattr(result, name), getattr(rows, name), err_msg=name)
        assert getattr(result, name).dtype == getattr(rows, name).dtype, name
    draws = np.split(rows.draw_ids, rows.draw_offsets[1:-1])
    np.testing.assert_array_equal(result.draw_ids, np.concatenate([np.sort(some) for some in draws]))
    for name in ("head_logprobs", "tail_logmass", "sampled_logprob", "extra_logprobs"):
        error = np.abs(getattr(result, name).astype(np.float64) - getattr(rows, name))
        assert error.max(initial=0.0) <= quantise.MAX_ERROR, (name, error.max())
        assert getattr(result, name).dtype == np.float32
    assert np.abs(result.entropy - rows.entropy).max(initial=0.0) <= quantise.MAX_ENTROPY_ERROR
    assert_stops(result, rows)
    if rows.tokens:
        head_mass = np.add.reduceat(np.exp(result.head_logprobs.astype(np.float64)), result.head_offsets[:-1])
        np.testing.assert_allclose(head_mass + np.exp(result.tail_logmass.astype(np.float64)), 1.0, atol=1e-6)


def assert_stops(result: TeacherRows, rows: TeacherRows) -> None:
    last = np.zeros(rows.tokens, bool)
    last[rows.response_offsets[1:][np.diff(rows.response_offsets) > 0] - 1] = True
    kept = (rows.stop_logprobs >= STOP_FLOOR) | last[:, None]
    assert np.abs(result.stop_logprobs - rows.stop_logprobs)[kept].max(initial=0.0) <= quantise.MAX_ERROR
    assert (result.stop_logprobs[~kept] == LOGPROB_FLOOR).all()


rules = st.one_of(
    st.builds(
        HeadRule,
        k_max=st.integers(1, 40),
        min_prob=st.sampled_from([0.003, 0.03, 0.5, 1.0]),
        full_head_above=st.sampled_from([-1.0, 0.0, 0.4, 3.0]),
        draws=st.sampled_from(["none", "beyond_head"]),
    ),
    st.builds(HeadRule, k_max=st.integers(1, 8), draws=st.just("full"), n_draws=st.integers(1, 60)),
)


@settings(max_examples=60, deadline=None)
@given(
    head=rules,
    seed=st.integers(0, 2**20),
    lengths=st.lists(st.integers(0, 30), min_size=0, max_size=6),
    vocabulary=st.sampled_from([8, 33, 700]),
    extra_k=st.integers(0, 5),
    sharpness=st.sampled_from([0.01, 1.0, 4.0, 40.0]),
    stops=st.sampled_from([(), (5,), STOPS]),
)
def test_round_trip(
    head: HeadRule,
    seed: int,
    lengths: list[int],
    vocabulary: int,
    extra_k: int,
    sharpness: float,
    stops: tuple[int, ...],
) -> None:
    rows = rows_of(dense(seed, lengths, vocabulary, sharpness), head, stops=stops, extra_k=extra_k, seed=seed)
    assert_same(round_trip(rows, head), rows)


def test_a_head_of_the_whole_vocabulary_leaves_no_tail() -> None:
    head = HeadRule(k_max=64, full_head_above=-1.0)
    rows = rows_of(dense(0, [50], 64), head)
    decoded = round_trip(rows, head)
    assert (decoded.tail_logmass == LOGPROB_FLOOR).all()
    assert_same(decoded, rows)


def test_ids_up_to_the_largest() -> None:
    head = HeadRule(k_max=3)
    rows = rows_of(dense(1, [20], 30), head)
    moved = {name: getattr(rows, name) * 500_000 for name in ("token_ids", "head_ids", "draw_ids")}
    big = TeacherRows(**{**vars(rows), **moved})
    assert_same(round_trip(big, head), big)
    with pytest.raises(ValueError, match="head_ids must be in 0"):
        encode(TeacherRows(**{**vars(rows), "head_ids": rows.head_ids + codec.MAX_ID}), Layout.of(head, STOPS))


def test_a_token_that_ties_with_another_keeps_its_rank_and_logprob() -> None:
    """Ranks among equals are a matter of taste; a stored rank that is not the place in the head becomes a miss."""
    head = HeadRule(k_max=4, full_head_above=-1.0, draws="none")
    rows = rows_of(dense(2, [9], 12), head)
    rank = rows.sampled_rank.copy()
    rank[rank < 3] += 1
    odd = TeacherRows(**{**vars(rows), "sampled_rank": rank})
    assert_same(round_trip(odd, head), odd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {"entropy": rows.entropy[:-1]}, "entropy has"),
        (lambda rows: {"entropy": rows.entropy - 1.0}, "entropy must be"),
        (lambda rows: {"entropy": np.full_like(rows.entropy, np.nan)}, "entropy must be"),
        (lambda rows: {"tail_logmass": np.zeros_like(rows.tail_logmass)}, "sum to"),
        (lambda rows: {"tail_logmass": np.full_like(rows.tail_logmass, np.nan)}, "not finite"),
        (lambda rows: {"head_logprobs": -rows.head_logprobs}, "at most 0"),
        (lambda rows: {"head_logprobs": rows.head_logprobs[::-1].copy()}, "not sorted"),
        (lambda rows: {"head_offsets": np.maximum.accumulate(np.r_[0, 0, rows.head_offsets[2:]])}, "empty head"),
        (lambda rows: {"draw_ids": -1 - rows.draw_ids}, "draw_ids must be"),
    ],
)
def test_what_is_no_distribution_is_refused(change: object, message: str) -> None:
    head = HeadRule()
    rows = rows_of(dense(3, [30, 12], 100), head)
    assert callable(change)
    with pytest.raises(ValueError, match=message):
        encode(TeacherRows(**{**vars(rows), **change(rows)}), Layout.of(head, STOPS))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), width=st.integers(2, 40), scale=st.floats(0.01, 8.0))
def test_the_balancing_offset_balances(seed: int, width: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = -np.sort(rng.exponential(scale, (50, width)), axis=1)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    scaled, weights = values * quantise.STEPS_PER_NAT, np.exp(values)
    room = np.empty((2, width))
    offset = np.asarray([balancing_offset(x.copy(), w, *room) for x, w in zip(scaled, weights, strict=True)])
    assert ((offset >= 0) & (offset <= 1)).all()
    moved = scaled + offset[:, None]
    # at a change of code the rounding may fall either way: nudge
    means = [np.abs((weights * (np.rint(moved + e) - moved)).sum(axis=1)) for e in (-1e-9, 0.0, 1e-9)]
    assert np.min(means, axis=0).max() < 1e-6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), above=st.sampled_from([-1.0, 0.8, 3.0]))
def test_the_same_row_has_the_same_codes_in_any_company(seed: int, above: float) -> None:
    rows = rows_of(dense(seed, [40], 50, 2.0), HeadRule(k_max=12, full_head_above=above))
    codes, tails = encode_rows(rows.head_logprobs, rows.head_offsets, rows.tail_logmass)
    for t in range(rows.tokens):
        low, high = rows.head_offsets[t : t + 2]
        alone = encode_rows(rows.head_logprobs[low:high], np.asarray([0, high - low]), rows.tail_logmass[t : t + 1])
        np.testing.assert_array_equal(alone[0], codes[low:high])
        np.testing.assert_array_equal(alone[1], tails[t : t + 1])


responses = st.lists(st.lists(st.integers(0, (1 << 24) - 1), max_size=20), max_size=4)


@settings(deadline=None)
@given(first=responses, second=responses, extra=st.integers(0, 3))
def test_symbols_and_raw_bits(first: list[list[int]], second: list[list[int]], extra: int) -> None:
    """Two streams of every response, one after the other."""
    count = min(len(first), len(second))
    streams = []
    for lists in (first[:count], second[:count]):
        flat = np.asarray([value for values in lists for value in values], np.int32)
        streams.append((flat, offsets_of(np.asarray([len(values) for values in lists], np.int64))))
    bits = np.zeros(count, np.int64)
    for values, bounds in streams:
        packing.count(values, bounds, extra, bits)
    bit = 8 * offsets_of(-(-bits // 8))
    raw = np.zeros(int(bit[-1] // 8) + 4, np.uint8)
    at = bit[:-1].copy()
    for values, bounds in streams:
        symbol, place, start = np.empty(len(values), np.uint8), bounds[:-1].copy(), at.copy()
        packing.append(values, bounds, extra, symbol, place, raw, at)
        np.testing.assert_array_equal(symbol, packing.symbols_of(values, extra))
        np.testing.assert_array_equal(place, bounds[1:])
        counts = [symbols.raw_counts(symbol[low:high], extra) for low, high in itertools.pairwise(bounds)]
        np.testing.assert_array_equal(at - start, [some.sum(dtype=np.int64) for some in counts])
        places = [low + offsets_of(some)[:-1] for low, some in zip(start, counts, strict=True)]
        joined = symbols.join(symbol, extra, raw, np.concatenate([np.zeros(0, np.int64), *places]))
        np.testing.assert_array_equal(joined, values)
    np.testing.assert_array_equal(at, bit[:-1] + bits)


def test_a_number_too_large_for_its_symbol_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy: numbers must be in"):
        symbols.check("entropy", np.asarray([1 << 24]), 3)
    with pytest.raises(ValueError, match="numbers must be in"):
        symbols.check("tail", np.asarray([-1]), 3)


@given(st.lists(st.lists(st.integers(0, 1000), max_size=5), max_size=8))
def test_ragged(rows: list[list[int]]) -> None:
    flat = np.asarray([value for row in rows for value in row], np.int64)
    offsets = offsets_of(np.asarray([len(row) for row in rows], np.int64))
    np.testing.assert_array_equal(sums(flat, offsets), [value for row in rows for value in itertools.accumulate(row)])
    np.testing.assert_array_equal(flat[take_ranges(offsets[:-1], np.diff(offsets))], flat)


def test_zigzag() -> None:
    values = np.arange(-300, 300)
    np.testing.assert_array_equal(symbols.unzigzag(symbols.zigzag(values)), values)
    np.testing.assert_array_equal(np.sort(symbols.zigzag(values)), np.arange(600))


def test_guesses_do_not_sit_where_platforms_could_round_apart() -> None:
    """They are computed in floating point on both sides: no value may be within 1e-7 of a change."""
    codes = np.arange(quantise.MAX_CODE + 1)
    for weight in (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 1.0):
        value = np.exp(-codes / quantise.STEPS_PER_NAT) / weight + 1e-6
        assert np.abs(value - np.rint(value)).min() > 1e-10
    assert codec.draw_guess(np.asarray([0]), 0.0).tolist() == [0]


def test_raw_bits_follow_the_entries() -> None:
    bits = RawBits(np.asarray([2, 0, 1]))
    first = bits.place(np.asarray([3, 1, 5], np.uint8), np.asarray([2, 0, 1]))
    np.testing.assert_array_equal(first, [0, 3, 32])
    second = bits.place(np.asarray([2, 2], np.uint8), np.asarray([1, 0, 1]))
    np.testing.assert_array_equal(second, [4, 37])
