"""The embedded example: its task, its tokenizer, its recipe and its committed files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eopd.examples.countdown import make, task, tokenizer, training
from eopd.examples.countdown.measure import measure, sample, texts
from eopd.stages.verifiers.countdown import verify

FOLDER = Path(make.__file__).parent
RULES = task.Rules()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_drawn_trace_is_a_solution(n: int) -> None:
    traces = task.draw(np.random.default_rng(n), 500, n, RULES)
    assert len(traces) > 300
    assert traces.numbers.min() >= RULES.low
    assert traces.numbers.max() <= RULES.high
    assert traces.steps[:, :, 3].min() >= 1
    assert traces.steps[:, :, 3].max() <= RULES.limit
    for problem, solution in zip(traces.problems(), traces.solutions(), strict=True):
        verdict = verify(solution, problem.removesuffix(":"))
        assert verdict.correct, (problem, solution, verdict.reason)


def test_traces_reach_every_solution_of_a_problem() -> None:
    """What makes the teacher uncertain at forks: no solution is favoured so much that another never comes."""
    traces = task.draw(np.random.default_rng(0), 400_000, 3, RULES)
    chosen = (np.sort(traces.numbers, axis=1) == [2, 3, 4]).all(axis=1) & (traces.target == 9)
    names = set(traces.take(chosen).solutions())
    assert names == set(task.all_solutions((2, 3, 4), 9, RULES.limit))
    assert len(names) > 5


def test_enumerated_solutions_are_right_and_complete() -> None:
    names = set(task.all_solutions((1, 5, 7), 12, 49))
    assert names == {
        *("5+7=12,12*1=12", "5+7=12,1*12=12", "7+5=12,12*1=12", "7+5=12,1*12=12"),
        *("1*5=5,5+7=12", "1*5=5,7+5=12", "5*1=5,5+7=12", "5*1=5,7+5=12"),
        *("1*7=7,7+5=12", "1*7=7,5+7=12", "7*1=7,7+5=12", "7*1=7,5+7=12"),
    }
    for solution in task.all_solutions((4, 6, 9, 2), 30, 49):
        assert verify(solution, "4,6,9,2=30").correct


def test_held_out_problems_are_a_tenth_whatever_the_order_of_numbers() -> None:
    traces = task.draw(np.random.default_rng(1), 20_000, 4, RULES)
    held_out = task.is_held_out(traces.numbers, traces.target, RULES)
    assert held_out.mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(held_out, task.is_held_out(traces.numbers[:, ::-1], traces.target, RULES))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("n", [3, 4])
def test_fast_encoding_is_the_tokenizers(n: int, chat: bool) -> None:
    traces = task.draw(np.random.default_rng(2), 20, n, RULES)
    built = tokenizer.build(chat=chat)
    ids, width = tokenizer.encode(traces, chat=chat)
    end = tokenizer.TURN_END if chat else tokenizer.END
    for row, problem, solution in zip(ids.tolist(), traces.problems(), traces.solutions(), strict=True):
        prompt = problem
        if chat:
            prompt = built.apply_chat_template(
                [{"role": "user", "content": problem}], add_generation_prompt=True, tokenize=False
            )
        assert row[:width] == built(prompt, add_special_tokens=False)["input_ids"]
        assert row == built(prompt + solution + end, add_special_tokens=False)["input_ids"]
        assert built.decode(row[width:], skip_special_tokens=True) == solution


def test_committed_tokenizers_share_their_vocabulary_and_only_the_teacher_has_a_template() -> None:
    from eopd.stages.models.tokenizers import check_same_vocabulary, id_to_bytes

    teacher = AutoTokenizer.from_pretrained(FOLDER / "teacher")
    student = AutoTokenizer.from_pretrained(FOLDER / "student")
    check_same_vocabulary(teacher, student)
    assert id_to_bytes(student) == {number: token.encode() for token, number in tokenizer.ID.items()}
    assert teacher.chat_template == tokenizer.CHAT_TEMPLATE
    assert not student.chat_template
    assert teacher.eos_token_id != student.eos_token_id


def test_committed_problems_are_distinct_and_apart() -> None:
    keys: dict[str, set[tuple[int, ...]]] = {}
    for side in ("train", "evaluate"):
        rows = [json.loads(line) for line in (FOLDER / f"{side}.jsonl").read_text().splitlines()]
        assert all(row["problem"] == row["answer"] + ":" for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
        groups = make.read_problems(FOLDER / f"{side}.jsonl")
        assert sorted(group.numbers.shape[1] for group in groups) == [3, 4]
        for group in groups:
            assert (task.is_held_out(group.numbers, group.target, RULES) == (side == "evaluate")).all()
        keys[side] = {
            (*sorted(numbers), target)
            for group in groups
            for numbers, target in zip(group.numbers.tolist(), group.target.tolist(), strict=True)
        }
        assert len(keys[side]) == len(rows)
    assert len(keys["train"]) >= 2000
    assert not keys["train"] & keys["evaluate"]


def test_committed_models_are_small_and_the_teacher_is_the_better_one() -> None:
    weights = [FOLDER / name / "model.safetensors" for name in ("teacher", "student")]
    assert sum(path.stat().st_size for path in weights) < 5e6
    groups = [group.take(slice(0, 25)) for group in make.read_problems(FOLDER / "evaluate.jsonl")]
    models = {
        name: AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32)
        for name in ("teacher", "student")
    }
    teacher, student = (measure(model, groups, chat=False) for model in models.values())
    assert teacher.avg_at_k > student.avg_at_k + 0.2
    assert teacher.pass_at_k > student.pass_at_k
    judged = measure(models["student"], groups, chat=False, judge=models["teacher"])
    assert judged.gate_fraction > 0.1


def test_problem_files_are_reproducible(tmp_path: Path) -> None:
    make.main(["--out", str(tmp_path), "--only", "problems"])
    for name in ("train.jsonl", "evaluate.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="asked for 500 problems of 2 numbers"):
        task.distinct_problems(1, 500, 2, task.Rules(low=1, high=2), held_out=False)


def test_recipe_learns_saves_and_samples(tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = training.Recipe(
        layers=1, width=32, heads=1, kv_heads=1, feed_forward=64, steps=12, chat=True, batch=32, warmup=3
    )
    model = training.train(recipe, RULES, 3, lines.append, every=6)
    first, last = (float(line.split("loss ")[1].split()[0]) for line in lines)
    assert last < first
    again = training.train(recipe, RULES, 3, lambda line: None)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    make.save(model, "teacher", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert loaded.generation_config.eos_token_id == [tokenizer.ID[tokenizer.END], tokenizer.ID[tokenizer.TURN_END]]
    prompt = torch.tensor([[tokenizer.ID["4"], tokenizer.ID[":"]]] * 3)
    drawn = [sample(loaded, prompt, 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(texts(drawn[0])) == 3
