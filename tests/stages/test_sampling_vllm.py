"""The vLLM engine against plain forwards, and what it leaves behind in its process."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from eopd.stages.engines import sampling_vllm
from eopd.stages.engines.kept import open_sampling_engine
from eopd.stages.engines.sampling import (
    EngineOptions,
    Expert,
    SamplingEngine,
    SamplingParameters,
    SamplingRequest,
    derive_seed,
)
from eopd.stages.engines.vllm_process import children_deaf_to_ctrl_c
from eopd.stages.job import ModelRef
from eopd.stages.models.threads import torch_threads
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages import sampled_oracle
from tests.stages.tiny_models import save_tiny

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18], [5, 6, 7, 8]]


def requests(samples: int = 6, seed: int = 0) -> list[SamplingRequest]:
    return [
        SamplingRequest(prompt, derive_seed(seed, number, sample))
        for number, prompt in enumerate(PROMPTS)
        for sample in range(samples)
    ]


def open_engine(folder: Path, **options: Any) -> SamplingEngine:
    chosen = EngineOptions(cpu_kv_cache_gib=0.25, cpu_threads=1, **options)
    return open_sampling_engine("vllm", ModelRef(str(folder)), max_model_len=64, log_dir=folder, options=chosen)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, save_tiny("qwen3", folder)


@pytest.fixture(scope="module")
def engine(saved: tuple[Path, PreTrainedModel]) -> Iterator[SamplingEngine]:
    opened = open_engine(saved[0])
    yield opened
    opened.close()


def test_logprobs_are_those_of_the_tempered_full_softmax(
    engine: SamplingEngine, saved: tuple[Path, PreTrainedModel]
) -> None:
    asked = requests()
    samples = engine.sample(asked, SamplingParameters(temperature=0.6, max_new_tokens=20, stop_ids=(2, 40)))
    for request, sample in zip(asked, samples, strict=True):
        full = sampled_oracle.tempered(saved[1], request.prompt_token_ids, sample.token_ids, 0.6)
        assert sample.truncated_logprobs is None
        assert sample.logprobs is not None
        np.testing.assert_allclose(sample.logprobs, sampled_oracle.at(full, sample.token_ids), atol=1e-3)


def test_progress_counts_tokens_of_responses_that_are_being_decoded(
    engine: SamplingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_vllm, "LOOK_EVERY_SECONDS", 0.0)
    told: list[tuple[int, int]] = []
    parameters = SamplingParameters(max_new_tokens=16)
    samples = engine.sample(requests(2), parameters, lambda tokens, done: told.append((tokens, done)))
    assert sum(tokens for tokens, _ in told) == sum(len(sample.token_ids) for sample in samples)
    assert sum(done for _, done in told) == len(samples)
    before = [tokens for tokens, done in told[:8]]
    assert told[0][1] == 0, "nothing has ended after the first step"
    assert sum(before) > 0


def test_the_number_of_threads_holds_while_it_works(engine: SamplingEngine) -> None:
    with torch_threads(3):  # of the host; the engine was opened for one
        used: list[int] = []
        engine.sample(
            requests(1), SamplingParameters(max_new_tokens=2), lambda *_: used.append(torch.get_num_threads())
        )
        assert set(used) == {1}
        assert torch.get_num_threads() == 3


def test_with_truncation_they_are_the_truncated_ones_and_the_full_ones_are_missing(
    engine: SamplingEngine, saved: tuple[Path, PreTrainedModel]
) -> None:
    asked = requests()
    samples = engine.sample(asked, SamplingParameters(temperature=1.3, top_p=0.7, max_new_tokens=12))
    for request, sample in zip(asked, samples, strict=True):
        full = sampled_oracle.tempered(saved[1], request.prompt_token_ids, sample.token_ids, 1.3)
        cut = sampled_oracle.at(sampled_oracle.truncated(full, top_p=0.7), sample.token_ids)
        assert sample.logprobs is None
        assert sample.truncated_logprobs is not None
        np.testing.assert_allclose(sample.truncated_logprobs, cut, atol=1e-3)


def test_a_batch_sampled_twice_is_byte_identical_and_seeds_matter(engine: SamplingEngine) -> None:
    parameters = SamplingParameters(max_new_tokens=24, stop_ids=(2, 17, 40, 99, 150))
    first, again = engine.sample(requests(), parameters), engine.sample(requests(), parameters)
    for one, other in zip(first, again, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
    assert len({tuple(sample.token_ids) for sample in first}) == len(first)
    other_seed = engine.sample(requests(seed=1), parameters)
    assert all(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, other_seed, strict=True))


def test_a_response_ends_with_the_first_stop_id_and_no_other(engine: SamplingEngine) -> None:
    free = engine.sample(requests(), SamplingParameters(max_new_tokens=20))
    assert all(len(sample.token_ids) == 20 and sample.finish_reason == "length" for sample in free)
    stop = int(free[0].token_ids[5])
    told: list[tuple[int, int]] = []
    stopped = engine.sample(
        requests(), SamplingParameters(max_new_tokens=20, stop_ids=(stop,)), lambda *counts: told.append(counts)
    )
    assert stopped[0].finish_reason == "stop"
    for sample in stopped:
        places = np.flatnonzero(sample.token_ids == stop)
        assert (len(places) == 1) == (sample.finish_reason == "stop")
        assert sample.stop_token_id == (stop if len(places) else None)
        assert all(place == len(sample.token_ids) - 1 for place in places)
    assert np.sum(told, axis=0).tolist() == [sum(len(sample.token_ids) for sample in stopped), len(stopped)]


def test_the_models_own_eos_is_no_stop_unless_asked_for(engine: SamplingEngine) -> None:
    samples = engine.sample(requests(40), SamplingParameters(max_new_tokens=40, temperature=2.0, logprobs=False))
    assert any(2 in sample.token_ids[:-1] for sample in samples)  # id 2 is the tiny models' eos
    assert all(len(sample.token_ids) == 40 and sample.logprobs is None for sample in samples)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_second_context_is_refused(engine: SamplingEngine) -> None:
    request = SamplingRequest([5, 6], 0, expert=Expert([7], np.ones(2, bool)))
    with raises(InputError, setting="rollout.engine", remedy="transformers"):
        engine.sample([request], SamplingParameters(max_new_tokens=2))


def test_closing_leaves_no_trace_and_a_second_engine_serves_its_own_weights(
    engine: SamplingEngine, saved: tuple[Path, PreTrainedModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.close()
    second = save_tiny("qwen3", tmp_path, seed=1)
    torch.manual_seed(0)
    random.seed(0)
    before = _process_state()
    fresh = open_engine(tmp_path)
    held = resident_mib()
    samples = fresh.sample(requests(1), SamplingParameters(temperature=0.0, max_new_tokens=12))
    fresh.close()
    fresh.close()
    assert _process_state() == before
    assert resident_mib() < held - 200  # the KV cache alone had 256
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        own = sampled_oracle.tempered(second, prompt, sample.token_ids, 1.0).argmax(-1)
        old = sampled_oracle.tempered(saved[1], prompt, sample.token_ids, 1.0).argmax(-1)
        assert sample.token_ids.tolist() == own.tolist()
        assert sample.token_ids.tolist() != old.tolist()
    assert "vllm" not in "".join(capfd.readouterr()).lower()
    assert "Loading" in (tmp_path / "vllm.log").read_text()


def _process_state() -> list[Any]:
    affinity = {thread: os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}
    return [
        torch.set_num_threads,
        torch.get_num_threads(),
        set(map(frozenset, affinity.values())),
        dict(os.environ),
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.distributed.is_initialized(),
        torch.get_default_dtype(),
    ]


def test_a_head_size_vllm_lacks_is_named_before_any_sampling(tmp_path: Path, engine: SamplingEngine) -> None:
    engine.close()
    save_tiny("qwen3", tmp_path, head_dim=24)
    words = r"cannot serve .*head size 24 .*vllm\.log"
    with raises(InputError, words, setting="engine", file=tmp_path, remedy="engine: transformers"):
        open_engine(tmp_path)
    assert not torch.distributed.is_initialized()


def test_weights_that_it_cannot_read_are_refused_as_such(saved: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    """The headers are read before vLLM sees the folder: the error names the file, and the engine stays usable."""
    shutil.copytree(saved[0], tmp_path / "broken", ignore=shutil.ignore_patterns("*.log"))
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no header" * 20)
    opened = open_engine(saved[0])
    try:
        with pytest.raises(ValueError, match=r"broken/model.safetensors is no safetensors file"):
            opened.load(ModelRef(str(tmp_path / "broken")))
    finally:
        opened.close()


def test_processes_of_a_gpu_engine_do_not_hear_ctrl_c_but_can_be_ended() -> None:
    spawning = multiprocessing.get_context("spawn")
    with children_deaf_to_ctrl_c():
        child = spawning.Process(target=time.sleep, args=(60,))
        child.start()
        assert child.pid is not None
    blocked = [line for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if line.startswith("SigBlk")]
    assert int(blocked[0].split()[1], 16) & 1 << signal.SIGINT - 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.kill(child.pid, signal.SIGINT)
    child.join(1.0)
    assert child.is_alive()
    child.terminate()
    child.join(20.0)
    assert child.exitcode == -signal.SIGTERM
