"""Sources and templates that `plan`, `run` and `doctor` refuse before any work, by the setting's name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.config import CONFIG_FOLDER, ConfigError, RunSettings, parse_settings
from eopd.pipeline.doctor_inputs import check_inputs
from eopd.pipeline.prompt_check import Reader, check_prompts, render_sources, sources_of
from tests.pipeline.plan_case import commit, make_facts, make_run
from tests.raises import raises
from tests.stages.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
SYSTEM = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "1+2?"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path / "student")
    tiny_tokenizer(tmp_path / "teacher", template=NO_SYSTEM)
    return tmp_path


def settings(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> RunSettings:
    raw: dict[str, Any] = {
        "name": "x",
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "prompts": {"path": write(folder / "prompts.jsonl", rows)},
    }
    for name, value in changes.items():
        raw[name] = {**raw.get(name, {}), **value}
    return parse_settings(raw, "test")


def render(asked: RunSettings, folder: Path, rows: int | None = None) -> list[str]:
    readers = [Reader(role, folder / role, trusted=False) for role in ("student", "teacher")]
    return [prompt.text for prompt in render_sources(list(sources_of(asked)), *readers, rows)]


def test_both_views_of_every_source(folder: Path) -> None:
    benchmark = write(folder / "b.jsonl", [{"problem": "3+4?", "answer": "7", "id": "b0"}])
    asked = settings(
        folder,
        [{"prompt": "1+2?"}],
        score={"teacher_prompt": {"kind": "template", "template": "plain", "suffix": " Think."}},
        evaluate={"benchmarks": [{"name": "b", "path": benchmark}], "alignment": {}},
    )
    assert render(asked, folder) == [
        "<|user|>1+2?<|end|><|assistant|>",
        "1+2? Think.",
        "<|user|>3+4?<|end|><|assistant|>",
        "3+4? Think.",
    ]


def test_the_teacher_s_view_shows_placeholders_filled_in(folder: Path) -> None:
    prompt = {"kind": "template", "suffix": " Key: {{answer}}.", "opening": "{{response}} So {{answer}}: "}
    changes: dict[str, Any] = {"prompts": {"columns": {"answer": "answer"}}, "score": {"teacher_prompt": prompt}}
    asked = settings(folder, [{"prompt": "1+2?", "answer": 3}], **changes)
    assert render(asked, folder)[1] == "<|user|>1+2? Key: 3.<|end|><|assistant|>{{response}} So 3: "


@pytest.mark.parametrize(
    ("rows", "changes", "fields"),
    [
        (
            [{"prompt": "x", "a": "1"}] * 5 + [{"prompt": "x", "a": " "}],
            {"prompts": {"columns": {"answer": "a"}}, "score": {"teacher_prompt": {"opening": "{{answer}}"}}},
            {"prompt": "5"},
        ),
        (
            [{"prompt": "x"}],
            {"prompts": {"columns": {"solution": "s"}}, "score": {"teacher_prompt": {"opening": "{{solution}}"}}},
            {"line": 1, "match": "'s'"},
        ),
        (
            [{"prompt": "x"}] * 9 + [{"prompt": SYSTEM}],
            {"score": {"teacher_prompt": "template"}},
            {"prompt": "9", "match": "as the teacher.*no system role"},
        ),
        ([{"prompt": SYSTEM}], {"prompts": {"system": "Think."}}, {"prompt": "0", "match": "system message"}),
        (
            [{"prompt": "x"}],
            {"prompts": {"template_arguments": {"thinking": True}}},
            {"prompt": "0", "match": "as the student.*thinking"},
        ),
        (
            [{"prompt": "x"}],
            {"score": {"teacher_prompt": {"kind": "template", "arguments": {"thinking": True}}}},
            {"prompt": "0", "match": "as the teacher.*thinking"},
        ),
        (
            [{"prompt": "x", "answer": float("nan")}],
            {"prompts": {"columns": {"answer": "answer"}}},
            {"line": 1, "match": "nan"},
        ),
        ([{"prompt": "x"}], {"prompts": {"columns": {"answer": "answer"}}}, {"line": 1, "match": "'answer'"}),
    ],
)
def test_what_cannot_be_rendered_is_named(
    folder: Path, rows: list[dict[str, Any]], changes: dict[str, Any], fields: dict[str, Any]
) -> None:
    with raises(ConfigError, setting="prompts", **fields):
        render(settings(folder, rows, **changes), folder)


def test_a_column_for_the_teacher_is_named_in_every_source(folder: Path) -> None:
    benchmark = {"name": "b", "path": "b.jsonl"}
    column: dict[str, Any] = {"score": {"teacher_prompt": "column"}}
    with raises(ConfigError, setting="prompts.columns.teacher_prompt"):
        settings(folder, [], **column)
    column["prompts"] = {"columns": {"teacher_prompt": "hint"}}
    settings(folder, [], evaluate={"benchmarks": [benchmark]}, **column)
    with raises(ConfigError, setting="evaluate.benchmarks.0.columns.teacher_prompt"):
        settings(folder, [], evaluate={"benchmarks": [benchmark], "alignment": {}}, **column)
    named = {**benchmark, "columns": {"teacher_prompt": "hint"}}
    settings(folder, [], evaluate={"benchmarks": [named], "alignment": {}}, **column)


def test_rows_beyond_those_that_are_asked_for_are_not_read(folder: Path) -> None:
    asked = settings(folder, [{"prompt": "x"}, {"prompt": ""}])
    assert len(render(asked, folder, rows=1)) == 2
    with raises(ConfigError, setting="prompts", line=2):
        render(asked, folder, rows=2)


def test_a_run_that_is_complete_is_not_looked_at(folder: Path) -> None:
    facts = make_facts(folder=folder)
    facts = replace(
        facts,
        student=replace(facts.student, tokenizer_folder=folder / "student"),
        teacher=replace(facts.teacher, tokenizer_folder=folder / "teacher"),
    )
    run = make_run(folder, facts, prompts={"path": write(folder / "p.jsonl", [{"prompt": ""}])}, rounds=1)
    with raises(ConfigError, setting="prompts", line=1):
        check_prompts([run], None)
    for job in run.plan.jobs:
        commit(run, job)
    check_prompts([run], None)


def test_doctor_shows_prompts_without_what_steers_a_terminal(folder: Path) -> None:
    asked = settings(folder, [{"prompt": "\x1b[31mred\n" + "x" * 2000}])
    findings = {finding.name: finding for finding in check_inputs(asked)}
    text = findings["prompts (student)"].text
    assert text.startswith("<|user|>\\x1b[31mred\\nxxx")
    assert text.endswith("<|end|><|assistant|>")
    assert "characters ..." in text
    assert len(text) < 500
    broken = {
        finding.name: finding
        for finding in check_inputs(settings(folder, [{"prompt": SYSTEM}], score={"teacher_prompt": "template"}))
    }["prompts (rendered)"]
    assert broken.state == "broken"
    assert "no system role" in broken.text


@pytest.mark.parametrize("command", ["plan", "run", "rollout"])
def test_the_commands_refuse_before_work(folder: Path, command: str) -> None:
    countdown = CONFIG_FOLDER.parent / "examples" / "countdown"
    config = folder / "x.yaml"
    config.write_text(
        f"name: x\nstore: {folder}/store\nruns: {folder}/runs\n"
        f"student: {{path: {countdown}/student, tokenizer: {folder}/teacher}}\n"
        f"teacher: {{path: {countdown}/teacher, tokenizer: {folder}/teacher}}\n"
        f"prompts: {{path: {write(folder / 'p.jsonl', [{'prompt': SYSTEM}])}}}\n"
    )
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "eopd.pipeline.cli", command, str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1
    assert lines[0].startswith("eopd: prompts: prompt '0' as the student reads it")
    assert not any(line.endswith((" torch", " transformers")) for line in result.stderr.splitlines())
    assert not (folder / "store").exists()
