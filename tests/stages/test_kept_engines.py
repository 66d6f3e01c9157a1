"""Engines that stay up: the weights they serve are proved, and nothing that was kept changes what is sampled."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from eopd.stages.engines import probe
from eopd.stages.engines.kept import Engines, open_sampling_engine
from eopd.stages.engines.sampling import (
    EngineKind,
    EngineOptions,
    Sample,
    SamplingEngine,
    SamplingParameters,
    SamplingRequest,
    derive_seed,
)
from eopd.stages.job import ModelRef, NullProgress
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages.tiny_models import save_tiny

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ENGINES = [pytest.param("vllm", marks=[pytest.mark.vllm, needs_vllm]), "transformers"]
OPTIONS = EngineOptions(cpu_kv_cache_gib=0.25, cpu_threads=1)
PARAMETERS = SamplingParameters(max_new_tokens=12, stop_ids=(2, 40))


class Told(NullProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRef]:
    """Of two rounds: one shape, tied weights (the case in which a head can be left behind), other values."""
    folders = [tmp_path_factory.mktemp(f"round{number}") for number in range(2)]
    for number, folder in enumerate(folders):
        save_tiny("qwen3", folder, seed=number, tie_word_embeddings=True)
    return [ModelRef(str(folder), fingerprint=f"student {n}") for n, folder in enumerate(folders)]


def requests(seed: int) -> list[SamplingRequest]:
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14], [5, 6, 7, 8]]
    return [SamplingRequest(p, derive_seed(seed, n, s)) for n, p in enumerate(prompts) for s in range(8)]


def cold(kind: EngineKind, ref: ModelRef, seed: int) -> list[Sample]:
    engine = open_sampling_engine(kind, ref, max_model_len=16, log_dir=Path(ref.path), options=OPTIONS)
    samples = engine.sample(requests(seed), PARAMETERS)
    engine.close()
    return samples


def content(samples: list[Sample]) -> list[tuple[bytes, bytes | None]]:
    return [(s.token_ids.tobytes(), None if s.logprobs is None else s.logprobs.tobytes()) for s in samples]


@pytest.fixture
def engines() -> Iterator[Engines]:
    kept = Engines(keep=True)
    yield kept
    kept.close()


def ask(
    engines: Engines, kind: EngineKind, ref: ModelRef, seed: int, told: Told
) -> tuple[SamplingEngine, list[Sample]]:
    with engines.sampling(
        kind, ref, max_model_len=16 + seed, log_dir=Path(ref.path), progress=told, options=OPTIONS
    ) as engine:
        return engine, engine.sample(requests(seed), PARAMETERS)


def test_errors_name_the_setting_that_chose_the_engine(
    tmp_path: Path, students: list[ModelRef], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sampling = engines.sampling(
        "vllm", students[0], max_model_len=8, log_dir=tmp_path, progress=NullProgress(), setting="rollout.engine"
    )
    with raises(InputError, "^rollout.engine: ", setting="rollout.engine", remedy="engine: transformers"), sampling:
        pass
    sizes = {"longest": 8, "batch_tokens": 8, "row_tokens": 8}
    reading = engines.reading(
        "vllm", students[0], log_dir=tmp_path, options=OPTIONS, dtype="auto", setting="score.engine", **sizes
    )
    with raises(InputError, "^score.engine: ", setting="score.engine", remedy="engine: transformers"), reading:
        pass


@pytest.mark.parametrize("kind", ENGINES)
def test_two_rounds_on_one_engine_are_those_of_two_engines(
    kind: EngineKind, students: list[ModelRef], engines: Engines
) -> None:
    """Evaluate and rollout of each round, whose lengths differ, and what came before on the kept engine."""
    told = Told()
    used: list[SamplingEngine] = []
    warm = []
    for round_, student in enumerate(students):
        for stage in range(2):
            engine, samples = ask(engines, kind, student, 2 * round_ + stage, told)
            used.append(engine)
            warm.append(content(samples))
    engines.close()
    assert told.lines == []
    assert all(engine is used[0] for engine in used)
    assert warm == [content(cold(kind, students[number // 2], number)) for number in range(4)]


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("wrong", ["head left behind", "nothing taken"])
def test_a_wrong_reload_is_caught_and_the_engine_opened_anew(
    wrong: str, students: list[ModelRef], engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eopd.stages.engines import sampling_vllm, vllm_process

    told = Told()
    first, _ = ask(engines, "vllm", students[0], 0, told)
    if wrong == "head left behind":  # what vLLM's own reload does on a CPU
        monkeypatch.setattr(vllm_process, "_repack_head", lambda model: None)
    else:
        monkeypatch.setattr(sampling_vllm.VLLMSamplingEngine, "load", lambda self, ref: None)
    second, samples = ask(engines, "vllm", students[1], 1, told)
    assert second is not first
    assert len(told.lines) == 1
    assert "opened anew" in told.lines[0]
    assert "differ from the checkpoint's own" in told.lines[0]
    engines.close()
    assert content(samples) == content(cold("vllm", students[1], 1))


def test_weights_that_did_not_move_are_caught_below_the_tolerance(
    students: list[ModelRef], engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from eopd.stages.engines.sampling_transformers import TransformersSamplingEngine

    model = save_tiny("qwen3", tmp_path, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 1e-6)
    model.save_pretrained(tmp_path)
    told = Told()
    engine, _ = ask(engines, "transformers", students[0], 0, told)
    monkeypatch.setattr(TransformersSamplingEngine, "load", lambda self, ref: None)
    with pytest.raises(ValueError, match="did not change at all"):
        probe.replace_weights(engine, probe.served(students[0]), probe.served(ModelRef(str(tmp_path))))


@pytest.mark.parametrize("kind", ENGINES)
def test_log_probs_of_a_sequence_are_the_models_own(kind: EngineKind, students: list[ModelRef]) -> None:
    engine = open_sampling_engine(kind, students[0], max_model_len=64, log_dir=Path(students[0].path), options=OPTIONS)
    sequences = probe.probe_sequences(320, 63)
    assert [len(sequence) for sequence in sequences] == [probe.TOKENS] * probe.SEQUENCES
    gap = probe.difference(engine.logprobs_of(sequences), probe.own_logprobs(students[0], sequences))
    engine.close()
    assert gap < 0.2 * probe.TOLERANCE["float32"]


def test_another_shape_or_other_options_open_another_engine(
    students: list[ModelRef], engines: Engines, tmp_path: Path
) -> None:
    save_tiny("qwen3", tmp_path, num_hidden_layers=1)
    told = Told()
    used = [ask(engines, "transformers", ref, 0, told)[0] for ref in (students[0], ModelRef(str(tmp_path)))]
    with engines.sampling(
        "transformers",
        ModelRef(str(tmp_path)),
        max_model_len=16,
        log_dir=tmp_path,
        progress=told,
        options=EngineOptions(cpu_threads=2),
    ) as engine:
        used.append(engine)
    assert len({id(engine) for engine in used}) == 3
    assert told.lines == []


def test_a_failure_takes_the_engine_with_it(students: list[ModelRef], engines: Engines) -> None:
    with (
        pytest.raises(RuntimeError, match="broken"),
        engines.sampling(
            "transformers",
            students[0],
            max_model_len=16,
            log_dir=Path(students[0].path),
            progress=NullProgress(),
            options=OPTIONS,
        ),
    ):
        raise RuntimeError("broken")
    assert not engines.any_open
