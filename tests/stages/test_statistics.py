"""The statistics head against a dense float64 oracle: values, draws, chunks, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eopd.stages.models.lm_head import LMHead
from eopd.stages.models.threads import torch_threads
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_statistics import (
    NotFinite,
    TokenBatch,
    TokenStatistics,
    concatenate,
    in_response_order,
    row_keys,
    take,
    uniforms,
)
from eopd.storage.teacher_record import LOGPROB_FLOOR, HeadRule, Int64
from tests.bounds import entropy_rounding, logits_rounding, logprobs_rounding
from tests.stages.dense_teacher import Dense, dense

D = 24
Float64 = NDArray[np.float64]


def _head(vocabulary: int, seed: int = 0, **traits: Any) -> LMHead:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, D, generator=generator)
    return replace(LMHead(weight, None, 1.0, None, vocabulary), **traits)


def _hidden(tokens: int, seed: int = 1) -> torch.Tensor:
    """From flat to nearly one-hot rows."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.logspace(-1.5, 0.7, tokens)[torch.randperm(tokens, generator=generator)]
    return torch.randn(tokens, D, generator=generator) * sharpness[:, None]


def _batch(head: LMHead, hidden: torch.Tensor, extra: int = 0, seed: int = 0) -> TokenBatch:
    """Sampled tokens of every rank: half from the distribution, half uniform."""
    torch.manual_seed(seed)
    own = torch.multinomial(head.logits(hidden).softmax(1), 1)[:, 0]
    other = torch.randint(0, head.vocab_size, own.shape)
    sampled = torch.where(torch.rand(len(own)) < 0.5, own, other).numpy()
    keys = row_keys(seed, (7, 1), np.arange(len(own)))
    if not extra:
        return TokenBatch(sampled, keys)
    counts = torch.randint(0, extra + 1, own.shape).numpy()
    return TokenBatch(sampled, keys, counts, torch.randint(0, head.vocab_size, (int(counts.sum()),)).numpy())


def _check(
    head: LMHead,
    hidden: torch.Tensor,
    batch: TokenBatch,
    result: TokenStatistics,
    rule: HeadRule,
    stops: tuple[int, ...],
    temperature: float,
) -> None:
    oracle = dense(head, hidden, temperature)
    of_logits = logits_rounding(head, hidden, temperature)
    of_logprobs = logprobs_rounding(of_logits, oracle.logits)
    of_entropy = entropy_rounding(of_logprobs, oracle.entropy).numpy()
    bound = of_logprobs.numpy()
    assert (np.abs(result.entropy - oracle.entropy.numpy()) <= of_entropy).all()
    rows = np.arange(len(hidden))
    logprobs = np.maximum(oracle.logprobs.numpy(), LOGPROB_FLOOR)
    assert np.array_equal(result.token_ids, batch.sampled_ids)
    assert (np.abs(result.sampled_logprob - logprobs[rows, batch.sampled_ids]) <= bound).all()
    above = oracle.logits - oracle.logits[rows, batch.sampled_ids][:, None]
    apart = 2 * of_logits[:, None]  # logits nearer to each other may stand in either order
    assert ((above > apart).sum(1).numpy() <= result.sampled_rank).all()
    assert (result.sampled_rank <= (above > -apart).sum(1).numpy()).all()
    assert result.stop_logprobs.shape == (len(rows), len(stops))
    assert (np.abs(result.stop_logprobs - logprobs[:, list(stops)]) <= bound[:, None]).all()
    _check_sizes(result.head_counts, oracle, rule, bound, of_entropy)
    counts, order = result.head_counts, oracle.logits.argsort(1, descending=True).numpy()
    ends = np.cumsum(counts)
    for row in rows:
        part = slice(ends[row] - counts[row], ends[row])
        ids, best = result.head_ids[part], order[row, : counts[row]]
        assert len(set(ids.tolist())) == counts[row]
        # soft-capping makes many logits that agree to rounding
        assert np.abs(oracle.logits[row, ids] - oracle.logits[row, best]).max() <= apart[row]
        assert np.abs(result.head_logprobs[part] - logprobs[row, best]).max() <= bound[row]
        tail = np.exp(np.delete(oracle.logprobs[row].numpy(), ids)).sum()
        expected = max(np.log(tail), LOGPROB_FLOOR) if tail > 0 else LOGPROB_FLOOR
        assert abs(result.tail_logmass[row] - expected) <= 2 * bound[row]
    _check_draws(head, hidden, batch, result, rule, temperature)
    if batch.extra_ids is not None:
        assert batch.extra_counts is not None
        of = np.repeat(rows, batch.extra_counts)
        assert np.array_equal(result.extra_counts, batch.extra_counts)
        assert np.array_equal(result.extra_ids, batch.extra_ids)
        assert (np.abs(result.extra_logprobs - logprobs[of, batch.extra_ids]) <= bound[of]).all()


def _check_sizes(counts: Int64, oracle: Dense, rule: HeadRule, bound: Float64, of_entropy: Float64) -> None:
    """A probability at ``min_prob`` and an entropy at ``full_head_above`` may fall on either side."""
    most = min(rule.k_max, oracle.logits.shape[1])
    over = (oracle.logprobs - np.log(rule.min_prob)).numpy()
    fewest, widest = (np.clip((over >= side * bound[:, None]).sum(1), 1, most) for side in (1, -1))
    above = oracle.entropy.numpy() - rule.full_head_above
    fewest[above > of_entropy] = most
    widest[above > -of_entropy] = most
    assert ((counts >= fewest) & ((counts <= widest) | (counts == most) & (np.abs(above) <= of_entropy))).all()


def _check_draws(
    head: LMHead,
    hidden: torch.Tensor,
    batch: TokenBatch,
    result: TokenStatistics,
    rule: HeadRule,
    temperature: float = 1.0,
) -> None:
    """Every draw is the id whose share of the row its point lies in; within rounding of a border, either neighbour."""
    oracle = dense(head, hidden, temperature)
    of_masses = logprobs_rounding(logits_rounding(head, hidden, temperature), oracle.logits).numpy()
    heads, draws = (np.cumsum([0, *counts]) for counts in (result.head_counts, result.draw_counts))
    for row, p in enumerate(oracle.logprobs.exp().numpy()):
        ids = result.draw_ids[draws[row] : draws[row + 1]]
        if rule.draws == "full":
            points = uniforms(batch.keys[row : row + 1], rule.n_draws)[0]
        else:
            p[result.head_ids[heads[row] : heads[row + 1]]] = 0.0
            uniform = uniforms(batch.keys[row : row + 1], 1)[0, 0]
            points = rule.min_prob * (uniform + np.arange(len(ids) + 1))
        ends = p.cumsum()
        slack = of_masses[row] * max(ends[-1], rule.min_prob)  # errors are relative to what is added up
        if rule.draws != "full":
            assert points[-1] >= ends[-1] - slack, "a point of the row was left out"
            points = points[:-1]
        assert len(ids) == len(points)
        assert (p[ids] > 0).all()
        assert (ends[ids] - p[ids] - slack <= points).all()
        assert (points <= ends[ids] + slack).all()


TRAITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "bias": {"bias": torch.linspace(-2, 2, 1001)},
    "all": {"softcap": 5.0, "scale": 1.5, "bias": torch.linspace(2, -2, 1001)},
}


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("traits", TRAITS)
def test_every_statistic_equals_the_dense_float64_one(traits: str, temperature: float) -> None:
    head, hidden = _head(1001, **TRAITS[traits]), _hidden(70)
    rule, stops = HeadRule(k_max=16, min_prob=0.03, full_head_above=0.4), (0, 5, 1000)
    batch = _batch(head, hidden, extra=4)
    scorer = StatisticsHead(head, rule, temperature=temperature, stop_ids=stops, chunk_rows=16, block=128)
    _check(head, hidden, batch, scorer(hidden, batch), rule, stops, temperature)


@settings(max_examples=40, deadline=None)
@given(
    vocabulary=st.integers(1, 400),
    tokens=st.integers(0, 40),
    k_max=st.integers(1, 80),
    min_prob=st.floats(0.001, 1.0),
    above=st.sampled_from([-1.0, 0.4, 2.0, 99.0]),
    chunk=st.integers(1, 17),
    block=st.integers(1, 500),
)
def test_any_shape(
    vocabulary: int, tokens: int, k_max: int, min_prob: float, above: float, chunk: int, block: int
) -> None:
    head, hidden = _head(vocabulary), _hidden(tokens)
    rule = HeadRule(k_max, min_prob, above)
    batch = _batch(head, hidden)
    result = StatisticsHead(head, rule, chunk_rows=chunk, block=block)(hidden, batch)
    assert result.tokens == tokens
    if tokens:
        _check(head, hidden, batch, result, rule, (), 1.0)
    beyond_all = k_max >= vocabulary and above == -1.0
    assert not (beyond_all and result.draw_counts.any()), "nothing is left to draw from"


@pytest.mark.parametrize("draws", ["beyond_head", "full"])
def test_chunks_and_blocks_change_nothing(draws: Any) -> None:
    """Each way is compared with the float64 oracle, which also says which draws rounding may move."""
    head, hidden = _head(1001), _hidden(200)
    rule = HeadRule(16, 0.01, 0.4, draws, 20 if draws == "full" else 0, seed=3)
    batch = _batch(head, hidden, extra=2)
    for rows, block in [(200, 1024), (7, 192)]:
        result = StatisticsHead(head, rule, stop_ids=(2,), chunk_rows=rows, block=block)(hidden, batch)
        _check(head, hidden, batch, result, rule, (2,), 1.0)
        assert result.draw_counts.sum() > 500


@pytest.mark.parametrize("draws", ["beyond_head", "full"])
def test_any_number_of_threads_gives_the_same_statistics(draws: Any) -> None:
    head, hidden = _head(700), _hidden(300)
    rule = HeadRule(16, 0.01, 0.4, draws, 20 if draws == "full" else 0, seed=3)
    batch = _batch(head, hidden, extra=2)
    for used in (1, 3):
        with torch_threads(used):
            result = StatisticsHead(head, rule, stop_ids=(2,), chunk_rows=64)(hidden, batch)
            assert torch.get_num_threads() == used
        _check(head, hidden, batch, result, rule, (2,), 1.0)


def _score_exactly(logits: Float64, rule: HeadRule, sampled: NDArray[np.int64] | None = None) -> TokenStatistics:
    """Score integer logits [T, V]: hidden states select a column of the weight, so products are exact."""
    tokens, vocabulary = logits.shape
    head = LMHead(torch.from_numpy(logits.astype(np.float32)).T.contiguous(), None, 1.0, None, vocabulary)
    sampled = np.zeros(tokens, np.int64) if sampled is None else sampled
    return StatisticsHead(head, rule)(torch.eye(tokens), TokenBatch(sampled, row_keys(0, (0,), np.arange(tokens))))


@pytest.mark.parametrize("above", [-1.0, 0.9, 99.0])
@pytest.mark.parametrize("k_max", [1, 16, 500])
@pytest.mark.parametrize("vocabulary", [1, 2, 17, 64, 331])
def test_equal_logits_fill_the_head_like_any_others(vocabulary: int, k_max: int, above: float) -> None:
    generator = np.random.default_rng(vocabulary)
    widths = np.asarray([0, 1, 3, 10, 40, 300])[:, None]  # from all equal to one that has everything
    logits = generator.integers(0, widths + 1, (6, vocabulary)).astype(np.float64)
    sampled = generator.integers(0, vocabulary, 6)
    scored = _score_exactly(logits, HeadRule(k_max, 0.0301, above), sampled)
    mass = np.exp(logits - logits.max(1, keepdims=True))
    p = mass / mass.sum(1, keepdims=True)
    sizes = np.clip((p >= 0.0301).sum(1), 1, min(k_max, vocabulary))
    sizes[scored.entropy > above] = min(k_max, vocabulary)
    assert scored.head_counts.tolist() == sizes.tolist()
    assert scored.sampled_rank.tolist() == (logits > logits[np.arange(6), sampled][:, None]).sum(1).tolist()
    rows = np.repeat(np.arange(6), sizes)
    assert len(set(zip(rows.tolist(), scored.head_ids.tolist(), strict=True))) == len(rows), "no id twice"
    largest = [value for row, size in enumerate(sizes) for value in -np.sort(-logits[row])[:size]]
    assert logits[rows, scored.head_ids].tolist() == largest
    with np.errstate(divide="ignore"):
        expected = np.maximum(np.log(p[rows, scored.head_ids]), LOGPROB_FLOOR)
    assert np.allclose(scored.head_logprobs, expected, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [16, 100])
def test_systematic_draws_lie_under_their_points(vocabulary: int) -> None:
    logits = np.random.default_rng(0).integers(0, 5, (200, vocabulary)).astype(np.float64)
    scored = _score_exactly(logits, HeadRule(4, 0.01, -1.0))
    mass = np.exp(logits - logits.max(1, keepdims=True))
    p = mass / mass.sum(1, keepdims=True)
    rows = np.arange(200)
    p[np.repeat(rows, 4), scored.head_ids] = 0.0
    ends = p.cumsum(1)
    stops = np.cumsum(scored.draw_counts)
    for row in rows:
        ids = scored.draw_ids[stops[row] - scored.draw_counts[row] : stops[row]]
        assert (p[row, ids] > 0.0).all()
        # between the points of neighbouring draws lie 0.01, so all of them fix one uniform
        lowest = (ends[row, ids] - p[row, ids] - 0.01 * np.arange(len(ids))).max()
        highest = (ends[row, ids] - 0.01 * np.arange(len(ids))).min()
        assert max(lowest, 0.0) <= min(highest, 0.01) + 1e-9


def test_a_probability_on_the_border_is_in_the_head() -> None:
    logits = np.zeros((1, 8))
    assert _score_exactly(logits, HeadRule(16, 0.125, 99.0)).head_counts.tolist() == [8]
    assert _score_exactly(logits, HeadRule(16, 0.1251, 99.0)).head_counts.tolist() == [1], "the least there can be"
    assert _score_exactly(np.zeros((1, 1)), HeadRule(16, 1.0, 99.0)).head_counts.tolist() == [1]


def test_reordering_responses_keeps_every_row_together() -> None:
    head, hidden = _head(300), _hidden(30)
    batch = _batch(head, hidden, extra=3)
    scorer = StatisticsHead(head, HeadRule(8, 0.05, 0.4), stop_ids=(1, 2))
    whole = scorer(hidden, batch)
    order, lengths = [3, 0, 4], [12, 10, 8]
    rows = in_response_order(whole, order, lengths, np.asarray([1, 2], np.int32), responses=6)
    assert rows.response_offsets.tolist() == [0, 10, 10, 10, 22, 30, 30]
    assert rows.token_ids.tolist() == [*whole.token_ids[12:22], *whole.token_ids[:12], *whole.token_ids[22:]]
    places = np.concatenate([np.arange(12, 22), np.arange(12), np.arange(22, 30)])
    expected = concatenate([take(whole, places[i : i + 1]) for i in range(30)])
    for name in ("head_ids", "head_logprobs", "draw_ids", "extra_ids", "extra_logprobs", "stop_logprobs", "entropy"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))


@pytest.mark.parametrize("draws", ["beyond_head", "full"])
def test_draws_follow_the_exact_distribution(draws: Any) -> None:
    """Chi-square of 3,000 seeds' draws against the exact tail (or the whole); p(statistic) > 0.001."""
    head, hidden = _head(40, seed=5), _hidden(3, seed=2) * 0.2
    seeds = 3000
    rule = HeadRule(4, 0.05, -1.0, draws, 3 if draws == "full" else 0)
    scorer = StatisticsHead(head, rule, chunk_rows=512)
    exact = dense(head, hidden).logprobs.exp().numpy()
    for row in range(3):
        repeated = hidden[row].repeat(seeds, 1)
        keys = np.concatenate([row_keys(seed, (row,), np.asarray([row])) for seed in range(seeds)])
        scores = scorer(repeated, TokenBatch(np.zeros(seeds, np.int64), keys))
        p = exact[row].copy()
        if draws == "beyond_head":
            p[scores.head_ids[:4]] = 0.0
        counts = np.bincount(scores.draw_ids, minlength=40)
        assert counts[p == 0.0].sum() == 0
        expected = seeds * (p / rule.min_prob if draws == "beyond_head" else p * rule.n_draws)
        assert abs(counts.sum() - expected.sum()) < 5 * np.sqrt(expected.sum())
        rare = expected < 5  # one class of their own
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
        statistic = ((counts - expected) ** 2 / expected).sum()
        # systematic counts vary less than independent ones, so the chi-square bound is conservative
        freedom = len(expected) - 1
        # Wilson and Hilferty's approximation of the 0.999 quantile of chi-square
        assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
        spread = np.bincount(np.repeat(np.arange(seeds), scores.draw_counts), minlength=seeds)
        assert spread.max() - spread.min() <= 1, "a systematic row's count differs by at most one"


def test_forward_kl_gradient_is_unbiased() -> None:
    """FKL = -H - sum_head p log q - c sum_draws log q: its mean gradient in q's logits over seeds is the dense one."""
    head, hidden = _head(60, seed=8), _hidden(4, seed=3)
    rule, seeds = HeadRule(4, 0.05, 0.4), 2000
    scorer = StatisticsHead(head, rule)
    p = dense(head, hidden).logprobs.exp().numpy()
    q = np.random.default_rng(0).dirichlet(np.ones(60), 4)
    keys = np.concatenate([row_keys(seed, (0,), np.arange(4)) for seed in range(seeds)])
    scores = scorer(hidden.repeat(seeds, 1), TokenBatch(np.zeros(4 * seeds, np.int64), keys))
    weights = np.zeros((4 * seeds, 60))
    rows = np.arange(4 * seeds)
    np.add.at(
        weights, (np.repeat(rows, scores.head_counts), scores.head_ids), np.exp(scores.head_logprobs.astype(float))
    )
    np.add.at(weights, (np.repeat(rows, scores.draw_counts), scores.draw_ids), rule.min_prob)
    weights = weights.reshape(seeds, 4, 60)
    # d/dlogits of -sum w log q is q * sum(w) - w; the dense gradient has w = p
    gradients = q[None] * weights.sum(2, keepdims=True) - weights
    error = np.abs(gradients.mean(0) - (q - p))
    # a draw of id v weighs c and comes at most p(v) / c times on average: its weight's variance is at most c p(v)
    bound = 4.5 * np.sqrt(rule.min_prob / seeds) * (np.sqrt(p) + np.sqrt(rule.min_prob) * q) + 6 * rule.min_prob / seeds
    assert (error <= bound).all()
    assert np.abs(gradients[0] - (q - p)).max() > 10 * error.max(), "a single seed does vary"


def test_uniforms_are_uniform_and_fixed() -> None:
    keys = row_keys(1, (2, 3), np.arange(20000))
    u = uniforms(keys, 2)
    assert u.min() >= 0.0 and u.max() < 1.0  # noqa: PT018
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / 40000 - 0.05).max() < 0.005
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.03
    np.testing.assert_array_equal(row_keys(1, (2, 3), np.asarray([5])), keys[5:6])
    assert (
        len(
            {
                *keys[:9].tolist(),
                *row_keys(1, (3, 2), np.arange(9)).tolist(),
                *row_keys(2, (2, 3), np.arange(9)).tolist(),
            }
        )
        == 27
    )
    # written down once: a change of these numbers would change every cache
    assert row_keys(0, (0, 0), np.arange(2)).tolist() == [GOLDEN_KEYS[0], GOLDEN_KEYS[1]]


GOLDEN_KEYS = (2391539541053276776, 3048674281419798293)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_scored_in_float32(dtype: torch.dtype) -> None:
    head, hidden = _head(500), _hidden(40).to(dtype)
    head = replace(head, weight=head.weight.to(dtype))
    rule = HeadRule(8, 0.03, 0.4)
    batch = _batch(head, hidden)
    _check(head, hidden, batch, StatisticsHead(head, rule)(hidden, batch), rule, (), 1.0)


def test_a_sure_teacher_has_finite_statistics() -> None:
    weight = torch.zeros(100, D)
    weight[7, 0] = 1.0
    hidden = torch.zeros(2, D)
    hidden[:, 0] = torch.tensor([300.0, 30.0])
    result = StatisticsHead(LMHead(weight, None, 1.0, None, 100), HeadRule())(
        hidden, TokenBatch(np.asarray([7, 3]), row_keys(0, (0,), np.arange(2)))
    )
    assert result.tail_logmass[0] == LOGPROB_FLOOR
    assert abs(result.tail_logmass[1] - (np.log(99) - 30.0)) < 1e-4, "1 - sum of the head would be 0 here"
    assert result.sampled_logprob[0] == 0.0
    assert result.sampled_rank.tolist() == [0, 1]
    assert result.entropy[0] == 0.0
    assert abs(result.entropy[1] - 99 * 31 * np.exp(-30.0)) < 1e-6
    assert result.head_counts.tolist() == [1, 1]
    assert result.draw_counts.tolist() == [0, 0]


def test_ids_that_the_teacher_lacks_have_probability_zero() -> None:
    head, hidden = _head(50), _hidden(2) * 0.1
    batch = TokenBatch(
        np.asarray([60, 3]), row_keys(0, (0,), np.arange(2)), np.asarray([2, 1]), np.asarray([1, 99, 55])
    )
    result = StatisticsHead(head, HeadRule(4), stop_ids=(2, 70))(hidden, batch)
    assert result.sampled_logprob[0] == LOGPROB_FLOOR
    assert result.sampled_rank[0] == 50
    assert result.stop_logprobs[:, 1].tolist() == [LOGPROB_FLOOR] * 2
    assert (result.extra_logprobs == LOGPROB_FLOOR).tolist() == [False, True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_named_by_row(bad: float) -> None:
    head, hidden = _head(300), _hidden(40)
    hidden[23, 4] = bad
    with pytest.raises(NotFinite) as error:
        StatisticsHead(head, HeadRule(), chunk_rows=8)(hidden, _batch(head, _hidden(40)))
    assert error.value.row == 23


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature"):
        StatisticsHead(_head(10), HeadRule(), temperature=0.0)
