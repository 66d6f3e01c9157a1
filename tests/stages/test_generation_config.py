"""Where generation from a finished checkpoint ends, and generation settings that transformers refuses to save."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from eopd.stages.engines.kept import open_sampling_engine
from eopd.stages.engines.sampling import EngineOptions, SamplingParameters, SamplingRequest
from eopd.stages.job import ModelRef
from eopd.stages.models.model_config import stop_ids_in, with_stop_ids, write_stop_ids
from eopd.stages.score.run import run as score
from eopd.stages.train import checkpoint
from eopd.stages.train.job import TrainJob
from eopd.stages.train.run import run
from eopd.storage.errors import InputError, StoreFull
from eopd.storage.files import Free
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from tests.raises import raises
from tests.stages.score_case import Lines, random_responses, rollouts, score_job
from tests.stages.tiny_models import save_teacher
from tests.stages.train_case import KillAfter, part_bytes, read_rows, train_job

PROMPT = [5, 6, 7, 8]
LENGTH = 24
OWN = 2  # the student's stop id


def greedy(model: Any, **arguments: Any) -> list[int]:
    """The continuation of ``PROMPT``, as a user of the folder generates it."""
    with torch.no_grad():
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=LENGTH, do_sample=False, **arguments)
    return list(map(int, ids[0, len(PROMPT) :]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Models, rollouts and scores; and the teacher's stop id, which the student's greedy continuation comes upon."""
    folder = tmp_path_factory.mktemp("world")
    save_teacher("qwen3", folder / "teacher", seed=0)
    student = save_teacher("qwen3", folder / "student", seed=1)
    free = greedy(student, eos_token_id=None)
    stop = next(token for place, token in enumerate(free) if place >= 3 and token not in (*free[:place], OWN))
    rows = random_responses(8, seed=3, most=12)
    source = rollouts(folder / "store", [rows[:5], rows[5:]])
    score(score_job(folder / "store", folder / "teacher", source, stop_ids=tuple(sorted((OWN, stop)))))
    return folder, stop


def job_of(world: tuple[Path, int], name: str, **changes: Any) -> TrainJob:
    """A training that leaves the greedy continuation as it was."""
    folder, stop = world
    given = {"student_stop_ids": (OWN,), "teacher_stop_ids": (stop,), "optimizer": {"lr": 1e-9}, "epochs": 1}
    return train_job(folder, name, **(given | changes))


def evaluated(engine: str, folder: Path, stop_ids: Sequence[int], log_dir: Path) -> list[int]:
    """The greedy continuation, as the evaluation samples it."""
    opened = open_sampling_engine(engine, ModelRef(str(folder)), max_model_len=64, log_dir=log_dir)  # type: ignore[arg-type]
    try:
        parameters = SamplingParameters(temperature=0.0, max_new_tokens=LENGTH, stop_ids=tuple(stop_ids))
        (sample,) = opened.sample([SamplingRequest(PROMPT, 0)], parameters)
    finally:
        opened.close()
    assert sample.finish_reason == "stop"
    return sample.token_ids.tolist()


@pytest.mark.parametrize("more", [{}, {"lora": {"rank": 2}}, {"ema": 0.5}], ids=["plain", "lora", "ema"])
def test_transformers_ends_where_the_evaluation_does(
    world: tuple[Path, int], tmp_path: Path, more: dict[str, Any]
) -> None:
    job = job_of(world, f"ends-{'-'.join(more)}", **more)
    run(job)
    export, rest = job.output.part_folder(WEIGHTS), job.output.part_folder(OPTIMIZER)
    stops = [OWN, world[1]]
    folders = [export, *([rest / "ema"] if "ema" in more else [])]
    for folder in folders:
        assert stop_ids_in(folder) == stops
        assert greedy(AutoModelForCausalLM.from_pretrained(folder)) == evaluated(
            "transformers", folder, stops, tmp_path
        )
    if "lora" in more:
        assert GenerationConfig.from_pretrained(rest / "adapter").eos_token_id == stops
    assert len(greedy(AutoModelForCausalLM.from_pretrained(world[0] / "student"))) == LENGTH
    originals = {path.name for path in (world[0] / "student").iterdir()}
    assert originals <= {path.name for path in export.iterdir()}


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_ends_where_the_evaluation_does(world: tuple[Path, int], tmp_path: Path) -> None:
    """vLLM as a user starts it: with the folder's own generation settings."""
    from eopd.stages.engines.vllm_process import VLLMProcess

    job = job_of(world, "vllm")
    run(job)
    folder = job.output.part_folder(WEIGHTS)
    options = EngineOptions(cpu_kv_cache_gib=0.25, cpu_threads=1)
    arguments = {"generation_config": "auto", "skip_tokenizer_init": False, "max_model_len": 64}
    process = VLLMProcess(ModelRef(str(folder)), log=tmp_path / "vllm.log", options=options, **arguments)
    try:
        with process.working():
            parameters = process.llm.get_default_sampling_params()
            parameters.temperature, parameters.max_tokens = 0.0, LENGTH
            (answer,) = process.llm.generate([{"prompt_token_ids": PROMPT}], parameters, use_tqdm=False)
    finally:
        process.close()
    (output,) = answer.outputs
    assert list(output.token_ids) == evaluated("transformers", folder, [OWN, world[1]], tmp_path)


def test_generation_settings_that_need_no_change_are_copied_as_they_are(world: tuple[Path, int]) -> None:
    job = job_of(world, "same", teacher_stop_ids=(OWN,), objective={"name": "fkl"})
    run(job)
    before = json.loads((world[0] / "student" / "generation_config.json").read_text())
    assert json.loads((job.output.part_folder(WEIGHTS) / "generation_config.json").read_text()) == before


@pytest.mark.parametrize(
    ("values", "saved"),
    [
        ({"temperature": 0.9, "do_sample": False}, {"temperature": 0.9, "do_sample": True}),
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
        ({"top_k": 20, "do_sample": False}, {"top_k": 20, "do_sample": True}),
        ({"temperature": 0.0, "top_p": 0.5, "do_sample": False}, {"do_sample": False}),
        ({"pad_token_id": -1}, {}),
        ({"early_stopping": True, "num_beams": 1}, {"num_beams": 1}),
        ({"length_penalty": 2.0, "num_beams": 4}, {"length_penalty": 2.0, "num_beams": 4}),
        ({"output_scores": True, "max_length": 40}, {"max_length": 40}),
    ],
)
def test_what_transformers_refuses_to_save_is_repaired(
    values: dict[str, Any], saved: dict[str, Any], tmp_path: Path
) -> None:
    exported, changes = with_stop_ids(GenerationConfig(eos_token_id=OWN, **values), (OWN,))
    exported.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    written.pop("transformers_version")
    assert written == {"eos_token_id": OWN, **saved}
    assert bool(changes) == (values != saved)


def test_a_student_whose_settings_cannot_be_saved_is_trained_and_saved(world: tuple[Path, int]) -> None:
    """As Llama 2 and Vicuna were published (transformers#29988)."""
    file = world[0] / "student" / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "temperature": 0.9, "top_p": 0.6, "do_sample": False}))
    lines = Lines()
    try:
        job = job_of(world, "llama 2", progress=lines)
        run(job)
    finally:
        file.write_text(before)
    saved = GenerationConfig.from_pretrained(job.output.part_folder(WEIGHTS))
    assert (saved.temperature, saved.top_p, saved.do_sample) == (0.9, 0.6, True)
    assert any("do_sample is true" in line for line in lines.lines)


@pytest.mark.parametrize(
    ("broken", "more"),
    [
        ("_save_companions", {}),
        ("_save_weights", {}),
        ("_save_weights", {"lora": {"rank": 2}}),
        ("save_adapter", {"lora": {"rank": 2}}),
        ("merged_weights", {"lora": {"rank": 2}}),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(
    world: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, broken: str, more: dict[str, Any]
) -> None:
    def refuse(*_: Any) -> None:
        raise TypeError("Object of type dtype is not JSON serializable")

    monkeypatch.setattr(checkpoint, broken, refuse)
    job = job_of(world, f"refused {broken} {bool(more)}", **more)
    with raises(InputError, "TypeError", file=job.student.path):
        run(job)
    assert not job.progress_states.committed()
    assert not list(job.progress_states.folder.glob("part-*"))


def test_a_commit_that_fails_after_all_costs_no_step(world: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the last step is kept; the same command then only commits, with the same bytes."""
    undisturbed, job = (job_of(world, name, optimizer={"lr": 1e-3}) for name in ("undisturbed", "disturbed"))
    run(undisturbed)

    def fail(*_: Any) -> None:
        raise OSError("the file server is gone")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write_parts", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="file server"):
                run(job)
    assert max(job.progress_states.committed()) == len(read_rows(undisturbed))
    run(replace(job, progress=KillAfter(0)))  # a step would raise
    for part in (WEIGHTS, OPTIMIZER):
        assert part_bytes(job.output, part) == part_bytes(undisturbed.output, part)


def test_a_checkpoint_that_would_not_fit_is_refused_before_the_first_step(
    world: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(value.numel() * 4 for value in load_file(world[0] / "student" / "model.safetensors").values())
    job = job_of(world, "too large")
    monkeypatch.setattr(checkpoint, "free_of", lambda _: Free(3 * weights - 1, None))
    with raises(StoreFull, f"{3 * weights:,} bytes", file=job.output.folder):
        run(job)
    assert not job.progress_states.committed()


def test_stop_ids_are_written_beside_the_settings_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": None}))
    write_stop_ids(tmp_path, (2, 9))
    file = tmp_path / "generation_config.json"
    assert json.loads(file.read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 9]}
    file.write_text(json.dumps({"eos_token_id": 2, "top_k": 20}))
    write_stop_ids(tmp_path, (2, 9))
    assert json.loads(file.read_text()) == {"eos_token_id": [2, 9], "top_k": 20}


@pytest.mark.parametrize("text", ["[]", "3"])
def test_generation_settings_that_are_no_object_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    for look in (lambda: stop_ids_in(tmp_path), lambda: write_stop_ids(tmp_path, (2,))):
        with raises(InputError, file=tmp_path / "generation_config.json"):
            look()
