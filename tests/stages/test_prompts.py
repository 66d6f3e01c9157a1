"""Prompt sources, templates and the draw of a round."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eopd.stages.models.prompts import (
    PromptSettings,
    count_prompts,
    draw_prompts,
    load_prompts,
    render_prompt,
    source_files,
)
from eopd.storage.errors import InputError
from tests.raises import raises
from tests.stages.tiny_tokenizer import tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"name": "a", "problem": "What is two?", "solution": "2", "hint": "It is two."},
    {"name": "b", "problem": "What is four?", "solution": "4", "hint": "It is four."},
    {"name": "c", "problem": "What is five?", "solution": "5", "hint": "It is five."},
]
COLUMNS = {"id": "name", "prompt": "problem", "answer": "solution", "teacher_prompt": "hint"}


def write(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    if kind == "jsonl":
        path = folder / "prompts.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif kind == "parquet":
        path = folder / "prompts.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        from datasets import Dataset, DatasetDict

        path = folder / "saved"
        data = Dataset.from_list(rows)
        if kind == "splits":
            DatasetDict({"train": data, "test": data}).save_to_disk(str(path))
        else:
            data.save_to_disk(str(path), num_shards=2)
    return path


def prompts(path: Path, **changes: Any) -> PromptSettings:
    return PromptSettings(**({"path": str(path), "columns": COLUMNS} | changes))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "splits"])
def test_every_kind_of_source_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    asked = prompts(write(tmp_path, kind), split="train" if kind == "splits" else None)
    table = load_prompts(asked)
    assert count_prompts(asked) == len(table) == 3
    assert [prompt.id for prompt in table] == ["a", "b", "c"]
    second = table.rows([1])[0]
    assert (second.index, second.answer, second.teacher_prompt) == (1, "4", "It is four.")
    assert second.messages == ({"role": "user", "content": "What is four?"},)
    assert json.loads(second.messages_json) == [{"role": "user", "content": "What is four?"}]
    assert all(file.is_file() for file in source_files(asked))
    limited = asked.model_copy(update={"limit": 2})
    assert count_prompts(limited) == len(load_prompts(limited)) == 2


def test_source_files_change_with_the_content_only(tmp_path: Path) -> None:
    folder = write(tmp_path, "folder")
    listed = source_files(prompts(folder))
    assert listed[0].name == "state.json"
    assert {file.suffix for file in listed[1:]} == {".arrow"}
    assert len(listed) == 3


def test_a_source_is_read_again_when_it_changed(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    table = load_prompts(prompts(path))
    assert load_prompts(prompts(path)) is table
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(ROWS[0]["problem"], "another?"), encoding="utf-8")
    assert load_prompts(prompts(path))[0].messages[0]["content"] == "another?"
    assert len(load_prompts(prompts(path, limit=2))) == 2


def test_ids_may_be_row_numbers_and_prompts_conversations(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]
    path = write(tmp_path, "jsonl", [{"prompt": talk}, {"prompt": "One?"}])
    table = load_prompts(PromptSettings(path=str(path)))
    assert [prompt.id for prompt in table] == ["0", "1"]
    assert list(table[0].messages) == talk
    with raises(InputError, "2 messages", prompt="0", file=path):
        render_prompt(tiny_tokenizer(), table[0], PromptSettings(path=str(path), template="plain"))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"problem": "x", "name": "a", "solution": "1", "hint": "h"}\n{"problem": \n', 2, "not JSON"),
        ('{"problem": "x", "name": "a", "solution": "1"}\n', 1, "'hint'; it has name, problem, sol"),
        ("[1, 2]\n", None, "row 0.* int"),
        ('{"problem": "  ", "name": "a", "solution": "1", "hint": "h"}\n', 1, "column 'problem'"),
        ('{"problem": 7, "name": "a", "solution": "1", "hint": "h"}\n', 1, "column 'problem'"),
        ('{"problem": "x", "name": "a", "solution": null, "hint": "h"}\n', 1, "column 'solution'"),
        ("\n\n", None, "no prompts"),
        ("", None, "empty"),
        ('{"name": "\udcff"}\n', 1, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with raises(InputError, words, file=path, line=line):
        load_prompts(prompts(path))


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [*ROWS, ROWS[1]])
    with raises(InputError, "line 2", file=path, line=4, prompt="b"):
        load_prompts(prompts(path))


def test_a_source_that_is_not_there_or_not_readable_is_named(tmp_path: Path) -> None:
    with raises(InputError, file="nothing.jsonl"):
        count_prompts(prompts(tmp_path / "nothing.jsonl"))
    (tmp_path / "prompts.csv").write_text("a,b\n")
    with raises(InputError, file="prompts.csv", remedy=".jsonl"):
        source_files(prompts(tmp_path / "prompts.csv"))
    (tmp_path / "broken.parquet").write_text("no")
    with raises(InputError, "Parquet", file="broken.parquet"):
        count_prompts(prompts(tmp_path / "broken.parquet"))
    (tmp_path / "folder").mkdir()
    with raises(InputError, r"state\.json", file=tmp_path / "folder"):
        load_prompts(prompts(tmp_path / "folder"))
    with raises(InputError, "'hint'", file=".parquet", remedy="columns"):
        load_prompts(prompts(write(tmp_path, "parquet", [{"name": "a", "problem": "x", "solution": "y"}])))


def test_a_folder_copied_in_part_and_a_wrong_split_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "splits")
    with raises(InputError, "train, test", setting="split", file=folder):
        count_prompts(prompts(folder))
    next((folder / "train").glob("*.arrow")).unlink()
    with raises(InputError, "not copied whole", file="train/state.json"):
        count_prompts(prompts(folder, split="train"))


def test_templates(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    tokenizer = tiny_tokenizer()
    first = load_prompts(prompts(path))[0]

    def text(**changes: Any) -> str:
        return str(tokenizer.decode(render_prompt(tokenizer, first, prompts(path, **changes))))

    assert text(template="plain", suffix=" Think.") == "What is two? Think."
    assert text(suffix="!") == "<turn>user: What is two?!</turn><turn>assistant: "
    assert text(system="Be brief.").startswith("<turn>system: Be brief.</turn><turn>user: ")
    assert text(template_arguments={"enable_thinking": False}).endswith("()</turn>")
    with raises(InputError, "no chat template", prompt=first.id, file=path):
        render_prompt(tiny_tokenizer(chat=False), first, prompts(path))
    with pytest.raises(ValidationError, match="belong to template: chat"):
        prompts(path, template="plain", system="Be brief.")


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    source = prompts(path := write(tmp_path, "jsonl"), template="plain")
    first = load_prompts(source)[0]
    with raises(InputError, "no tokens", prompt=first.id, file=path):
        render_prompt(lambda text: {"input_ids": []}, first, source)


def test_rows_outside_the_source_are_refused(tmp_path: Path) -> None:
    with raises(InputError, "prompt 3 .* 3", file="jsonl", remedy="plan the run again"):
        load_prompts(prompts(write(tmp_path, "jsonl"))).rows([0, 3])


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), per_round=st.integers(1, 60), rounds=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_no_prompt_comes_twice_before_all_have_come_once(count: int, per_round: int, rounds: int, seed: int) -> None:
    drawn = [index for number in range(rounds) for index in draw_prompts(count, per_round, number, seed)]
    assert len(drawn) == rounds * per_round
    for start in range(0, len(drawn), count):
        epoch = drawn[start : start + count]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(count))
    assert drawn == [index for number in range(rounds) for index in draw_prompts(count, per_round, number, seed)]


def test_draws_differ_by_seed_and_epoch_and_are_even() -> None:
    assert draw_prompts(1000, 1000, 0, 1) != draw_prompts(1000, 1000, 0, 2)
    assert draw_prompts(1000, 1000, 0, 1) != draw_prompts(1000, 1000, 1, 1)
    firsts = Counter(draw_prompts(4, 1, 0, seed)[0] for seed in range(2000))
    assert all(400 < firsts[index] < 600 for index in range(4))


def test_the_draw_is_the_same_for_ever() -> None:
    assert draw_prompts(8, 8, 0, 0) == [7, 4, 0, 1, 3, 6, 2, 5]  # recorded: keys of rounds rest on it


NESTED = [
    {"prompt": "1+1?", "reward_model": {"ground_truth": "2", "style": "rule"}, "info": {"index": "u-0"}, "all": ["2"]},
    {"prompt": "2+2?", "reward_model": {"ground_truth": "4", "style": "rule"}, "info": {"index": "u-1"}, "all": ["4"]},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "array"])
def test_dots_lead_into_structs_and_lists_of_one(tmp_path: Path, kind: str) -> None:
    if kind == "array":
        path = tmp_path / "array.json"
        path.write_text(json.dumps(NESTED, indent=2), encoding="utf-8")
    else:
        path = write(tmp_path, kind, NESTED)
    columns = {"id": "info.index", "answer": "reward_model.ground_truth"}
    table = load_prompts(PromptSettings(path=str(path), columns=columns))
    assert [(prompt.id, prompt.answer) for prompt in table] == [("u-0", "2"), ("u-1", "4")]
    assert count_prompts(PromptSettings(path=str(path))) == 2
    assert load_prompts(PromptSettings(path=str(path), columns={"answer": "all.0"}))[1].answer == "4"
    for wrong, words in (
        ("reward_model", r"name one of its fields: reward_model\.ground_truth"),
        ("reward_model.truth", "'truth'; it has ground_truth, style"),
        ("all", r"all\.0"),
        ("info.index.deeper", "'info.index' holds str"),
        ("reward.truth", "no column 'reward.truth'"),
    ):
        with raises(InputError, words, file=path):
            load_prompts(PromptSettings(path=str(path), columns={"answer": wrong}))


def test_an_item_of_a_longer_list_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"prompt": "x", "all": ["1", "2"]}])
    with raises(InputError, "'all' holds 2 items", file=path, line=1):
        load_prompts(PromptSettings(path=str(path), columns={"answer": "all.0"}))


def test_a_name_with_dots_of_its_own_comes_first(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"prompt": "x", "a.b": "own", "a": {"b": "nested"}}])
    assert load_prompts(PromptSettings(path=str(path), columns={"answer": "a.b"}))[0].answer == "own"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["id", "answer"])
def test_numbers_that_are_none_are_refused_by_row(tmp_path: Path, kind: str, column: str, value: float) -> None:
    path = write(tmp_path, kind, [{"prompt": "x", "n": 5.0}, {"prompt": "y", "n": value}])
    with raises(InputError, f"'n' is {value}", file=path, **({"line": 2} if kind == "jsonl" else {"row": 1})):
        load_prompts(PromptSettings(path=str(path), columns={column: "n"}))


@pytest.mark.parametrize("value", [None, 3, ["x"], [{"role": "user", "content": "x"}]])
def test_a_teacher_prompt_is_text(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path, "jsonl", [{"prompt": "x", "hint": value}])
    with raises(InputError, "'hint' must hold text", file=path, line=1):
        load_prompts(PromptSettings(path=str(path), columns={"teacher_prompt": "hint"}))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"prompt": "\\ud800"}', "column 'prompt'.*surrogates"),
        ('{"prompt": [{"role": "user", "content": "\\udfff"}]}', "column 'prompt'.*surrogates"),
        ('{"prompt": "x", "answer": "\\ud800"}', "column 'answer'"),
        ('{"prompt": "x", "answer": 1, "answer": 2}', "'answer' comes twice"),
        ('{"prompt": "x", "answer": ' + "9" * 5000 + "}", "not JSON"),
        ('{"prompt": "x", "answer": 1e999}', "column 'answer' is inf"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"prompt": "x"}', "JSON array"),
        ('[{"prompt": "x"}, 3]', "row 1.* int"),
    ],
    ids=lambda value: value[:24],
)
def test_hostile_lines_are_one_message(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(line + "\n", encoding="utf-8")
    columns = {"answer": "answer"} if "answer" in line else {}
    with raises(InputError, words, file=path, line=1 if line.startswith("{") else None) as caught:
        load_prompts(PromptSettings(path=str(path), columns=columns))
    assert len(str(caught.value)) < 600


def test_a_source_that_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    with raises(InputError, "read twice", file="fifo.jsonl"):
        count_prompts(prompts(tmp_path / "fifo.jsonl"))


USER = {"role": "user", "content": "x"}
IDS = {"prompt": "input_ids", "response": "input_ids", "labels": "labels"}


def id_source(folder: Path, rows: list[dict[str, Any]], columns: dict[str, Any], **settings: Any) -> PromptSettings:
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSettings.model_validate({"path": str(path), "columns": columns, **settings})


def test_token_ids_are_prompts_as_they_are(tmp_path: Path) -> None:
    source = id_source(tmp_path, [{"prompt": [5, 6]}, {"prompt": "And?"}], {})
    first, second = load_prompts(source)
    assert render_prompt(tiny_tokenizer(), first, source) == [5, 6]
    assert (first.token_ids, first.messages_json) == ((5, 6), None)
    assert second.token_ids is None
    source = id_source(tmp_path, [{"prompt": [5, 600_000]}], {})
    with raises(InputError, "600000", prompt="0", file="ids.jsonl"):
        render_prompt(tiny_tokenizer(), load_prompts(source)[0], source)


@pytest.mark.parametrize("added", [{"suffix": "!"}, {"system": "Be brief."}, {"template_arguments": {"x": 1}}])
def test_nothing_is_added_to_token_ids(tmp_path: Path, added: dict[str, Any]) -> None:
    source = id_source(tmp_path, [{"prompt": [5, 6]}], {}, **added)
    with raises(InputError, prompt="0", setting=f"prompts.{next(iter(added))}"):
        render_prompt(tiny_tokenizer(), load_prompts(source)[0], source)


def test_labels_divide_a_sequence_into_prompt_and_response(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100]},  # nothing is trained on after the response
    ]
    prompts = load_prompts(id_source(tmp_path, rows, IDS))
    assert [(prompt.token_ids, prompt.response) for prompt in prompts] == [((5, 6), (7, 8)), ((5,), (6, 7))]
    whole = load_prompts(id_source(tmp_path, rows, {**IDS, "labels": None}))
    assert [(prompt.token_ids, prompt.response) for prompt in whole] == [((5,), (6, 7, 8))] * 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [5, 6], "labels": [-100]}, "2 token ids"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no response"),
        ({"input_ids": [5, 6], "labels": [5, 6]}, "no prompt"),
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, "several responses.*token 2"),
        ({"input_ids": [5, 6], "labels": [-100, 7]}, "id 6 as token 1.*7"),
        ({"input_ids": "text", "labels": [-100, 7]}, "must hold token ids"),
    ],
)
def test_labels_that_name_no_single_response_are_refused_by_row(
    tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    good = {"input_ids": [5, 6], "labels": [-100, 6]}
    with raises(InputError, f"'input_ids'.*{problem}", file="ids.jsonl", line=2) as caught:
        load_prompts(id_source(tmp_path, [good, row], IDS))
    assert bool(caught.value.remedy) == problem.startswith("several responses")


@pytest.mark.parametrize(
    ("columns", "row", "problem", "remedy"),
    [
        ({"response": "prompt"}, {"prompt": "x"}, "'prompt' must hold a list", ""),
        ({"response": "prompt"}, {"prompt": [USER, USER]}, "'prompt' ends with a message of the user", ""),
        ({"response": "prompt"}, {"prompt": [USER, {"role": "assistant"}]}, "'prompt' message 2: `content`", ""),
        ({"response": "r"}, {"prompt": "x", "r": {"content": ""}}, "'r' holds a message: .* empty turn", "remove it"),
        ({"tools": "t"}, {"prompt": "x", "t": "{"}, "'t' is not JSON", ""),
        ({"tools": "t"}, {"prompt": "x", "t": [1]}, "'t' must hold a list of JSON schemas", ""),
        ({}, {"prompt": [USER, {"role": "assistant", "content": ""}]}, "'prompt' message 2", "remove it"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_line(
    tmp_path: Path, columns: dict[str, str], row: dict[str, Any], problem: str, remedy: str
) -> None:
    with raises(InputError, problem, file="ids.jsonl", line=1) as caught:
        load_prompts(id_source(tmp_path, [row], columns))
    assert caught.value.remedy == remedy


def test_labels_belong_to_one_column_of_ids() -> None:
    with pytest.raises(ValidationError, match="labels divides"):
        PromptSettings.model_validate({"path": "p.jsonl", "columns": {"labels": "labels", "response": "response"}})
    assert "labels" not in PromptSettings(path="p.jsonl").semantic()["columns"]
