"""Make everything of the Countdown example: problems, the teacher, the weak student.

    python -m examples.countdown.make                     # into this folder (about 20 minutes on one core)
    python -m examples.countdown.make --out /tmp/mine --only problems --four-numbers 1.0 --evaluate 2000
    python -m examples.countdown.make --only measure      # print the table of the README

Everything is drawn from ``--seed``; equal seeds, versions and thread counts give equal bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eopd.examples.countdown import task, tokenizer
from eopd.examples.countdown.measure import HEADER, as_row, measure
from eopd.examples.countdown.training import STUDENT, TEACHER, Recipe, train

HERE = Path(__file__).parent
STEPS = ("problems", "teacher", "student", "measure")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--only", choices=STEPS, action="append", help="do this step only (may be repeated)")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of torch; part of what makes bytes equal")
    parser.add_argument("--train", type=int, default=6000, help="training prompts")
    parser.add_argument("--evaluate", type=int, default=500, help="held-out problems")
    parser.add_argument("--four-numbers", type=float, default=2 / 3, help="share of problems with four numbers")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER.steps)
    parser.add_argument("--student-steps", type=int, default=STUDENT.steps)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    steps = args.only or STEPS
    rules = task.Rules()
    args.out.mkdir(parents=True, exist_ok=True)
    if "problems" in steps:
        for name, count, held_out in (("train", args.train, False), ("evaluate", args.evaluate, True)):
            path = args.out / f"{name}.jsonl"
            write_problems(path, count, args.four_numbers, args.seed, rules, held_out=held_out)
            say(f"{path}: {count} problems")
    if "teacher" in steps:
        make_model("teacher", dataclasses.replace(TEACHER, steps=args.teacher_steps), args.out, rules, args.seed)
    if "student" in steps:
        make_model("student", dataclasses.replace(STUDENT, steps=args.student_steps), args.out, rules, args.seed)
    if "measure" in steps:
        show(args.out)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_problems(path: Path, count: int, four: float, seed: int, rules: task.Rules, *, held_out: bool) -> None:
    """``count`` distinct problems as JSON lines {id, problem, answer}, three and four numbers mixed.

    Raises:
        ValueError: the rules do not have so many.
    """
    fours = round(count * four)
    groups = [
        task.distinct_problems(seed, size, n, rules, held_out=held_out)
        for n, size in ((3, count - fours), (4, fours))
        if size
    ]
    rows = [
        (numbers, target)
        for group in groups
        for numbers, target in zip(group.numbers.tolist(), group.target.tolist(), strict=True)
    ]
    order = np.random.default_rng([seed, 7]).permutation(len(rows))
    side = "evaluate" if held_out else "train"
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(order.tolist()):
            numbers, target = rows[row]
            line = {
                "id": f"countdown/{side}/{number}",
                "problem": task.problem_text(numbers, target),
                "answer": task.answer_text(numbers, target),
            }
            file.write(json.dumps(line) + "\n")


def make_model(name: str, recipe: Recipe, out: Path, rules: task.Rules, seed: int) -> None:
    """Train one of the two models and write its folder."""
    model = train(recipe, rules, seed, lambda line: say(f"{name}: {line}"))
    save(model, name, out)


def save(model: PreTrainedModel, name: str, out: Path) -> None:
    """Write a model and its tokenizer as an ordinary folder."""
    model.save_pretrained(out / name)
    (out / name / "model.safetensors").chmod(0o644)  # it is written for its owner only
    tokenizer.build(chat=name == "teacher").save_pretrained(out / name)
    size = sum(file.stat().st_size for file in (out / name).iterdir())
    say(f"{out / name}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.2f} MB")


def read_problems(path: Path) -> list[task.Traces]:
    """The problems of a file, grouped by how many numbers they have (their traces are left empty)."""
    groups: dict[int, list[tuple[list[int], int]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        left, target = json.loads(line)["answer"].split("=")
        numbers = [int(number) for number in left.split(",")]
        groups.setdefault(len(numbers), []).append((numbers, int(target)))
    collected = []
    for n, rows in sorted(groups.items()):
        numbers_array = np.asarray([numbers for numbers, _ in rows], dtype=np.int64)
        targets = np.asarray([target for _, target in rows], dtype=np.int64)
        collected.append(task.Traces(numbers_array, targets, np.zeros((len(rows), n - 1, 4), dtype=np.int64)))
    return collected


def show(out: Path) -> None:
    """Print the README's table: both models on the held-out problems, by how many numbers they have."""
    groups = read_problems(out / "evaluate.jsonl")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(out / name, dtype="float32", use_safetensors=True)
        for name in ("teacher", "student")
    )
    say(HEADER)
    for name, model in (("teacher", teacher), ("student", student)):
        for label, chosen in (("all", groups), *((f"{group.numbers.shape[1]} numbers", [group]) for group in groups)):
            say(as_row(f"{name}, {label}", measure(model, chosen, chat=False)))
    say(as_row("teacher, chat template", measure(teacher, groups, chat=True)))
    say(as_row("teacher on student rollouts", measure(student, groups, chat=False, judge=teacher)))


if __name__ == "__main__":
    main()
