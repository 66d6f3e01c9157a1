"""Teacher against student by entropy bin: against a dense float64 oracle, on real (tiny) models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eopd.stages.align import divergence
from eopd.stages.align.divergence import (
    SUMMED,
    EntropyBins,
    LoadedModel,
    TokenFigures,
    compare,
    measure_alignment,
    read_pairs,
    summarise_bins,
)
from eopd.stages.models.lm_head import LMHead
from eopd.stages.models.packing import Sequence
from eopd.storage.errors import InputError
from tests.bounds import entropy_rounding, forward_rounding, logits_rounding, logprobs_rounding, rounding
from tests.raises import raises
from tests.stages.dense_teacher import dense
from tests.stages.tiny_models import VOCAB, tiny_model

Side = tuple[Tensor, LMHead]  # hidden states of a model, and its head


def head(vocabulary: int, width: int, seed: int, **changes: Any) -> LMHead:
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed))
    return replace(LMHead(weight, None, 1.0, None, vocabulary), **changes)


def states(tokens: int, width: int, seed: int) -> Tensor:
    """Some sharp rows, some flat ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) * torch.linspace(0.05, 2.0, tokens)[:, None]


def oracle(logits_p: Tensor, logits_q: Tensor, merged: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Written out from the definitions, float64, one row of probabilities at a time."""
    result: dict[str, list[float]] = {item: [] for item in TokenFigures.__dataclass_fields__}
    for row_p, row_q in zip(logits_p.double(), logits_q.double(), strict=True):
        sides = []
        for row in (row_p, row_q):
            probs = torch.softmax(row, 0)
            stops = [number for number in merged if number < len(probs)]
            outcomes = {number: float(prob) for number, prob in enumerate(probs) if number not in stops}
            if stops:
                outcomes[stops[0]] = float(probs[stops].sum())
            sides.append(outcomes)
        p, q = sides
        shared = p.keys() & q.keys()
        mass_p, mass_q = (math.fsum(side[number] for number in shared) for side in sides)
        for name, side, mass in (("teacher", p, mass_p), ("student", q, mass_q)):
            result[f"{name}_entropy"].append(-math.fsum(v * math.log(v) for v in side.values() if v > 0))
            result[f"{name}_outside"].append(math.fsum(side.values()) - mass)
        pairs = [(p[number] / mass_p, q[number] / mass_q) for number in shared]
        result["fkl"].append(math.fsum(a * math.log(a / b) for a, b in pairs if a > 0))
        result["rkl"].append(math.fsum(b * math.log(b / a) for a, b in pairs if b > 0))
        result["agreement"].append(float(max(p, key=p.__getitem__) == max(q, key=q.__getitem__)))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in result.items()}


def rounding_of_figures(exact: dict[str, Tensor], of_teacher: Tensor, of_student: Tensor) -> dict[str, Tensor]:
    """Bounds [T] on the errors of figures whose values are ``exact``, given those on the log-probs of both models."""
    bounds = {
        "teacher_entropy": entropy_rounding(of_teacher, exact["teacher_entropy"]),
        "student_entropy": entropy_rounding(of_student, exact["student_entropy"]),
        "teacher_outside": of_teacher,
        "student_outside": of_student,
        "agreement": torch.zeros_like(of_teacher),
    }
    # Given the shared ids, log-probs are normalised a second time. An error e of log p moves KL(p, q) by at most
    # e * sum(p |log p - log q|) + e, and that sum is at most KL + sqrt(2 KL), by Pinsker's inequality.
    for name, own, other in (("fkl", of_teacher, of_student), ("rkl", of_student, of_teacher)):
        size = exact[name] + (2 * exact[name]).sqrt()
        bounds[name] = 2 * (own * size + own + other) + rounding(4, size)
    return bounds


def check_dense(teacher: Side, student: Side, temperature: float = 1.0, **given: Any) -> TokenFigures:
    """``compare``, whose figures are checked against the oracle's."""
    comparison = compare(teacher, student, temperature=temperature, **given)
    merged, logits, errors = given.get("merged", ()), [], []
    for hidden, own in (teacher, student):
        logits.append(dense(own, hidden, temperature).logits)
        of_merged = rounding(len(merged) + 3, 1 + logits[-1].abs().amax(1))  # a log-sum-exp of the merged logits
        errors.append(logprobs_rounding(logits_rounding(own, hidden, temperature) + of_merged, logits[-1]))
    exact = oracle(logits[0], logits[1], merged)
    assert_equal(comparison, exact, rounding_of_figures(exact, *errors))
    return comparison


def assert_equal(result: TokenFigures, exact: dict[str, Tensor], bounds: dict[str, Tensor]) -> None:
    for name, values in exact.items():
        error = np.abs(getattr(result, name) - values.numpy())
        assert (error <= bounds[name].numpy()).all(), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("merged", [(), (3,), (3, 40, 7)])
@pytest.mark.parametrize("student_rows", [50, 61, 45])
def test_figures_are_those_of_the_dense_oracle(student_rows: int, merged: tuple[int, ...], temperature: float) -> None:
    """Over several chunks, with equal and with differently padded vocabularies, a bias and a soft cap."""
    bias = torch.linspace(-1, 1, 50)
    heads = head(50, 16, 1, bias=bias, softcap=8.0), head(student_rows, 12, 2, scale=0.8)
    hidden = states(23, 16, 3), states(23, 12, 4)
    sides = (hidden[0], heads[0]), (hidden[1], heads[1])
    errors = check_dense(*sides, temperature, merged=merged, chunk_rows=5)
    assert (errors.teacher_outside > 0).all() == (student_rows < 50)
    assert (errors.student_outside > 0).all() == (student_rows > 50)
    assert errors.fkl.min() > 0
    assert 0 < errors.agreement.sum() < 23 or student_rows != 50


def test_a_model_does_not_differ_from_itself_and_wide_chunks_change_nothing() -> None:
    own = states(9, 16, 3) * 20, head(50, 16, 1)
    comparison = compare(own, own)
    assert comparison.fkl == pytest.approx(np.zeros(9), abs=1e-12)
    assert comparison.rkl == pytest.approx(np.zeros(9), abs=1e-12)
    assert comparison.agreement.tolist() == [1.0] * 9
    teacher, student = (states(9, 16, 3) * 4, own[1]), (states(9, 12, 4), head(50, 12, 2))
    for chunk_rows in (None, 2):
        check_dense(teacher, student, chunk_rows=chunk_rows)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="of 3 tokens, the student's of 4"):
        compare((states(3, 8, 0), head(50, 8, 0)), (states(4, 8, 0), head(50, 8, 0)))
    broken = states(3, 8, 0)
    broken[1, 0] = math.nan
    with raises(InputError, "the student's", setting="student.dtype", remedy="a wider student.dtype"):
        compare((states(3, 8, 0), head(50, 8, 0)), (broken, head(50, 8, 0)))
    with raises(InputError, "no response has a token", setting="evaluate.alignment"):
        summarise_bins(np.zeros((0, 3, len(SUMMED))), [], EntropyBins.of((1.0,), 0.8, 50))


def test_bins_split_at_tau_and_hold_every_token() -> None:
    bins = EntropyBins.of((0.4, 1.2, 9.0), 0.8, 50)
    assert bins.edges == (0.0, 0.4, 0.8, 1.2, math.log(50))
    entropy = np.asarray([0.0, 0.4, 0.41, 0.8, 0.8000001, 1.3, math.log(50), math.log(50) + 1e-6])
    zero = np.zeros(8)
    figures = TokenFigures(zero, zero, entropy, np.linspace(0, 2, 8), zero, zero, zero)
    sums = bins.sums(figures)
    assert sums[:, 0].tolist() == [2, 2, 1, 3]
    assert sums[bins.gated, 0].sum() == (entropy > 0.8).sum()
    assert sums[:, SUMMED.index("student_above")].sum() == (np.linspace(0, 2, 8) > 0.8).sum()
    assert EntropyBins.of((0.4,), 8.0, 50).gated == slice(2, 2)  # no token can exceed tau


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Other architectures, hidden sizes and paddings."""
    return tiny_model("llama", seed=1), tiny_model("qwen3", seed=2, vocab_size=VOCAB - 10, hidden_size=32)


def sequences(count: int, context: int = 3) -> list[Sequence]:
    rng = np.random.default_rng(5)
    lengths = [int(n) for n in rng.integers(0, 30, count)]
    return [Sequence(rng.integers(3, 300, context + n % 2).tolist(), rng.integers(3, 300, n).tolist()) for n in lengths]


def own_logits(model: Any, sequence: Sequence) -> Tensor:
    ids = torch.tensor([[*sequence.context_ids, *sequence.response_ids[:-1]]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits[0, len(sequence.context_ids) - 1 :]
    return logits


def test_models_in_memory_are_measured_as_their_own_logits_say(models: tuple[Any, Any]) -> None:
    """Packed, in several batches, with contexts that differ between the models; each sequence once."""
    teacher, student = models
    own = sequences(17)
    theirs = [Sequence([1, 5, *sequence.context_ids], sequence.response_ids) for sequence in own]
    read = dict(read_pairs(LoadedModel(teacher), LoadedModel(student), theirs, own, batch_tokens=60))
    assert sorted(read) == [number for number, sequence in enumerate(own) if sequence.response_ids]
    expected = []
    for number, figures in read.items():
        logits = own_logits(teacher, theirs[number]), own_logits(student, own[number])
        exact = oracle(*logits)
        # twice: the models' own logits are as far from exact ones
        errors = [logprobs_rounding(2 * forward_rounding(one.abs().amax(1).double()), one) for one in logits]
        assert_equal(figures, exact, rounding_of_figures(exact, *errors))
        expected.append(exact)
    student.train()
    alignment = measure_alignment(
        teacher, student, own, teacher_sequences=theirs, tau=4.0, edges=(3.0, 4.5), batch_tokens=100
    )
    assert student.training
    student.eval()
    flat = {name: torch.cat([exact[name] for exact in expected]) for name in expected[0]}
    high = flat["teacher_entropy"] > 4.0
    assert 5 < high.sum() < len(high) - 5
    assert alignment.all.tokens == len(high) == sum(one.tokens for one in alignment.bins)
    assert alignment.all.fkl == pytest.approx(float(flat["fkl"].mean()), abs=1e-4)
    assert alignment.above.tokens == int(high.sum())
    assert alignment.above.share == pytest.approx(float(high.double().mean()))
    assert alignment.above.rkl == pytest.approx(float(flat["rkl"][high].mean()), abs=1e-4)
    assert alignment.below.agreement == pytest.approx(float(flat["agreement"][~high].mean()))
    assert alignment.all.student_above == pytest.approx(float((flat["student_entropy"] > 4.0).double().mean()))
    low, upper = alignment.all.intervals["fkl"]
    assert low < alignment.all.fkl < upper
    assert alignment.teacher_outside > 0 == alignment.student_outside
    assert json.loads(json.dumps(alignment.to_json(), allow_nan=False))["bins"][0]["tokens"] == alignment.bins[0].tokens


def test_intervals_are_over_problems_not_tokens() -> None:
    """Responses of a problem that agree among themselves hold no more news than one of them."""
    bins = EntropyBins.of((1.0,), 0.8, 50)
    rng = np.random.default_rng(0)
    sums = np.zeros((40, bins.count, len(SUMMED)))
    sums[:, 0, 0] = 10
    sums[:, 0, 1] = 10 * rng.random(40)
    alone = summarise_bins(sums, list(range(40)), bins)
    copies = summarise_bins(np.concatenate([sums] * 4), list(range(40)) * 4, bins)
    assert copies.all.intervals["fkl"] == pytest.approx(alone.all.intervals["fkl"])
    assert copies.problems == 40
    assert copies.responses == 160
    width = alone.all.intervals["fkl"][1] - alone.all.intervals["fkl"][0]
    assert width == pytest.approx(2 * 1.96 * sums[:, 0, 1].std() / 10 / math.sqrt(40), rel=0.1)
    assert alone.bins[2].fkl is None
    assert alone.bins[2].tokens == 0


def test_where_resamples_never_differ_no_interval_is_claimed() -> None:
    """The bins with the fewest tokens are one problem's: nothing is known of others, which is not no spread."""
    bins = EntropyBins.of((1.0,), 0.8, 50)
    rng = np.random.default_rng(0)
    sums = np.zeros((30, bins.count, len(SUMMED)))
    sums[:, 0, 0] = rng.integers(5, 20, 30)
    sums[:, 0, SUMMED.index("fkl")] = sums[:, 0, 0] * rng.random(30)
    sums[:, 0, SUMMED.index("agreement")] = sums[:, 0, 0]  # wherever one looks
    sums[3:5, 2, 0] = 7
    sums[3:5, 2, SUMMED.index("fkl")] = 7 * 1.4, 7 * 2.1
    apart = summarise_bins(sums, list(range(30)), bins)
    assert apart.bins[0].agreement == 1.0
    assert set(apart.bins[0].intervals) == {"fkl"}
    assert apart.bins[2].intervals["fkl"] == pytest.approx((1.4, 2.1))
    one = summarise_bins(sums, [*range(4), 3, *range(5, 30)], bins)  # both responses are of one problem
    assert one.bins[2].fkl == pytest.approx(1.75)
    assert one.bins[2].intervals == {}
    each = summarise_bins(sums[3:5], [0, 1], bins, benchmarks=["a", "b"])  # two benchmarks of one problem
    assert each.all.intervals == {}


def test_problems_are_drawn_within_their_benchmark() -> None:
    """Of two that differ, but hardly within themselves, each is drawn as often as it has problems."""
    bins = EntropyBins.of((1.0,), 0.8, 50)
    rng = np.random.default_rng(0)
    sums = np.zeros((40, bins.count, len(SUMMED)))
    sums[:, 0, 0] = 10
    sums[:, 0, SUMMED.index("fkl")] = 10 * np.concatenate([rng.normal(1.0, 0.01, 10), rng.normal(3.0, 0.01, 30)])
    benchmarks = ["b"] * 10 + ["a"] * 30
    apart, together = (summarise_bins(sums, list(range(40)), bins, benchmarks=names) for names in (benchmarks, None))
    assert apart.all.fkl == together.all.fkl == pytest.approx(2.5, abs=0.02)  # tokens count, not benchmarks
    low, high = apart.all.intervals["fkl"]
    assert high - low == pytest.approx(2 * 1.96 * 0.01 / math.sqrt(40), rel=0.4)
    low, high = together.all.intervals["fkl"]
    assert high - low > 0.3


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    logits = LMHead.logits

    def counting(self: LMHead, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(divergence, "CHUNK_VALUES", 50 * 4)
    monkeypatch.setattr(LMHead, "logits", counting)
    compare((states(10, 8, 0), head(40, 8, 0)), (states(10, 8, 1), head(50, 8, 1)))
    assert rows == [4, 4, 4, 4, 2, 2]
