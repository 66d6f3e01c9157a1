"""What the teacher's context shows of a prompt and of the response: exact ids, cuts, the shuffled control, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.checks import check_shuffled
from eopd.pipeline.config import ConfigError
from eopd.stages.experiment import Experiment
from eopd.stages.models.loading import load_tokenizer_at
from eopd.stages.models.prompts import PromptSettings
from eopd.stages.models.teacher_prompts import Context, TeacherPromptSettings, donors
from eopd.stages.score.responses import PartResponses, ScoreJob, read_part
from eopd.stages.score.run import run
from eopd.stages.stage import Measured, Size
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, InputError
from eopd.storage.identity import Identity
from eopd.storage.records import read_rollouts
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.verdict_signal import VERDICTS
from tests.golden.keys import keys_of
from tests.pipeline.plan_case import make_facts, make_run, make_settings, plan_of
from tests.raises import raises
from tests.stages.score_case import STOPS, response_row, rollouts, score_job
from tests.stages.test_score_run import _check_response, _oracle
from tests.stages.tiny_models import save_teacher

COPY = {"kind": "same", "opening": "{{response}}\nSo: {{answer}}. "}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher("qwen3", folder)
    return folder


def solved(folder: Path, count: int = 4) -> PromptSettings:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"question {n}", "id": f"p{n}", "proof": f"first {n}, then {n * n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PromptSettings(path=str(path), columns={"id": "id", "solution": "proof"})


def read(job: ScoreJob, part: int = 0, limit: int | None = None) -> PartResponses:
    return read_part(job, part, load_tokenizer_at(job.teacher.path), limit)


def test_suffix_and_system_show_answer_and_solution(teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    source = rollouts(tmp_path, [[response_row(n, [30, 2], answer=f"{n + 7}") for n in (2, 0)]])
    prompt = {"kind": "template", "system": "Key: {{ answer }}", "suffix": r" \boxed{{{answer}}} by {{solution}} {x}"}
    job = score_job(tmp_path, teacher, source, teacher_prompt=prompt, prompts=solved(tmp_path))
    for sequence, number in zip(read(job).sequences, (2, 0), strict=True):
        answer = number + 7
        suffix = rf" \boxed{{{answer}}} by first {number}, then {number * number} {{x}}"
        messages = [
            {"role": "system", "content": f"Key: {answer}"},
            {"role": "user", "content": f"question {number}{suffix}"},
        ]
        assert sequence.context_ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_the_opening_holds_the_response_ids_without_their_stop(teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    unusual = [40, 41, 42, 9]  # ids that no tokenizer would give for their text, and a stop id
    rows = [response_row(0, unusual, answer="12"), response_row(1, [50, 51], answer="{{response}}")]
    job = score_job(tmp_path, teacher, rollouts(tmp_path, [rows]), teacher_prompt=COPY)
    run(job)
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\nSo: 12. ", "\nSo: {{response}}. ")]
    contexts = [[5, 6, 7, 40, 41, 42, *said[0]], [5, 6, 7, 50, 51, *said[1]]]
    assert [sequence.context_ids for sequence in read(job).sequences] == contexts
    stored = TeacherCache(job.output).read_part(0)
    for number, context in enumerate(contexts):
        response = rows[number]["response_token_ids"]
        _check_response(stored, number, _oracle(teacher, context, response), response)
    header = json.loads(TeacherCache(job.output).header(0).teacher_context)
    assert header["placeholders"] == ["answer", "response"]
    assert job.output.marker(0).info["tokens_read"] == 2 * 6


@pytest.mark.parametrize(("limit", "kept"), [(100, 5), (12, 5), (11, 4), (10, 3), (5, 1), (4, 0), (3, 0)])
def test_both_copies_are_cut_alike(limit: int, kept: int) -> None:
    context, response = Context(((5, 6), (7, 8))), [40, 41, 42, 43, 9]
    length = context.length_that_fits(response, STOPS, limit)
    assert length == kept
    copy = [40, 41, 42, 43][:length]
    assert context.ids(response[:length], STOPS) == [5, 6, *copy, 7, 8]
    assert length == 0 or len(context.ids(response[:length], STOPS)) + length - 1 <= limit


def test_too_long_counts_both_copies(teacher: Path, tmp_path: Path) -> None:
    row = response_row(7, list(range(10, 40)), answer="1")
    job = score_job(tmp_path, teacher, rollouts(tmp_path, [[row]]), teacher_prompt=COPY, too_long="truncate")
    records = read(job, limit=50)
    (sequence,) = records.sequences
    text = len(sequence.context_ids) - len(sequence.response_ids)
    assert sequence.response_ids == row["response_token_ids"][: (51 - text) // 2]
    assert sequence.context_ids[3 : 3 + len(sequence.response_ids)] == sequence.response_ids
    assert records.truncated == 1
    refusing = score_job(tmp_path, teacher, rollouts(tmp_path, [[row]]), name="t", teacher_prompt=COPY)
    with raises(InputError, "'p7' sample 0", setting="score.max_tokens"):
        read(refusing, limit=50)


def test_shuffled_gives_each_prompt_another_one_s_answer_and_solution(teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    rows = [response_row(n, [30, 2], answer=f"a{n}", sample=sample) for n in range(4) for sample in range(2)]
    prompt = {"kind": "same", "opening": "{{answer}}|{{solution}}|", "shuffled": True}
    source = rollouts(tmp_path, [rows])
    job = score_job(tmp_path, teacher, source, teacher_prompt=prompt, prompts=solved(tmp_path), seed=3)
    shown = [tokenizer.decode(one.context_ids[3:]) for one in read(job).sequences]
    assert shown[0::2] == shown[1::2], "samples of a prompt see the same"
    assert sorted(shown[::2]) == [f"a{n}|first {n}, then {n * n}|" for n in range(4)]
    assert all(not text.startswith(f"a{n}|") for n, text in enumerate(shown[::2]))
    alone = score_job(tmp_path, teacher, rollouts(tmp_path, [rows[:2]], "one"), teacher_prompt=prompt, seed=3)
    with raises(InputError, "part 0", setting="score.teacher_prompt.shuffled", remedy="rollout.rows_per_part"):
        read(ScoreJob(**{**vars(alone), "prompts": solved(tmp_path)}))


def judged(store: Path, source: Artifact, parts: list[list[bool]], name: str = "v") -> Artifact:
    """Verdicts on every response of ``source``."""
    artifact = Artifact(store, Identity("verdicts", 1, source.parts, {"name": name}))
    for number, correct in enumerate(parts):
        rows = read_rollouts(source.part_folder(number), ["prompt_id", "sample"]).to_pylist()
        inputs = {"rollouts": source.marker(number).checksum}
        with artifact.write_part(number, inputs=inputs) as folder:
            verdicts = [{**row, "correct": right} for row, right in zip(rows, correct, strict=True)]
            VERDICTS.write(folder, verdicts)
    return artifact


SAMPLES = [response_row(n, [40 + 10 * n + s, 41, 9], sample=s) for n in range(2) for s in range(3)]
CORRECT = [False, True, True, False, False, True]
TEXTS_BY_VERDICT = {"right": "Right. Again: ", "wrong": "Wrong. Better: "}


def test_the_verdict_stands_between_a_response_and_its_copy(teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    source = rollouts(tmp_path, [SAMPLES])
    prompt = {"opening": "{{response}}\n{{verdict}}", "verdicts": TEXTS_BY_VERDICT}
    job = score_job(tmp_path, teacher, source, teacher_prompt=prompt, verdicts=judged(tmp_path, source, [CORRECT]))
    for sequence, right in zip(read(job).sequences, CORRECT, strict=True):
        text = "\n" + TEXTS_BY_VERDICT["right" if right else "wrong"]
        copy = list(sequence.response_ids[:-1])
        assert sequence.context_ids == [5, 6, 7, *copy, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    run(job)
    assert job.output.marker(0).inputs.keys() == {"rollouts", "verdicts"}
    shuffled = score_job(
        tmp_path, teacher, source, teacher_prompt=prompt | {"shuffled": True}, verdicts=job.verdicts, seed=1
    )
    shown = [tokenizer.decode(one.context_ids[-15:]) for one in read(shuffled).sequences]
    assert ["Right" in text for text in shown] == [*CORRECT[3:], *CORRECT[:3]]


@pytest.mark.parametrize("otherwise", ["same", "skip"])
def test_a_right_sibling_is_the_first_other_right_response(teacher: Path, tmp_path: Path, otherwise: str) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    source = rollouts(tmp_path, [list(reversed(SAMPLES))])
    prompt = {"opening": "See {{right_sibling}}! ", "otherwise": otherwise}
    verdicts = judged(tmp_path, source, [CORRECT[::-1]])
    job = score_job(tmp_path, teacher, source, teacher_prompt=prompt, verdicts=verdicts, name=otherwise)
    see, now = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("See ", "! "))
    siblings = [[41, 41], [42, 41], [41, 41], [52, 41], [52, 41], None]  # of SAMPLES; the last is the only right one
    records = read(job)
    for sequence, row, sibling in zip(reversed(records.sequences), SAMPLES, siblings, strict=True):
        alone = sibling is None
        assert sequence.context_ids == [5, 6, 7, *([] if alone else [*see, *sibling, *now])]  # type: ignore[misc]
        assert sequence.response_ids == ([] if alone and otherwise == "skip" else row["response_token_ids"])
    assert (records.without_sibling, records.truncated) == (1, 0)
    run(job)
    assert job.output.marker(0).info["without_sibling"] == 1
    said = "were not scored" if otherwise == "skip" else "were scored as the student reads"
    assert any(f"1 responses have no right sibling and {said}" in line for line in job.progress.lines)  # type: ignore[attr-defined]


def test_a_sibling_is_text_in_a_suffix(teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer_at(str(teacher))
    text = tokenizer("so 7", add_special_tokens=False)["input_ids"]
    rows = [response_row(0, [*text, 2], sample=0), response_row(0, [40, 2], sample=1)]
    source = rollouts(tmp_path, [rows])
    prompt = {"kind": "template", "template": "plain", "suffix": " Peer: {{right_sibling}}."}
    verdicts = judged(tmp_path, source, [[True, False]])
    records = read(score_job(tmp_path, teacher, source, teacher_prompt=prompt, verdicts=verdicts))
    assert tokenizer.decode(records.sequences[1].context_ids) == "question 0 Peer: so 7."
    assert records.sequences[0].context_ids == [5, 6, 7]


def test_verdicts_on_other_rollouts_are_refused(teacher: Path, tmp_path: Path) -> None:
    source = rollouts(tmp_path, [SAMPLES])
    other = rollouts(tmp_path, [SAMPLES[::-1]], "other")
    prompt = {"opening": "{{verdict}}", "verdicts": TEXTS_BY_VERDICT}
    job = score_job(tmp_path, teacher, source, teacher_prompt=prompt, verdicts=judged(tmp_path, other, [CORRECT]))
    with pytest.raises(DamagedPart, match="verdicts on other responses"):
        run(job)


def test_verdicts_are_planned_and_keyed_for_the_contexts_that_show_them() -> None:
    answers = {"path": "p", "verifier": "exact", "columns": {"answer": "answer"}}
    plans = [
        plan_of(make_settings(prompts=answers, evaluate=None, score={"teacher_prompt": prompt}))
        for prompt in ({"opening": "{{verdict}}", "verdicts": TEXTS_BY_VERDICT}, {"opening": "{{right_sibling}}"})
    ]
    for plan in plans:
        judge, score, train = (plan.job(name, 1) for name in ("judge", "score", "train"))
        assert score.output.inputs["verdicts"] == judge.output.key
        assert score.inputs["verdicts"].by_part
        assert "verdicts" not in train.inputs
    assert plans[0].job("score", 0).output.key != plans[1].job("score", 0).output.key
    assert plans[0].job("judge", 0).output.key == plans[1].job("judge", 0).output.key


@pytest.mark.parametrize(
    ("prompts", "changes", "setting"),
    [
        ({"columns": {"answer": "a"}}, {}, "prompts.verifier"),
        ({"verifier": "exact"}, {}, "prompts.columns.answer"),
        (
            {"verifier": "exact", "columns": {"answer": "a"}},
            {"evaluate": {"benchmarks": [{"name": "b", "path": "b.jsonl"}], "alignment": {}}},
            "evaluate.alignment",
        ),
        (
            {"verifier": "exact", "columns": {"answer": "a"}},
            {"rollout": {"samples_per_prompt": 1}, "score": {"teacher_prompt": {"opening": "{{right_sibling}}"}}},
            "rollout.samples_per_prompt",
        ),
    ],
)
def test_verdicts_that_cannot_be_had_are_refused(
    prompts: dict[str, Any], changes: dict[str, Any], setting: str
) -> None:
    shows = {"teacher_prompt": {"opening": "{{verdict}}", "verdicts": TEXTS_BY_VERDICT}}
    with raises(ConfigError, setting=setting):
        make_settings(**{"prompts": {"path": "p", **prompts}, "score": shows, **changes})


def test_donors_depend_on_the_seed_and_on_nothing_else() -> None:
    result = [donors(range(50), seed, part) for seed in (1, 2) for part in (0, 1)]
    assert len({tuple(sorted(one.items())) for one in result}) == 4
    assert result[0] == donors([*range(50), 3, 4], 1, 0)
    assert all(who != whose for one in result for who, whose in one.items())


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"kind": "template", "suffix": "{{anwser}}"}, r"suffix: .*\{\{anwser\}\}. Did you mean \{\{answer\}\}"),
        ({"kind": "template", "system": "{{Solution}}"}, r"system: .*Did you mean \{\{solution\}\}"),
        ({"opening": "{{x-y}}"}, r"opening: .*Known: \{\{answer\}\}"),
        ({"kind": "template", "suffix": "{{response}}"}, r"\{\{response\}\} can stand only in .*opening"),
        ({"kind": "same", "suffix": "{{answer}}"}, "no effect with kind: same"),
        ({"kind": "template", "suffix": " Go.", "shuffled": True}, "shuffled has no effect"),
        ({"opening": "{{response}}", "shuffled": True}, "shuffled has no effect"),
        ({"opening": "{{verdict}}"}, r"set score\.teacher_prompt\.verdicts"),
        ({"opening": "{{verdict}}", "verdicts": {"right": "a", "wrong": " "}}, r"verdicts\.wrong must be text"),
        ({"opening": "{{verdict}}", "verdicts": {"right": "{{answer}}", "wrong": "b"}}, r"verdicts\.right must"),
        ({"opening": "{{answer}}", "verdicts": {"right": "a", "wrong": "b"}}, "verdicts has no effect"),
        ({"opening": "{{answer}}", "otherwise": "skip"}, "otherwise has no effect"),
    ],
)
def test_placeholders_that_cannot_stand_there_are_refused(prompt: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TeacherPromptSettings.model_validate(prompt)


@pytest.mark.parametrize("answer", [None, " "])
def test_an_answer_that_is_missing_is_refused_by_prompt(teacher: Path, tmp_path: Path, answer: str | None) -> None:
    job = score_job(
        tmp_path, teacher, rollouts(tmp_path, [[response_row(3, [30], answer=answer)]]), teacher_prompt=COPY
    )
    with raises(InputError, "answer", prompt="p3"):
        run(job)


def test_columns_and_parts_that_are_missing_are_refused_with_the_settings() -> None:
    shows: dict[str, Any] = {"teacher_prompt": {"opening": "{{solution}}"}}
    with raises(ConfigError, setting="prompts.columns.solution"):
        make_settings(score=shows)
    named = {"path": "p.jsonl", "columns": {"solution": "proof"}}
    make_settings(score=shows, prompts=named)
    benchmark = {"name": "b", "path": "b.jsonl"}
    with raises(ConfigError, setting="evaluate.benchmarks.0.columns.solution"):
        make_settings(score=shows, prompts=named, evaluate={"benchmarks": [benchmark], "alignment": {}})
    shuffled = {"teacher_prompt": {"opening": "{{solution}}", "shuffled": True}}
    with raises(ConfigError, setting="rollout.rows_per_part"):
        make_settings(score=shuffled, prompts=named, rollout={"rows_per_part": 1})


def test_a_last_part_of_one_prompt_cannot_be_shuffled(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "score": {"teacher_prompt": {"opening": "{{answer}}", "shuffled": True}},
        "prompts": {"path": "p.jsonl", "columns": {"answer": "answer"}},
    }
    check_shuffled(make_run(tmp_path, **changes))
    with raises(ConfigError, setting="score.teacher_prompt.shuffled", remedy="rollout.rows_per_part"):
        check_shuffled(make_run(tmp_path, rollout={"rows_per_part": 3}, **changes))


def test_keys_know_what_is_shown_and_rollouts_do_not() -> None:
    def keys(column: str | None = None, seed: int = 0, **prompt: Any) -> dict[str, str]:
        columns = {"answer": "answer", "solution": column}
        return keys_of(
            make_settings(
                seed=seed, prompts={"path": "p", "columns": columns}, score={"teacher_prompt": prompt}, evaluate=None
            )
        )

    plain = keys()
    assert keys("proof") == plain, "a column that nothing shows is in no key"
    assert keys(opening="", shuffled=False) == plain
    shown = [
        keys("proof", opening="{{solution}}"),
        keys("other", opening="{{solution}}"),
        keys("other", opening="{{solution}}", shuffled=True),
        keys("other", opening="{{response}}"),
        keys(opening="{{answer}}"),
    ]
    assert len({one["score 0"] for one in [plain, *shown]}) == 6
    assert {one["rollout 0"] for one in [plain, *shown]} == {plain["rollout 0"]}


def test_a_forecast_counts_copies_of_the_response() -> None:
    settings = make_settings(
        prompts={"path": "p", "columns": {"answer": "answer"}}, score={"teacher_prompt": COPY}, evaluate=None
    )
    plan = plan_of(settings)
    job = plan.job("score", 0)
    measured = Measured(1, 10, 100, 2500, 200)
    size = job.stage.forecast(job, Experiment(settings, make_facts()), {"rollouts": Size(1000, 5000)}, measured)
    assert (size.tokens, size.bytes) == (2000, 25_000)
