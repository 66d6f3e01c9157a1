"""The sampling protocol, truncation, and the transformers engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.integrations import sdpa_attention

from eopd.stages.engines.decoding import grouped_attention, roomy_cache
from eopd.stages.engines.kept import open_sampling_engine, resolve_engine
from eopd.stages.engines.sampling import (
    EngineOptions,
    Sample,
    SamplingEngine,
    SamplingMeter,
    SamplingParameters,
    SamplingRequest,
    derive_seed,
)
from eopd.stages.engines.sampling_transformers import truncate
from eopd.stages.job import ModelRef, NullProgress
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages import sampled_oracle
from tests.stages.tiny_models import save_tiny

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18], [5, 6, 7, 8]]


def requests(samples: int = 6, seed: int = 0) -> list[SamplingRequest]:
    return [
        SamplingRequest(prompt, derive_seed(seed, number, sample))
        for number, prompt in enumerate(PROMPTS)
        for sample in range(samples)
    ]


@pytest.fixture(scope="module", params=["qwen3", "llama", "gemma2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_tiny(request.param, folder)


def open_engine(folder: Path, **options: Any) -> SamplingEngine:
    return open_sampling_engine(
        "transformers",
        ModelRef(str(folder)),
        max_model_len=64,
        log_dir=folder,
        options=EngineOptions(**({"cpu_threads": 1} | options)),
    )


def same(one: Sample, other: Sample) -> bool:
    def bytes_of(sample: Sample) -> list[bytes | None]:
        arrays = (sample.token_ids, sample.logprobs, sample.truncated_logprobs)
        return [None if array is None else array.tobytes() for array in arrays]

    return bytes_of(one) == bytes_of(other)


@pytest.mark.parametrize(
    "truncation", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.7, "top_k": 20, "min_p": 0.01}]
)
def test_logprobs_are_those_of_a_plain_forward(saved: tuple[Path, PreTrainedModel], truncation: dict[str, Any]) -> None:
    folder, model = saved
    parameters = SamplingParameters(temperature=0.7, max_new_tokens=20, stop_ids=(2, 40), **truncation)
    asked = requests()
    samples = open_engine(folder).sample(asked, parameters)
    for request, sample in zip(asked, samples, strict=True):
        full = sampled_oracle.tempered(model, request.prompt_token_ids, sample.token_ids, 0.7)
        assert sample.logprobs is not None
        np.testing.assert_allclose(sample.logprobs, sampled_oracle.at(full, sample.token_ids), atol=1e-4)
        if not truncation:
            assert sample.truncated_logprobs is None
            continue
        assert sample.truncated_logprobs is not None
        cut = sampled_oracle.at(sampled_oracle.truncated(full, **truncation), sample.token_ids)
        np.testing.assert_allclose(sample.truncated_logprobs, cut, atol=1e-4)


def test_a_batch_sampled_twice_is_byte_identical_and_neighbours_do_not_matter(
    saved: tuple[Path, PreTrainedModel],
) -> None:
    parameters = SamplingParameters(max_new_tokens=24, stop_ids=(2, 17, 40, 99, 150))
    asked = requests()
    engine = open_engine(saved[0])
    first, again = engine.sample(asked, parameters), engine.sample(asked, parameters)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert {sample.finish_reason for sample in first} == {"stop", "length"}
    alone = open_engine(saved[0], max_batch=5).sample(asked[::-1], parameters)[::-1]
    for one, other in zip(first, alone, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)  # type: ignore[arg-type]
    assert len({tuple(sample.token_ids) for sample in first}) == len(first)
    other_seed = engine.sample(requests(seed=1), parameters)
    assert all(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, other_seed, strict=True))


def test_a_response_ends_with_the_first_stop_id_it_samples(saved: tuple[Path, PreTrainedModel]) -> None:
    engine = open_engine(saved[0])
    free = engine.sample(requests(), SamplingParameters(max_new_tokens=30))
    assert all(sample.finish_reason == "length" and len(sample.token_ids) == 30 for sample in free)
    assert all(sample.stop_token_id is None for sample in free)
    stops = {int(free[0].token_ids[7]), int(free[3].token_ids[0])}
    stopped = engine.sample(requests(), SamplingParameters(max_new_tokens=30, stop_ids=tuple(stops)))
    for without, sample in zip(free, stopped, strict=True):
        ends = [place for place, token in enumerate(without.token_ids) if int(token) in stops]
        expected = without.token_ids[: ends[0] + 1] if ends else without.token_ids
        assert sample.token_ids.tolist() == expected.tolist()
        assert sample.finish_reason == ("stop" if ends else "length")
        assert sample.stop_token_id == (int(expected[-1]) if ends else None)
        assert sample.logprobs is not None
        assert len(sample.logprobs) == len(expected)
    assert len(stopped[3].token_ids) == 1


def test_greedy_is_the_models_own_generate(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    engine = open_engine(folder)
    greedy = engine.sample(requests(1), SamplingParameters(temperature=0.0, max_new_tokens=12, top_p=0.5))
    narrow = engine.sample(requests(1), SamplingParameters(temperature=1.5, max_new_tokens=12, top_k=1))
    for prompt, sample, other in zip(PROMPTS, greedy, narrow, strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)[0, len(prompt) :]  # type: ignore[operator]
        full = sampled_oracle.tempered(model, prompt, sample.token_ids, 1.0)
        assert sample.token_ids.tolist() == full.argmax(-1).tolist()
        assert sample.token_ids.tolist() == other.token_ids.tolist()
        if 2 not in sample.token_ids:  # generate forbids its own eos
            assert sample.token_ids.tolist() == made.tolist()


def test_frequencies_follow_the_distribution(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    engine = open_engine(tmp_path, max_batch=2000)
    asked = [SamplingRequest(PROMPTS[0], derive_seed(0, number)) for number in range(4000)]
    samples = engine.sample(asked, SamplingParameters(temperature=0.8, max_new_tokens=1))
    counts = np.bincount([int(sample.token_ids[0]) for sample in samples], minlength=320)
    probs = np.exp(sampled_oracle.tempered(model, PROMPTS[0], [0], 0.8)[0])
    often = probs * len(asked) >= 5
    chi_square = ((counts - probs * len(asked))[often] ** 2 / (probs * len(asked))[often]).sum()
    freedom = int(often.sum()) - 1
    assert freedom > 10
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    assert counts[~often].sum() < 3 * probs[~often].sum() * len(asked) + 10


def test_progress_adds_up_and_logprobs_can_be_left_out(saved: tuple[Path, PreTrainedModel]) -> None:
    told: list[tuple[int, int]] = []
    parameters = SamplingParameters(max_new_tokens=10, stop_ids=tuple(range(100, 140)), logprobs=False)
    samples = open_engine(saved[0]).sample(requests(), parameters, lambda tokens, done: told.append((tokens, done)))
    assert sum(tokens for tokens, _ in told) == sum(len(sample.token_ids) for sample in samples)
    assert sum(done for _, done in told) == len(samples)
    assert all(sample.logprobs is None for sample in samples)


class Bar(NullProgress):
    """Keeps the total, what is done, and what is in hand."""

    def __init__(self) -> None:
        self.total = self.done = self.in_hand = 0

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self.total = total

    def advance(self, n: int, **figures: float) -> None:
        self.done += n

    def expect(self, total: int, in_hand: int = 0) -> None:
        self.total, self.in_hand = total, in_hand


def test_the_meter_counts_what_is_being_decoded_and_expects_no_more_than_is_asked_for() -> None:
    """Four responses of 30 tokens, two a part, decoded together; at most 100 tokens are asked for."""
    bar = Bar()
    meter = SamplingMeter(bar, "rollout", responses=4, max_new_tokens=100)
    assert bar.total == 0, "not known yet"
    meter.begin(2)
    for _ in range(29):
        meter.advance(2, 0)
    assert (bar.done, bar.total, bar.in_hand) == (58, 0, 0)  # none has ended
    meter.advance(2, 2)
    assert (bar.done, bar.total, bar.in_hand) == (60, 120, 0)
    meter.begin(2)
    meter.advance(10, 0)
    assert (bar.done, bar.total, bar.in_hand) == (70, 140, 60)
    meter.advance(50, 2)
    assert (bar.done, bar.total, bar.in_hand) == (120, 120, 0)


def test_threads_are_given_back(saved: tuple[Path, PreTrainedModel]) -> None:
    used: list[int] = []
    before = torch.get_num_threads()
    engine = open_engine(saved[0], cpu_threads=3)
    engine.sample(requests(1), SamplingParameters(max_new_tokens=2), lambda *_: used.append(torch.get_num_threads()))
    assert used == [3, 3]
    assert torch.get_num_threads() == before


def test_attention_of_grouped_heads_is_transformers_own_bit_for_bit(
    saved: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved[1].eval()
    ids = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # padding: without a mask transformers copies no keys either

    def logits() -> torch.Tensor:
        cache = roomy_cache(model.config)
        with torch.inference_mode():
            for part in (slice(0, 10), slice(10, 11), slice(11, 12)):
                positions = (mask[:, : part.stop].cumsum(1) - 1).clamp(min=0)[:, part]
                out = model(
                    ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions, past_key_values=cache
                )
        return out.logits[:, -1]  # type: ignore[no-any-return]

    copied: list[int] = []
    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *given: copied.append(0) or repeat(*given))  # type: ignore[func-returns-value]
    own = logits()
    usual = len(copied)
    with grouped_attention():
        assert torch.equal(logits(), own)
    assert 3 * (len(copied) - usual) == usual, "only the first of three steps copies keys and values"


def test_what_cannot_be_served_is_refused(saved: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    engine = open_engine(saved[0])
    parameters = SamplingParameters(max_new_tokens=60)
    with pytest.raises(ValueError, match="request 2: a prompt of 8 tokens and max_new_tokens 60 do not fit the 64"):
        engine.sample([SamplingRequest(prompt, 0) for prompt in PROMPTS], parameters)
    with pytest.raises(ValueError, match="request 0 has an empty prompt"):
        engine.sample([SamplingRequest([], 0)], replace(parameters, max_new_tokens=1))
    with raises(InputError, "256 tokens", file=saved[0]):
        open_sampling_engine("transformers", ModelRef(str(saved[0])), max_model_len=257, log_dir=saved[0])
    save_tiny("gpt2", tmp_path)
    with raises(InputError, "256 tokens", file=tmp_path):
        open_sampling_engine("transformers", ModelRef(str(tmp_path)), max_model_len=257, log_dir=tmp_path)
    with raises(InputError, file="nowhere"):
        open_sampling_engine("transformers", ModelRef("./nowhere"), max_model_len=8, log_dir=saved[0])
    assert engine.sample([], parameters) == []
    engine.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 0.001),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("top_k", -1),
        ("max_new_tokens", 0),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: float) -> None:
    with raises(InputError, setting=field):
        SamplingParameters(**{field: value})  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 40),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    top_k=st.integers(0, 45),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
def test_truncation_keeps_what_the_definition_keeps(
    seed: int, width: int, top_p: float, top_k: int, min_p: float
) -> None:
    logprobs = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (3, width))).log_softmax(-1)
    kept = truncate(logprobs, top_p, top_k, min_p).log_softmax(-1).numpy()
    expected = sampled_oracle.truncated(logprobs.numpy(), top_p, top_k, min_p)
    np.testing.assert_array_equal(np.isfinite(kept), np.isfinite(expected))
    np.testing.assert_allclose(np.exp(kept), np.exp(expected), atol=1e-9)


def test_seeds_depend_on_every_name_and_its_kind() -> None:
    made = [derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "a", "1"), derive_seed(0, "a1")]
    made += [derive_seed(0, 1, "a"), derive_seed(0, "a", 2), derive_seed(0, "a", 1, 1), derive_seed(0)]
    assert len(set(made)) == len(made)
    assert all(0 <= seed < 2**63 for seed in made)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)


def test_the_engine_asked_for_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_engine("auto") == "transformers"
    with raises(InputError, setting="engine", remedy="engine: transformers"):
        resolve_engine("vllm")
