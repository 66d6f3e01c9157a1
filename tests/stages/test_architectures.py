"""Every architecture against its own full model: packed or not, at lengths that matter, sampled, loaded and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.numpy import load_file as load_arrays
from torch import nn

from eopd.stages.align.divergence import LoadedModel, measure_alignment
from eopd.stages.engines.hidden import full_model_logits
from eopd.stages.engines.kept import Engines, open_hidden_engine, open_sampling_engine
from eopd.stages.engines.sampling import EngineOptions, SamplingParameters, SamplingRequest
from eopd.stages.engines.sampling_transformers import TransformersSamplingEngine, sequence_logprobs
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import lm_head_of, traits_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.model_config import length_boundary, scaled_positions
from eopd.stages.models.packing import Sequence, final_hidden, layout_of, pack
from eopd.stages.score.run import run as score
from eopd.stages.train.run import freeze_unread
from eopd.stages.train.run import run as train
from eopd.storage.errors import InputError
from eopd.storage.paths import OPTIMIZER, ROUND_START_FILE, WEIGHTS
from eopd.storage.teacher_cache import TeacherCache
from tests.raises import raises
from tests.stages.score_case import random_responses, rollouts, score_job
from tests.stages.tiny_models import COMMON, save_teacher, tiny_model, tiny_tokenizer
from tests.stages.tiny_zoo import MULTIMODAL, PACKED, UNPACKED, UNPACKED_TOWERS, zoo_model
from tests.stages.train_case import RESPONSES, train_job

LENGTHS = [(5, 9), (12, 1), (1, 20), (30, 14), (3, 3), (2, 0)]
CHANGED = {
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 16,
            "long_factor": [float(4 + n) for n in range(16)],
            "original_max_position_embeddings": 32,
        },
        "original_max_position_embeddings": 32,
    },
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 32,
    },
}


def _model(name: str, **changes: Any) -> Any:
    model = zoo_model(name, **changes)
    if model is None:
        pytest.skip(f"transformers {hf.__version__} lacks it")
    return model


def _sequences(lengths: list[tuple[int, int]] = LENGTHS, seed: int = 1) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 290, (c + r,), generator=generator).tolist() for c, r in lengths]
    return [Sequence(one[:c], one[c:]) for one, (c, _) in zip(ids, lengths, strict=True)]


def _check_parity(model: Any, sequences: list[Sequence], row_tokens: int = 48) -> None:
    """Our head on our hidden states, several sequences a call, equals the model's own logits of each one alone."""
    head, layout = lm_head_of(model), layout_of(model)
    seen = []
    with torch.no_grad():
        for packed in pack(sequences, row_tokens, 3 * row_tokens, layout):
            parts = head.logits(final_hidden(model, packed)).split(packed.lengths)
            for number, part in zip(packed.order, parts, strict=True):
                own = full_model_logits(model, sequences[number], "cpu")
                torch.testing.assert_close(part, own, atol=2e-5 * max(1.0, float(own.abs().max())), rtol=0)
                assert own.std() > 0.05, "flat logits would hide a forgotten trait"
                seen.append(number)
    assert sorted(seen) == [n for n, sequence in enumerate(sequences) if len(sequence.response_ids)]


@pytest.mark.parametrize("name", [*PACKED, *UNPACKED, *MULTIMODAL])
def test_every_sequence_is_read_as_alone(name: str) -> None:
    model = _model(name)
    _check_parity(model, _sequences())
    assert layout_of(model).packed == (name not in UNPACKED and name not in UNPACKED_TOWERS)
    assert layout_of(model).batched


@pytest.mark.parametrize("kind", CHANGED)
def test_positions_that_scale_with_length_do_not_depend_on_neighbours(kind: str) -> None:
    model = tiny_model("phi3" if kind == "longrope" else "llama", **CHANGED[kind])
    lengths = [(8, 10), (30, 36), (4, 6), (33, 1), (50, 40), (20, 12), (20, 13), (30, 37)]
    sequences = _sequences(lengths)
    _check_parity(model, sequences, row_tokens=512)
    _check_parity(model, sequences[::-1], row_tokens=512)
    assert layout_of(model).boundary == 32
    beside = pack(sequences[:2], 512, 512)[0]  # without the layout the short one changes: the check can see it
    with torch.no_grad():
        short = lm_head_of(model).logits(final_hidden(model, beside)).split(beside.lengths)[beside.order.index(0)]
    gap = short.log_softmax(-1) - full_model_logits(model, sequences[0], "cpu").log_softmax(-1)
    assert gap.abs().max() > 0.1


def test_an_unknown_scaling_that_depends_on_length_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("phi3", **CHANGED["longrope"])
    known = scaled_positions(model.config.to_dict())
    assert known is not None
    strange = type(known)("strange", known.boundary, alike_beyond=True)
    monkeypatch.setattr("eopd.stages.models.packing.scaled_positions", lambda config: strange)
    assert layout_of(model).boundary == 32
    _check_parity(model, _sequences([(8, 10), (30, 36), (4, 6)]), row_tokens=512)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_positions_that_scale_alike_at_every_length_stay_packed(kind: str) -> None:
    further = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, **further}
    model = tiny_model("llama", rope_parameters=rope)
    assert layout_of(model).describe() == ""
    _check_parity(model, _sequences([(8, 10), (30, 36), (4, 6)]), row_tokens=512)


def test_rows_do_not_cross_a_chunk_of_chunked_attention() -> None:
    model = _model("llama4_text", layer_types=["chunked_attention", "full_attention"])
    assert layout_of(model).row_limit == 32
    _check_parity(model, _sequences([(10, 10), (10, 9), (10, 8), (20, 30)]), row_tokens=128)


def test_a_dynamic_scaling_forgets_longer_sequences() -> None:
    model = tiny_model("llama", **CHANGED["dynamic"])
    short, long = _sequences([(20, 12), (40, 40)])
    with torch.no_grad():
        first = full_model_logits(model, short, "cpu")
        full_model_logits(model, long, "cpu")
        assert torch.equal(full_model_logits(model, short, "cpu"), first)


def test_a_reader_in_memory_and_an_engine_keep_lengths_apart(tmp_path: Path) -> None:
    model = save_teacher("phi3", tmp_path, **CHANGED["longrope"])
    sequences = _sequences([(8, 9), (30, 36)])
    engine = open_hidden_engine("transformers", ModelRef(str(tmp_path)), longest=66, log_dir=tmp_path)
    assert "more than 32 tokens" in engine.note
    for reader in (LoadedModel(model), engine):
        for batch in reader.hidden(sequences):
            for number, hidden in zip(batch.order, batch.hidden.split(batch.lengths), strict=True):
                with torch.no_grad():
                    own = full_model_logits(model, sequences[number], "cpu")
                    torch.testing.assert_close(reader.head.logits(hidden), own, atol=1e-4, rtol=1e-4)
    final_hidden(model, pack(sequences[:1], 64)[0]).sum().backward()  # a model that was read can still be trained
    engine.close()


def test_scaled_positions_of_configs_as_they_are_written() -> None:
    old = {"model_type": "phi3", "rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096}
    nested = {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}, "max_position_embeddings": 8}
    }
    assert scaled_positions(old).boundary == 4096  # type: ignore[union-attr]
    assert scaled_positions(nested).boundary == 8  # type: ignore[union-attr]
    assert scaled_positions(COMMON) is None
    assert scaled_positions({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}) is None


def test_vllm_is_not_opened_where_it_would_scale_positions_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    save_teacher("phi3", tmp_path / "longrope", **CHANGED["longrope"])
    save_teacher("llama", tmp_path / "dynamic", **CHANGED["dynamic"])
    options: dict[str, Any] = {"log_dir": tmp_path}
    for name, longest in (("longrope", 33), ("dynamic", 16)):
        with raises(InputError, setting="engine", file=tmp_path / name / "config.json", remedy="engine"):
            open_hidden_engine("vllm", ModelRef(str(tmp_path / name)), longest=longest, **options)
        engine = open_hidden_engine("auto", ModelRef(str(tmp_path / name)), longest=longest, **options)
        assert engine.name == "transformers"
        engine.close()
    with raises(InputError, file=tmp_path / "dynamic" / "config.json", remedy="engine"):
        open_sampling_engine("vllm", ModelRef(str(tmp_path / "dynamic")), max_model_len=16, **options)


def test_an_engine_kept_for_later_is_not_opened_beyond_a_length_boundary(tmp_path: Path) -> None:
    save_teacher("phi3", tmp_path, **CHANGED["longrope"])
    engines, ref = Engines(keep=True), ModelRef(str(tmp_path))
    assert engines._with_room(20, ref) == 32
    assert engines._with_room(40, ref) == 256


# -- heads that cannot be trusted ------------------------------------------------------------------------------------


def _strange(**methods: Any) -> Any:
    model = tiny_model("llama")
    model.__class__ = type("StrangeForCausalLM", (type(model),), methods)
    return model


def test_an_unknown_class_is_measured_and_not_refused() -> None:
    model = _strange()
    _check_parity(model, _sequences())


def test_an_unknown_class_that_does_something_else_to_its_logits_is_refused_by_name() -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = super(type(self), self).forward(*args, **kwargs)
        out.logits = out.logits.sign() * out.logits.abs().sqrt()
        return out

    with raises(InputError, r"StrangeForCausalLM.*not scale \* softcap"):
        lm_head_of(_strange(forward=forward))


def test_a_head_that_reads_something_else_is_refused_by_name() -> None:
    model = _strange()
    model.lm_head.register_forward_pre_hook(lambda layer, inputs: (inputs[0].flip(-1),))
    with raises(InputError, "StrangeForCausalLM.*last hidden state"):
        lm_head_of(model)


def test_a_model_that_reads_ahead_is_refused_by_name() -> None:
    model = _strange()

    def look_ahead(layer: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    model.model.register_forward_hook(look_ahead)
    with raises(InputError, "StrangeForCausalLM.*later tokens"):
        layout_of(model)


def test_traits_that_the_config_names_and_the_class_ignores_are_not_applied() -> None:
    assert traits_of(_model("mpt")).scale == 1.0
    assert traits_of(_model("hyperclovax")).scale == 4.0  # Granite divides by the same setting
    assert traits_of(_model("minicpm3")).hidden_scale == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma4_text", "falcon_h1", "qwen3_next", "gpt_oss", "opt", "lfm2", "deepseek_v3"])
@pytest.mark.usefixtures("attention_in_half_precision")
def test_half_precision_finds_the_same_traits_and_layout(name: str, dtype: torch.dtype) -> None:
    model = _model(name)
    wanted, layout = traits_of(model), layout_of(model)
    half = _model(name).to(dtype)
    traits = traits_of(half)
    assert (traits.scale, traits.softcap, traits.hidden_scale) == (wanted.scale, wanted.softcap, wanted.hidden_scale)
    assert layout_of(half).packed <= layout.packed
    assert layout_of(half).batched


# -- folders, sampling, training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_folder_is_loaded_whole(name: str, tmp_path: Path) -> None:
    model = _model(name)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelRef(str(tmp_path)))
    assert type(loaded) is type(model)
    theirs, ours = model.state_dict(), loaded.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("name", ["gemma3_vision", "qwen3_vl", "mistral3_vision"])
def test_only_what_reads_text_is_trained(name: str) -> None:
    model = _model(name)
    freeze_unread(model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("vision" in key or "visual" in key or "projector" in key for key in trained)
    [packed, *_] = pack(_sequences(), 256, None, layout_of(model))
    lm_head_of(model.train()).logits(final_hidden(model, packed)).square().mean().backward()
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize("name", sorted({"deepseek_v3", "gemma4_text", "glm4_moe", "opt", *UNPACKED} - {"minimax"}))
def test_samples_carry_the_log_probs_of_the_sequence_alone(name: str, tmp_path: Path) -> None:
    _model(name).save_pretrained(tmp_path)
    engine = TransformersSamplingEngine(ModelRef(str(tmp_path)), max_model_len=64, options=EngineOptions())
    rng = np.random.default_rng(0)
    requests = [SamplingRequest(rng.integers(3, 290, length).tolist(), seed=length) for length in (5, 17, 9, 30)]
    parameters = SamplingParameters(max_new_tokens=8, stop_ids=tuple(range(3, 60)))
    for request, sample in zip(requests, engine.sample(requests, parameters), strict=True):
        prompt = list(request.prompt_token_ids)
        with torch.no_grad():
            own = sequence_logprobs(engine._model, [*prompt, *sample.token_ids.tolist()], "cpu")
        np.testing.assert_allclose(sample.logprobs, own[len(prompt) - 1 :], atol=5e-4)


def test_a_model_with_a_cache_of_its_own_is_refused_by_the_sampler(tmp_path: Path) -> None:
    _model("minimax").save_pretrained(tmp_path)
    with raises(InputError, "MiniMaxForCausalLM", file=tmp_path, remedy="engine: vllm"):
        TransformersSamplingEngine(ModelRef(str(tmp_path)), max_model_len=64, options=EngineOptions())


def test_sampling_across_a_length_boundary_is_refused(tmp_path: Path) -> None:
    save_teacher("phi3", tmp_path, **CHANGED["longrope"])
    assert length_boundary(tmp_path) == 32
    engine = TransformersSamplingEngine(ModelRef(str(tmp_path)), max_model_len=64, options=EngineOptions())
    request = SamplingRequest([5, 6, 7, 8], seed=0)
    assert len(engine.sample([request], SamplingParameters(max_new_tokens=28))) == 1
    with raises(InputError, "32 tokens, and 33", file=tmp_path / "config.json"):
        engine.sample([request], SamplingParameters(max_new_tokens=29))


# -- whole stages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3_5", "gemma3_vision", "lfm2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher and student of one kind, rollouts and their scores."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, role in enumerate(("teacher", "student")):
        model = zoo_model(request.param, seed)
        if model is None:
            pytest.skip(f"transformers {hf.__version__} lacks it")
        model.save_pretrained(folder / role)
        tiny_tokenizer(folder / role)
    rows = random_responses(RESPONSES, seed=3, most=12)
    score(score_job(folder / "store", folder / "teacher", rollouts(folder / "store", [rows[:5], rows[5:]])))
    return folder


def test_scores_are_those_of_each_response_alone(world: Path) -> None:
    teacher = load_model(ModelRef(str(world / "teacher")))
    stored = TeacherCache(train_job(world, "unused").scores[0]).read_part(0)
    rows = random_responses(RESPONSES, seed=3, most=12)[:5]
    with torch.no_grad():
        alone = [full_model_logits(teacher, Sequence([5, 6, 7], row["response_token_ids"]), "cpu") for row in rows]
    logprobs = torch.cat(alone).double().log_softmax(-1)
    np.testing.assert_allclose(stored.entropy, -(logprobs.exp() * logprobs).sum(-1), atol=4e-4)


def test_a_student_that_cannot_be_packed_or_sees_images_is_trained(world: Path) -> None:
    job = train_job(world, "trained", optimizer={"lr": 3e-5})
    train(job)
    weights = job.output.part_folder(WEIGHTS)
    before, after = (load_model(ModelRef(str(folder))).state_dict() for folder in (world / "student", weights))
    assert before.keys() == after.keys()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert any("layers" in key for key in moved)
    assert not any("vision" in key or "projector" in key for key in moved)
    student = load_model(ModelRef(str(world / "student")))
    start = load_arrays(job.output.part_folder(OPTIMIZER) / ROUND_START_FILE)["logprob"]
    own = []
    for row in random_responses(RESPONSES, seed=3, most=12):
        ids = torch.tensor(row["response_token_ids"])
        with torch.no_grad():
            logits = full_model_logits(student, Sequence([5, 6, 7], ids.tolist()), "cpu")
        own.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    np.testing.assert_allclose(start, torch.cat(own), atol=5e-4)


def test_two_models_are_compared_as_alone(world: Path) -> None:
    teacher, student = (load_model(ModelRef(str(world / role))) for role in ("teacher", "student"))
    sequences = _sequences()[:3]
    alignment = measure_alignment(teacher, student, sequences, resamples=10)
    divergences = []
    with torch.no_grad():
        for sequence in sequences:
            p, q = (full_model_logits(model, sequence, "cpu").double().log_softmax(-1) for model in (teacher, student))
            divergences.append((p.exp() * (p - q)).sum(-1))
    assert alignment.all.fkl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
