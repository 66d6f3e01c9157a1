"""The score stage on tiny models with the transformers engine: values, odd responses, refusals, several processes."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eopd.stages.engines.kept import Engines
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model, load_tokenizer_at
from eopd.stages.score.run import run
from eopd.stages.score.settings import ScoreSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from eopd.storage.student_topk import StudentTopk, write_student_topk
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import HeadRule, TeacherRows
from tests.raises import raises
from tests.stages.score_case import STOPS, Lines, random_responses, response_row, rollouts, score_job
from tests.stages.tiny_models import REQUIRED, save_teacher, tiny_tokenizer

STORED_LOGPROB = 1 / 256
"""Error bound of stored log-probs, nats."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher("qwen3", folder)
    return folder


def _oracle(folder: Path, context: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[T, V] log-probs by the model's own forward pass over one sequence."""
    model = load_model(ModelRef(str(folder)))
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *response]])).logits[0, len(context) - 1 : -1]
    return (logits.double() / temperature).log_softmax(1)


def _check_response(rows: TeacherRows, number: int, logprobs: torch.Tensor, response: list[int]) -> None:
    part = slice(rows.response_offsets[number], rows.response_offsets[number + 1])
    assert rows.token_ids[part].tolist() == response
    places = np.arange(len(response))
    entropy = -(logprobs.exp() * logprobs).sum(1).numpy()
    assert np.abs(rows.entropy[part] - entropy).max() < 3e-4
    assert np.abs(rows.sampled_logprob[part] - logprobs[places, response].numpy()).max() < 2 * STORED_LOGPROB
    last = rows.stop_logprobs[part][-1]
    assert np.abs(last - logprobs[-1, list(STOPS)].numpy()).max() < 2 * STORED_LOGPROB
    for row, place in zip(range(part.start, part.stop), places, strict=True):
        head = slice(rows.head_offsets[row], rows.head_offsets[row + 1])
        best = logprobs[place].topk(len(rows.head_ids[head]))
        assert rows.head_ids[head].tolist() == best.indices.tolist()
        assert np.abs(rows.head_logprobs[head] - best.values.numpy()).max() < 2 * STORED_LOGPROB


def test_a_part_without_responses_is_not_what_the_engine_is_checked_on(teacher: Path, tmp_path: Path) -> None:
    job = score_job(tmp_path, teacher, rollouts(tmp_path, [[], random_responses(3)]))
    run(job)
    assert isinstance(job.progress, Lines)
    checks = [line for line in job.progress.lines if "full model's logits" in line]
    assert len(checks) == 1
    assert "(the checkpoint): total variation" in checks[0]
    assert "of 3 sequences read side by side" in checks[0]


@pytest.mark.parametrize("name", REQUIRED)
def test_scores_equal_the_model_alone(name: str, tmp_path: Path) -> None:
    save_teacher(name, tmp_path / "teacher")
    data = random_responses(7)
    source = rollouts(tmp_path, [data[:4], data[4:]])
    job = score_job(tmp_path, tmp_path / "teacher", source, batch_tokens=64, row_tokens=48)
    run(job)
    assert job.output.is_complete()
    assert isinstance(job.progress, Lines)
    assert "checked against the full model's logits" in job.progress.lines[0]
    cache = TeacherCache(job.output)
    for part, members in enumerate((data[:4], data[4:])):
        rows = cache.read_part(part)
        for number, row in enumerate(members):
            logprobs = _oracle(tmp_path / "teacher", row["prompt_token_ids"], row["response_token_ids"])
            _check_response(rows, number, logprobs, row["response_token_ids"])


@pytest.mark.usefixtures("attention_in_half_precision")
def test_an_engine_that_is_opened_again_is_checked_again(teacher: Path, tmp_path: Path) -> None:
    """As after each training on a GPU; one that stays open is not."""
    engines = Engines(keep=True)
    source = rollouts(tmp_path, [random_responses(2)])
    told = []
    for number in range(3):
        job = score_job(tmp_path, teacher, source, name=f"s{number}", engines=engines)
        run(job)
        if number == 1:
            engines.close()
        assert isinstance(job.progress, Lines)
        told.append(any("checked against" in line for line in job.progress.lines))
    engines.close()
    assert told == [True, False, True]


def test_odd_responses_have_defined_rows(teacher: Path, tmp_path: Path) -> None:
    data = [response_row(0, []), response_row(1, [2]), response_row(2, [10, 11, 2]), response_row(3, [])]
    source = rollouts(tmp_path, [data, [], [response_row(4, [])]])
    job = score_job(tmp_path, teacher, source)
    run(job)
    cache = TeacherCache(job.output)
    assert [cache.response_count(part) for part in range(3)] == [4, 0, 1]
    rows = cache.read([(0, 0), (0, 1), (0, 2), (0, 3), (2, 0)])
    assert rows.response_offsets.tolist() == [0, 0, 1, 4, 4, 4]
    _check_response(rows, 1, _oracle(teacher, [5, 6, 7], [2]), [2])
    _check_response(rows, 2, _oracle(teacher, [5, 6, 7], [10, 11, 2]), [10, 11, 2])


def test_too_long_is_refused_by_name_before_anything_is_stored(teacher: Path, tmp_path: Path) -> None:
    source = rollouts(tmp_path, [random_responses(2), [response_row(7, list(range(10, 40)))]])
    job = score_job(tmp_path, teacher, source, max_tokens=31)
    with raises(InputError, r"'p7' sample 0 has 32 tokens .*\(3 of context\)", setting="score.max_tokens"):
        run(job)
    assert job.output.committed() == set()


def test_too_long_is_truncated_to_what_fits(teacher: Path, tmp_path: Path) -> None:
    long, context = list(range(10, 40)), list(range(40, 80))
    data = [response_row(0, long), response_row(1, [10, 11], prompt=context), response_row(2, [12, 2])]
    job = score_job(tmp_path, teacher, rollouts(tmp_path, [data]), max_tokens=31, too_long="truncate")
    run(job)
    rows = TeacherCache(job.output).read_part(0)
    assert rows.response_offsets.tolist() == [0, 29, 29, 31], "31 read tokens predict 29 after a context of 3"
    _check_response(rows, 0, _oracle(teacher, [5, 6, 7], long)[:29], long[:29])
    assert job.output.marker(0).info["truncated"] == 2
    assert any("2 responses are longer than the 31 tokens" in line for line in job.progress.lines)  # type: ignore[attr-defined]


def test_temperature_divides_the_logits(teacher: Path, tmp_path: Path) -> None:
    data = random_responses(3)
    source = rollouts(tmp_path, [data])
    job = score_job(tmp_path, teacher, source, rollout_temperature=0.7)
    run(job)
    assert TeacherCache(job.output).header(0).temperature == 0.7
    logprobs = _oracle(teacher, [5, 6, 7], data[0]["response_token_ids"], 0.7)
    _check_response(TeacherCache(job.output).read_part(0), 0, logprobs, data[0]["response_token_ids"])
    with raises(InputError, setting="score.temperature"):
        run(score_job(tmp_path, teacher, source, name="t", temperature=0.5))
    allowed = score_job(tmp_path, teacher, source, name="t", temperature=0.5, allow_other_temperature=True)
    run(allowed)
    logprobs = _oracle(teacher, [5, 6, 7], data[0]["response_token_ids"], 0.5)
    _check_response(TeacherCache(allowed.output).read_part(0), 0, logprobs, data[0]["response_token_ids"])


def test_settings_split_into_identity_and_coverage() -> None:
    settings = ScoreSettings(head={"k_max": 32}, temperature=0.5, batch_tokens=7)
    assert set(settings.identity()) == {"teacher_prompt", "temperature", "dtype", "max_tokens", "too_long"}
    assert settings.coverage()["head"]["k_max"] == 32
    assert ScoreSettings(batch_tokens=9).identity() == ScoreSettings(engine="transformers").identity()
    with pytest.raises(ValueError, match="no effect with kind: same"):
        ScoreSettings(teacher_prompt={"kind": "same", "suffix": "x"})
    with pytest.raises(ValueError, match=r"score\.dtype"):
        ScoreSettings(engine_options={"dtype": "bfloat16"})
    with raises(InputError, setting="n_draws", remedy="draws: full"):
        HeadRule(draws="full")


def test_the_students_topk_gets_the_teachers_logprobs(teacher: Path, tmp_path: Path) -> None:
    data = random_responses(4)
    source = rollouts(tmp_path, [data])
    lengths = np.asarray([len(row["response_token_ids"]) for row in data], np.int32)
    ids = np.random.default_rng(1).integers(0, 320, (int(lengths.sum()), 5)).astype(np.int32)
    side = Artifact(tmp_path, Identity("student_topk", 1, 1, inputs={"rollouts": source.key}))
    with side.write_part(0) as folder:
        write_student_topk(folder, StudentTopk(lengths, ids, np.zeros(ids.shape, np.float32)))
    job = score_job(tmp_path, teacher, source, student_topk=side)
    run(job)
    rows = TeacherCache(job.output).read_part(0)
    assert rows.extra_ids.reshape(-1, 5).tolist() == ids.tolist()
    logprobs = torch.cat([_oracle(teacher, [5, 6, 7], row["response_token_ids"]) for row in data])
    expected = logprobs.gather(1, torch.from_numpy(ids).long()).numpy()
    assert np.abs(rows.extra_logprobs.reshape(-1, 5) - expected).max() < 2 * STORED_LOGPROB
    assert set(job.output.marker(0).inputs) == {"rollouts", "student_topk"}
    with side.write_part(0) as folder:  # loses: already committed
        pass
    other = rollouts(tmp_path, [data[:3]], name="other")
    with pytest.raises(ValueError, match="other lengths"):
        run(score_job(tmp_path, teacher, other, name="o", student_topk=side))


def test_nan_fails_its_part_by_name_and_the_others_stay(teacher: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    save_teacher("qwen3", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    parts = [
        [response_row(0, [10, 11])],
        [response_row(1, [12]), response_row(2, [13, 77, 14, 15])],
        [response_row(3, [16])],
    ]
    job = score_job(tmp_path, broken, rollouts(tmp_path, parts))
    with raises(InputError, "part 1: prompt 'p2' sample 0, response token 2", setting="score.dtype"):
        run(job)
    assert job.output.committed() == {0, 2}


def test_an_engine_that_disagrees_with_the_model_stops_the_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eopd.stages.engines import hidden as hidden_transformers

    def forgetful(model: Any) -> Any:
        head = lm_head_of(model)
        return type(head)(head.weight, None, 0.25, None, head.vocab_size)

    monkeypatch.setattr(hidden_transformers, "lm_head_of", forgetful)
    job = score_job(tmp_path, teacher, rollouts(tmp_path, [random_responses(2)]))
    with raises(InputError, r"disagrees .* variation distance 0\.", setting="score.engine", remedy="other engine"):
        run(job)
    assert job.output.committed() == set()


def test_weights_that_changed_in_memory_are_seen_by_the_check(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the checkpoint, loaded again: the engine's own weights would agree with themselves."""
    from eopd.stages.engines import hidden as hidden_transformers

    def replaced(ref: ModelRef, device: str) -> Any:
        model = load_model(ref, device)
        monkeypatch.setattr(hidden_transformers, "load_model", load_model)
        torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
        return model

    monkeypatch.setattr(hidden_transformers, "load_model", replaced)
    with raises(InputError, r"disagrees .* own logits \(the checkpoint\)", setting="score.engine"):
        run(score_job(tmp_path, teacher, rollouts(tmp_path, [random_responses(2)])))


@pytest.mark.parametrize("count", [1, 3])
def test_neighbours_that_change_each_other_are_seen_by_the_check(
    count: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, each is right."""
    from eopd.stages.engines import hidden as hidden_transformers

    own = hidden_transformers.final_hidden

    def leaking(model: Any, packed: Any) -> torch.Tensor:
        return own(model, replace(packed, position_ids=torch.arange(packed.input_ids.shape[1])[None]))

    monkeypatch.setattr(hidden_transformers, "final_hidden", leaking)
    with raises(InputError, "disagrees with .* own logits", setting="score.engine"):
        run(score_job(tmp_path, teacher, rollouts(tmp_path, [random_responses(count)])))


def test_a_teacher_whose_entropies_are_all_those_of_no_weights_is_refused(tmp_path: Path) -> None:
    save_teacher("qwen3", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    job = score_job(tmp_path, tmp_path / "teacher", rollouts(tmp_path, [random_responses(2)]))
    with raises(
        InputError, "entropy ln 320", setting="score.engine", file=tmp_path / "teacher", remedy="Check its files"
    ):
        run(job)
    assert job.output.committed() == set()


def test_other_vocabulary_is_refused_naming_the_first_id(teacher: Path, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "swapped", swapped=True)
    source = rollouts(tmp_path, [random_responses(1)])
    with raises(InputError, "2 ids, first at id 259: b'ee' against b'et'"):
        run(score_job(tmp_path, teacher, source, student_tokenizer=str(tmp_path / "swapped")))
    tiny_tokenizer(tmp_path / "plain", template=None)
    run(score_job(tmp_path, teacher, source, student_tokenizer=str(tmp_path / "plain")))


def test_missing_teacher_is_named(tmp_path: Path) -> None:
    source = rollouts(tmp_path, [random_responses(1)])
    with raises(InputError, file=tmp_path / "nowhere"):
        run(score_job(tmp_path, tmp_path / "nowhere", source))


def test_max_tokens_beyond_the_model_is_refused(teacher: Path, tmp_path: Path) -> None:
    source = rollouts(tmp_path, [random_responses(1)])
    with raises(InputError, "256", setting="score.max_tokens"):
        run(score_job(tmp_path, teacher, source, max_tokens=1000))


def test_committed_parts_are_not_done_again(teacher: Path, tmp_path: Path) -> None:
    source = rollouts(tmp_path, [random_responses(2, seed=part) for part in range(3)])
    run(score_job(tmp_path, teacher, source, parts=[1]))
    job = score_job(tmp_path, teacher, source)
    assert job.output.committed() == {1}
    before = job.output.marker(1)
    run(job)
    assert job.output.is_complete()
    assert job.output.marker(1) == before
    run(score_job(tmp_path, tmp_path / "gone", source))  # nothing to do: the teacher is not even looked for


def _work(store: Path, teacher: Path, source: Artifact, parts: list[int]) -> None:
    torch.set_num_threads(1)
    run(score_job(store, teacher, source, parts=parts))


def test_several_processes_on_one_artifact(teacher: Path, tmp_path: Path) -> None:
    """Two processes with parts in common: the bytes are those of a single process."""
    data = [random_responses(3, seed=part) for part in range(6)]
    alone = tmp_path / "alone"
    source = rollouts(alone, data)
    torch.set_num_threads(1)
    run(score_job(alone, teacher, source))
    shared = tmp_path / "shared"
    source = rollouts(shared, data)
    context = multiprocessing.get_context("spawn")
    tasks = [[0, 1, 2, 3], [5, 4, 3, 2, 1]]
    workers = [context.Process(target=_work, args=(shared, teacher, source, parts)) for parts in tasks]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    job = score_job(shared, teacher, source)
    assert job.output.is_complete()
    expected = score_job(alone, teacher, source).output
    for part in range(6):
        assert job.output.marker(part).checksum == expected.marker(part).checksum
        job.output.verify_part(part)


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
def test_the_chat_context_is_what_apply_chat_template_gives(
    teacher: Path, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    row = response_row(0, [30, 31, 2])
    conversation = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "say"},
        {"role": "user", "content": "é?"},
    ]
    other = response_row(1, [32], messages=json.dumps(conversation))
    prompt = {"kind": "template", "arguments": arguments, "suffix": " Think."}
    job = score_job(tmp_path, teacher, rollouts(tmp_path, [[row, other]]), teacher_prompt=prompt)
    run(job)
    rows = TeacherCache(job.output).read_part(0)
    conversation[-1]["content"] += " Think."
    for number, messages in enumerate([[{"role": "user", "content": "question 0 Think."}], conversation]):
        context = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **arguments)["input_ids"]
        response = (row, other)[number]["response_token_ids"]
        _check_response(rows, number, _oracle(teacher, context, response), response)
    assert json.loads(TeacherCache(job.output).header(0).teacher_context)["arguments"] == arguments


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_column_as_context(teacher: Path, tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    source = rollouts(tmp_path, [[response_row(3, [30, 2])]])
    job = score_job(tmp_path, teacher, source, teacher_prompt={"kind": "column", "template": template})
    run(job)
    context = tokenizer("hint 3")["input_ids"]
    if template == "chat":
        context = tokenizer.apply_chat_template([{"role": "user", "content": "hint 3"}], add_generation_prompt=True)[
            "input_ids"
        ]
    _check_response(TeacherCache(job.output).read_part(0), 0, _oracle(teacher, context, [30, 2]), [30, 2])


@pytest.mark.parametrize(
    ("row", "prompt", "words"),
    [
        (response_row(3, [30], prompt=[]), "same", "empty teacher context"),
        (response_row(3, [30], teacher_prompt=None), "column", "no text in the teacher_prompt column"),
        (response_row(3, [30], messages=None), "template", "no messages"),
        (
            response_row(3, [30], messages=json.dumps([{"role": "user", "content": "a"}] * 2)),
            {"kind": "template", "template": "plain"},
            "2 messages",
        ),
        (
            response_row(3, [30], teacher_prompt=""),
            {"kind": "column", "template": "plain"},
            "empty teacher context",
        ),
    ],
)
def test_contexts_that_cannot_be_made_are_refused_by_prompt(
    teacher: Path, tmp_path: Path, row: dict[str, Any], prompt: Any, words: str
) -> None:
    job = score_job(tmp_path, teacher, rollouts(tmp_path, [[row]]), teacher_prompt=prompt)
    with raises(InputError, words, prompt="p3"):
        run(job)


def test_a_teacher_without_a_template_is_refused(tmp_path: Path) -> None:
    save_teacher("llama", tmp_path / "teacher")
    tiny_tokenizer(tmp_path / "teacher", template=None)
    (tmp_path / "teacher" / "chat_template.jinja").unlink(missing_ok=True)
    source = rollouts(tmp_path, [random_responses(1)])
    with pytest.raises(ValueError, match="no chat template"):
        run(score_job(tmp_path, tmp_path / "teacher", source, teacher_prompt="template"))
